"""`skipjack bench …`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    from .exact import Line

app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure and check on real weights."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def exact(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='A model folder, or "demo".')] = "demo",
    prompts: Annotated[
        Path | None,
        typer.Option(envvar="SKIPJACK_PROMPTS", help="JSON lines with category and turns; default: our own."),
    ] = None,
    per_category: Annotated[int, typer.Option(min=1, help="Prompts taken of each category.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy; above, tokens are drawn with seed 0.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, max=16, help="Prompts drafted together.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write every row as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare SWIFT with plain decoding token by token; exit 1 if any token differs."""
    from ..runtime.engine import Engine
    from ..runtime.request import SamplingParams
    from .exact import compare, summary
    from .machine import describe
    from .prompts import load

    chosen, machine = load(prompts, per_category), describe()
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0)
    notes = Console(stderr=True, highlight=False)
    with Engine.load(model, dtype=dtype) as engine:
        notes.print(f"{len(chosen)} prompts, {max_tokens} tokens each, {engine.dtype}, {engine.backend}")
        done = 0

        def progress(row: object) -> None:
            nonlocal done
            done += 1
            if sys.stderr.isatty() or done % 10 == 0:
                notes.print(f"{done} of {len(chosen)}", end="\r" if sys.stderr.isatty() else "\n")

        rows = compare(engine, chosen, params, batch=batch, progress=progress)
        result = {
            "bench": "exact",
            "machine": machine,
            "backend": engine.backend,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "temperature": temperature,
            "batch": batch,
            "max_tokens": max_tokens,
            "summary": [asdict(line) for line in summary(rows)],
            "rows": [asdict(row) for row in rows],
        }
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(summary(rows))
    if not all(row.identical for row in rows):
        notes.print("NOT IDENTICAL to plain decoding", style="bold red")
        raise typer.Exit(1)


@app.command()
def table(
    results: Annotated[list[Path], typer.Argument(help="Result files of `skipjack bench exact --output`.")],
) -> None:
    """Print result files as a Markdown table, one line a file."""
    from .exact import markdown

    try:
        typer.echo(markdown([json.loads(path.read_text(encoding="utf-8")) for path in results]))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"RESULTS: expected result files of `skipjack bench exact`: {error!r}") from error


@app.command()
def picture(
    output: Annotated[Path, typer.Argument(help="The SVG file to write.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated.")] = 96,
) -> None:
    """Draw the demonstration: accepted draft tokens orange, tokens the full model chose green."""
    from ..runtime.engine import Engine
    from ..runtime.request import SamplingParams
    from ..runtime.showcase import DEMO_METHOD, DEMO_QUESTION
    from .picture import svg

    with Engine.load("demo") as engine:
        drawing = svg(engine, DEMO_QUESTION, DEMO_METHOD, SamplingParams(max_tokens=max_tokens))
    output.write_text(drawing, encoding="utf-8")


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
