"""`skipjack bench …`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import options, profile, routed
from .baselines_command import baselines
from .commands import accept, figures, numerics, peers, project, serve, table
from .conversation import chat
from .decode_cli import decode
from .dmtd import dmtd
from .host import host
from .unified_command import unified

if TYPE_CHECKING:
    from .exact import Line

app = typer.Typer(add_completion=False)
for command in (decode, peers, accept, serve, numerics, project, host, figures, table):
    app.command()(command)
for command in (chat, unified, dmtd, baselines, routed.layers, routed.forced):
    app.command()(command)
app.command("profile")(profile.command)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure and check on real weights."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def exact(
    model: options.Model = "demo",
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this lossless method; repeatable. Its options rotate."),
    ] = None,
    prompts: options.Prompts = None,
    per_category: options.PerCategory = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 64,
    dtype: options.Dtype = "auto",
    cache_tokens: options.CacheTokens = None,
    temperature: options.Temperature = 0.0,
    batch: Annotated[int, typer.Option(min=0, max=16, help="Prompts drafted together; 0 rotates 1, 4, 16.")] = 0,
    cover: Annotated[
        bool, typer.Option("--cover", help="Take prompts again until every two options of a method have met.")
    ] = False,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare every lossless method with plain decoding token by token; exit 1 if any token differs."""
    from ..runtime.request import SamplingParams
    from .exact import compare, coverage, groups, summary
    from .methods import load
    from .record import header, write
    from .rotation import named

    names = named(method)
    chosen, note = options.chosen(prompts, per_category), options.notes()
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0)
    with load(model, dtype, cache_tokens=cache_tokens, check=options.able((), chosen, max_tokens)) as engine:
        note(f"{len(chosen)} prompts x {len(names)} methods, {engine.dtype}, {engine.backend}")
        total = sum(len(group) for name in names for _, group in groups(name, len(chosen), batch, cover))
        counted = options.counted(note, total, every=10)
        rows = compare(engine, chosen, params, names=names, batch=batch, cover=cover, progress=counted)
        result = {
            **header("exact", engine, model),
            "temperature": temperature,
            "batch": batch,
            "max_tokens": max_tokens,
            "pairs": coverage(rows),
            "summary": [asdict(line) for line in summary(rows)],
            "rows": [asdict(row) for row in rows],
        }
    if output:
        write(result, output)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(summary(rows))
    if not all(row.identical for row in rows):
        options.alarm("NOT IDENTICAL to plain decoding")
        raise typer.Exit(1)


@app.command()
def picture(
    output: Annotated[Path, typer.Argument(help="The SVG file to write.", callback=options.writable)],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated.")] = 96,
) -> None:
    """Draw the demonstration: accepted draft tokens orange, tokens the full model chose green."""
    from ..runtime.commands.demo import DEMO_METHOD, DEMO_QUESTION
    from ..runtime.engine import Engine
    from ..runtime.request import SamplingParams
    from .picture import svg

    with Engine.load("demo") as engine:
        drawing = svg(engine, DEMO_QUESTION, DEMO_METHOD, SamplingParams(max_tokens=max_tokens))
    output.write_text(drawing, encoding="utf-8")


@app.command()
def methods(
    model: options.Model = "demo",
    method: options.Methods = None,
    prompts: options.Prompts = None,
    per_category: options.PerCategory = 5,
    category: options.Category = None,
    max_tokens: options.MaxTokens = 128,
    dtype: options.Dtype = "auto",
    cache_tokens: options.CacheTokens = None,
    output: options.Output = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the speeds as SVG here.", callback=options.drawable)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare methods, by default lookup and auto, with plain decoding: speed in pairs, acceptance, what is missing."""
    from ..runtime.request import SamplingParams
    from . import sheets
    from .methods import Row, compare, load, summary
    from .record import deliver, header, title, write

    chosen, note = options.chosen(prompts, per_category, category), options.notes()
    names = method or ["lookup", "auto"]
    with load(model, dtype, cache_tokens=cache_tokens, check=options.able(names, chosen, max_tokens)) as engine:
        note(f"{len(chosen)} prompts x {len(names)} methods, {engine.dtype}, {engine.backend}")
        progress, rows = options.counted(note, len(chosen) * len(names)), list[Row]()
        result = {**header("methods", engine, model), "max_tokens": max_tokens}

        def keep(row: Row) -> None:
            rows.append(row)
            result["summary"] = [asdict(line) for line in summary(rows)]
            result["rows"] = [asdict(one) for one in rows]
            if output:
                write(result, output)
            progress(row)

        compare(engine, names, chosen, SamplingParams(max_tokens=max_tokens), keep)
    if not all(row.identical for row in rows):
        options.alarm("NOT IDENTICAL to plain decoding: no speed is reported")
        raise typer.Exit(1)
    if picture:
        from .charts import speeds

        speeds(summary(rows), picture, title(result))
    deliver(result, sheets.methods, output, as_json)


@app.command()
def timeline(
    output: Annotated[Path, typer.Argument(help="The SVG file to write.", callback=options.drawable)],
    model: Annotated[str, typer.Option(help='A model folder, "demo", or synthetic:SHAPE[:LATE_SCALE].')] = "demo",
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "The history of the lighthouse begins",
    max_tokens: Annotated[int, typer.Option(min=33, help="Tokens generated.")] = 512,
    search_budget: Annotated[float, typer.Option(help="Share of the decoding time for the search.")] = 0.3,
    skip_ratio: Annotated[float, typer.Option(help="Share of the inner sub-layers that are skipped.")] = 0.15,
) -> None:
    """Draw a run of SWIFT: accumulation, optimisation and acceleration over its tokens, and the best matchness."""
    from ..runtime.prompts import Prompt
    from ..runtime.request import SamplingParams
    from .charts import timeline as draw
    from .methods import load

    method = f"swift:search_budget={search_budget},skip_ratio={skip_ratio},max_tolerance_iter=60"
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with load(model, "auto", check=options.able([method])) as engine:
        source: Prompt = prompt if engine.tokenizer else list(range(3, 12))
        stats = engine.generate(source, params, method=method).stats
    draw(stats, 32, output, f"{method} on {model}")


def _show(lines: list[Line]) -> None:
    table = Table("category", "prompts", "tokens", "identical", "acceptance rate", "mean length", "speed ÷ plain")
    for line in lines:
        table.add_row(
            line.category,
            str(line.prompts),
            str(line.tokens),
            f"{line.identical} of {line.prompts}",
            f"{line.acceptance_rate:.2f}",
            f"{line.mean_acceptance_length:.2f}",
            f"{line.speed_median:.2f}",
        )
    Console(highlight=False).print(table)
