"""`skipjack bench layers` and `skipjack bench forced`, for models whose layers are routed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..runtime.errors import RequestError

UNTRAINED = "UNTRAINED ROUTERS, drawn at random: which tokens use more layers means nothing here"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A routed model folder, or synthetic:routed-SHAPE:LATE_SCALE.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Output = Annotated[Path | None, typer.Option(help="Write the result as JSON here.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def layers(
    model: Model,
    per_task: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 96,
    kv: Annotated[str, typer.Option(help="own or none: what skipped tokens leave in the cache.")] = "own",
    task: Annotated[str, typer.Option(help="The task whose first prompt and answer are drawn.")] = "continue",
    picture: Annotated[Path | None, typer.Option(help="Draw the answer's heat map here, .svg or .png.")] = None,
    dtype: Dtype = "auto",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Count the layers each token uses, by task: mean, variance, and a text from light (few layers) to dark (all)."""
    from . import heat_map
    from .layers import METHOD, PUBLISHED, load_routed, read, summary
    from .machine import describe

    if task not in PUBLISHED:
        raise RequestError(f"--task: expected one of {', '.join(PUBLISHED)}, got {task!r}")
    notes = Console(stderr=True, highlight=False)
    with load_routed(model, dtype) as engine:
        config, routing = engine.config, engine.config.routing
        readings = read(engine, per_task, max_tokens, f"{METHOD}:kv={kv}", lambda reading: None)
        total, routed = config.num_layers, len(routing.layers) if routing else 0
        trained = routing is not None and routing.trained
        label = f"{model}, kv={kv}, {routed} of {total} layers routed" + ("" if trained else f"\n{UNTRAINED}")
        result: dict[str, Any] = {
            "bench": "layers",
            "machine": describe(),
            "model": model,
            "kv": kv,
            "layers": total,
            "routed": routed,
            "routers_trained": trained,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "summary": [asdict(line) for line in summary(readings)],
            "readings": [asdict(reading) for reading in readings],
        }
    drawn = next(reading for reading in readings if reading.task == task)
    words = *drawn.prompt_words[:-1], drawn.prompt_words[-1].rstrip("\n") + "\n", *drawn.words
    used = drawn.prompt_layers + drawn.layers
    if picture:
        heat_map.picture(words, used, total - routed, total, picture, f"prompt and answer of {label}")
    _write(result, output)
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table("task", "prompts", "tokens", f"mean of {total}", "variance", "published mean of 32", "variance")
    for line in summary(readings):
        published = f"{line.published_mean:.1f}", f"{line.published_variance:.2f}"
        own = f"{line.mean:.1f}", f"{line.variance:.2f}"
        table.add_row(line.task, str(line.prompts), str(line.tokens), *own, *published)
    console = Console(highlight=False)
    console.print(heat_map.terminal(words, used, total - routed, total))
    console.print(table)
    console.print("published: the authors' trained Llama-3-8B-Instruct, layers 16 to 31 routed")
    if not trained:
        notes.print(UNTRAINED, style="bold red")


def forced(
    model: Model = "synthetic:routed-135m:0.3",
    skipped: Annotated[
        list[int] | None, typer.Option(min=0, help="Routed layers skipped, the last ones; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each run.")] = 32,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of runs of each row.")] = 10,
    dtype: Dtype = "auto",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Skip routed layers by command, whatever the routers say: the time it saves beside the bytes it saves."""
    from .forced_routes import measure
    from .layers import load_routed
    from .machine import describe

    with load_routed(model, dtype) as engine:
        routed = len(engine.config.routing.layers) if engine.config.routing else 0
        counts = skipped or sorted({0, routed // 4, routed // 2, 3 * routed // 4, routed})
        rows = measure(engine, counts, tokens, pairs, lambda count: None)
        result = {
            "bench": "forced",
            "machine": describe(),
            "model": model,
            "backend": engine.backend,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "tokens": tokens,
            "pairs": pairs,
            "rows": [asdict(row) for row in rows],
        }
    _write(result, output)
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table("layers skipped", "speed ÷ none skipped", "p10–p90", "time saved", "bytes saved", "time ÷ bytes")
    for row in rows:
        table.add_row(
            f"{row.skipped} of {row.of}",
            f"{row.speed:.2f}",
            f"{row.speed_p10:.2f}–{row.speed_p90:.2f}",
            f"{row.time_saved:.1%}",
            f"{row.bytes_saved:.1%}",
            f"{row.time_saved / row.bytes_saved:.2f}" if row.bytes_saved else "",
        )
    Console(highlight=False).print(table)


def _write(result: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as problem:
        raise RequestError(f"--output: cannot write {path}: {problem.strerror}") from None
