"""The bench commands that compare: with other libraries, over prompt files, under an event loop, and with papers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import RequestError
from ..runtime.request import MOST_SEQUENCES, SEQUENCES
from . import options

if TYPE_CHECKING:
    from ..loaders.config import ModelConfig
    from ..loaders.tokenizer import Tokenizer


def peers(
    model: options.Model = "demo",
    prompts: options.Prompts = None,
    per_category: options.PerCategory = 1,
    category: options.Category = None,
    max_tokens: options.MaxTokens = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    cache_tokens: options.CacheTokens = None,
    exit_layer: Annotated[int, typer.Option(min=0, help="Of assistant_early_exit; 0: two thirds of the layers.")] = 0,
    num_draft_tokens: Annotated[int, typer.Option(min=1, help="Of prompt_lookup_num_tokens.")] = 10,
    compile_mode: Annotated[
        str, typer.Option(help="torch.compile's mode for the decode loop; auto: max-autotune on a GPU, else default.")
    ] = "auto",
    peer: Annotated[
        list[str] | None, typer.Option(help="Measure only peers whose names contain this; repeatable.")
    ] = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare plain decoding with transformers, a compiled loop and llama.cpp: ids in float32 first, then speed."""
    from ..runtime.choices import place_of
    from ..runtime.engine import Engine
    from .peer_loops import PLAIN, Setting, expect_peers, versions
    from .peers import Contest, folder_of, trusted
    from .record import deliver, header, write
    from .sheets import peers as sheet

    chosen, notes = options.chosen(prompts, per_category, category), options.notes()
    libraries, roomy = versions(), options.able((), chosen, max_tokens)
    tuned = "max-autotune" if place_of(device).type == "cuda" else "default"

    def setting_of(config: ModelConfig) -> Setting:
        layer = exit_layer or max(1, 2 * config.num_layers // 3)
        return Setting(layer, num_draft_tokens, tuned if compile_mode == "auto" else compile_mode)

    def check(config: ModelConfig, tokenizer: Tokenizer | None) -> int | None:
        expect_peers(peer or (), setting_of(config), config.model_type)
        return roomy(config, tokenizer)

    with folder_of(model) as folder:
        with Engine.load(folder, device=device, dtype="float32", cache_tokens=cache_tokens, check=check) as engine:
            setting = setting_of(engine.config)
            untimed = replace(setting, timed=False)
            contest = Contest(folder, engine, chosen, untimed, max_tokens, peer or ())
            agreements = contest.agree(notes)
        del contest
        result: dict[str, Any] = {
            "float32_compile_mode": untimed.loop_mode,
            "agreement": [asdict(agreement) for agreement in agreements],
        }
        if not trusted(agreements):
            options.alarm(f"RED: greedy ids are not those of {PLAIN} in float32: no speed is reported")
            notes(json.dumps(result))
            raise typer.Exit(1)
        with Engine.load(folder, device=device, dtype=dtype, cache_tokens=cache_tokens) as engine:
            contest = Contest(folder, engine, chosen, setting, max_tokens, peer or ())
            result |= header("peers", engine, model) | libraries | {"max_tokens": max_tokens, "only": peer or []}
            result |= {"summary": [], "rows": []}
            for rows, line in contest.measure(agreements, notes):
                result["summary"].append(asdict(line))
                result["rows"] += [asdict(row) for row in rows]
                if output:
                    write(result, output)
    deliver(result, sheet, output, as_json)


def accept(
    model: options.Model = "demo",
    prompts: options.Prompts = None,
    method: options.Methods = None,
    per_category: options.PerCategory = 5,
    category: options.Category = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    cache_tokens: options.CacheTokens = None,
    output: options.Output = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table as Markdown here.", callback=options.writable)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Acceptance over a prompt file, by method, category and draft depth; no speed."""
    from ..runtime.engine import Engine
    from ..runtime.request import SamplingParams
    from .accept import METHODS, measure, sheet, summary
    from .peers import folder_of
    from .record import deliver, header

    chosen, notes = options.chosen(prompts, per_category, category), options.notes()
    names = method or list(METHODS)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0)
    check = options.able(names, chosen, max_tokens)
    with (
        folder_of(model) as folder,
        Engine.load(folder, device=device, dtype=dtype, cache_tokens=cache_tokens, check=check) as engine,
    ):
        progress = options.counted(notes, len(names) * len(chosen))
        rows = measure(engine, names, chosen, params, progress)
        result = header("accept", engine, model)
    result |= {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "summary": [asdict(line) for line in summary(rows)],
        "rows": [asdict(row) for row in rows],
    }
    deliver(result, sheet, output, as_json, markdown)


def serve(
    model: options.Model = "demo",
    prompts: options.Prompts = None,
    method: options.Methods = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST_SEQUENCES, help="Repeatable; default: 1 and 4.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=10000, help="Requests of each run.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for each request.")] = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    cache_tokens: options.CacheTokens = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Latency percentiles of the engine embedded in an event loop: first token, between tokens, and the loop itself."""
    from ..runtime.engine import Engine
    from ..runtime.request import SamplingParams
    from .latency import measure, sheet
    from .peers import folder_of
    from .prompts import source
    from .record import deliver, header

    chosen, notes = options.chosen(prompts, requests, None), options.notes()
    names, concurrencies = method or ["autoregressive", "lookup", "auto"], concurrency or [1, 4]
    params, check = SamplingParams(max_tokens=max_tokens, ignore_eos=True), options.able(names, chosen, max_tokens)
    with (
        folder_of(model) as folder,
        Engine.load(
            folder,
            device=device,
            dtype=dtype,
            cache_tokens=cache_tokens,
            max_sequences=max(SEQUENCES, *concurrencies),
            check=check,
        ) as engine,
    ):
        sources = [source(chosen[i % len(chosen)], engine.tokenizer, engine.config) for i in range(requests)]
        rows = measure(
            engine,
            names,
            concurrencies,
            sources,
            params,
            lambda row: notes(f"{row.method}, {row.concurrency} at a time"),
        )
        result = header("serve", engine, model)
    result |= {"max_tokens": max_tokens, "rows": [asdict(row) for row in rows]}
    wrong = [row.method for row in rows if row.lossless and row.identical < row.requests]
    if wrong:
        options.alarm(f"NOT IDENTICAL to plain decoding: {', '.join(dict.fromkeys(wrong))}: no latency is reported")
        raise typer.Exit(1)
    deliver(result, sheet, output, as_json)


def numerics(
    model: options.Model = "demo",
    prompts: options.Prompts = None,
    method: options.Methods = None,
    per_category: options.PerCategory = 1,
    category: options.Category = None,
    max_tokens: options.MaxTokens = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    cache_tokens: options.CacheTokens = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare fast numerics with exact: logits on given text first, then texts and speeds of each method."""
    from ..runtime.engine import Engine
    from .numerics import METHODS, compare, gaps, sheets, summary, trusted
    from .peers import folder_of
    from .record import deliver, header

    chosen, notes, names = options.chosen(prompts, per_category, category), options.notes(), method or list(METHODS)
    check = options.able(names, chosen, max_tokens)
    with (
        folder_of(model) as folder,
        Engine.load(folder, device=device, dtype=dtype, cache_tokens=cache_tokens, check=check) as exact,
        Engine.load(folder, device=device, dtype=dtype, cache_tokens=cache_tokens, numerics="fast") as fast,
    ):
        found = gaps(exact, fast, chosen, max_tokens)
        result = header("numerics", fast, model)
        result |= {"max_tokens": max_tokens, "gaps": [asdict(gap) for gap in found]}
        if not trusted(found, fast.dtype):
            options.alarm("RED: the logits differ by more than rounding: no speed is reported")
            notes(json.dumps(result["gaps"]))
            raise typer.Exit(1)
        rows = compare(exact, fast, names, chosen, max_tokens, lambda row: notes(f"{row.method}, {row.category}"))
    result |= {"summary": [asdict(line) for line in summary(rows)], "rows": [asdict(row) for row in rows]}
    deliver(result, sheets, output, as_json)


def project(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Measure its steps now, roughly.")] = None,
    costs: Annotated[Path | None, typer.Option(help="A result of `skipjack bench decode`.")] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    cache_tokens: options.CacheTokens = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """PROJECTION: measured step costs and published acceptance rates, next to the published speed-ups."""
    from ..runtime.costs import calibrate
    from ..runtime.engine import Engine
    from ..runtime.stepwise import at_once
    from .peers import folder_of
    from .project import LABEL, costs_from, costs_of, sheet
    from .project import project as rows_of
    from .record import deliver, header, read

    if (model is None) == (costs is None):
        raise RequestError("project: expected either MODEL or --costs FILE")
    if costs is not None:
        measured = read(costs)
        steps = costs_of(measured)
        base = {key: measured[key] for key in ("machine", "dtype")} | {"bench": "project", "model": steps.shape}
    else:
        name = model or ""
        with (
            folder_of(name) as folder,
            Engine.load(folder, device=device, dtype=dtype, cache_tokens=cache_tokens) as engine,
        ):
            steps = costs_from(at_once(calibrate(engine._loaded()[0])), name)
            base = header("project", engine, name)
    rows = [asdict(row) for row in rows_of(steps)]
    result = base | {"projection": True, "label": LABEL, "shape": steps.shape, "costs": steps.fields(), "rows": rows}
    deliver(result, sheet, output, as_json)


def figures(
    results: Annotated[Path, typer.Argument(help="The folder of result files.")] = Path("bench/results"),
    output: Annotated[Path, typer.Option(help="The folder of pictures.")] = Path("docs/figures"),
) -> None:
    """Draw every picture there is a result file for; the others are named with the command that makes their result."""
    from .figures import draw

    notes = options.notes()
    for path in draw(results, output, notes):
        typer.echo(path)


def table(results: Annotated[list[Path], typer.Argument(help="Result files of `skipjack bench … --output`.")]) -> None:
    """Print result files as Markdown tables; each table is of one device."""
    from .figures import table as render

    typer.echo(render(results))
