"""`skipjack bench layers` and `skipjack bench forced`, for models whose layers are routed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..runtime.errors import RequestError
from . import options

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A routed model folder, or synthetic:routed-SHAPE[:LATE_SCALE].")
]


def layers(
    model: Model,
    per_task: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 96,
    kv: Annotated[str, typer.Option(help="own or none: what skipped tokens leave in the cache.")] = "own",
    task: Annotated[str, typer.Option(help="The task whose first prompt and answer are drawn.")] = "continue",
    picture: Annotated[
        Path | None, typer.Option(help="Draw the answer's heat map here, .svg or .png.", callback=options.drawable)
    ] = None,
    dtype: options.Dtype = "auto",
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Count the layers each token uses, by task: mean, variance, and a text from light (few layers) to dark (all)."""
    from . import heat_map, sheets
    from .layers import METHOD, PUBLISHED, load_routed, read, summary
    from .record import deliver, header

    if task not in PUBLISHED:
        raise RequestError(f"--task: expected one of {', '.join(PUBLISHED)}, got {task!r}")
    with load_routed(model, dtype) as engine:
        config, routing = engine.config, engine.config.routing
        readings = read(engine, per_task, max_tokens, f"{METHOD}:kv={kv}", lambda reading: None)
        total, routed = config.num_layers, len(routing.layers) if routing else 0
        trained = routing is not None and routing.trained
        label = f"{model}, kv={kv}, {routed} of {total} layers routed" + ("" if trained else f"\n{sheets.UNTRAINED}")
        result: dict[str, Any] = {
            **header("layers", engine, model),
            "kv": kv,
            "layers": total,
            "routed": routed,
            "routers_trained": trained,
            "summary": [asdict(line) for line in summary(readings)],
            "readings": [asdict(reading) for reading in readings],
        }
    drawn = next(reading for reading in readings if reading.task == task)
    words = *drawn.prompt_words[:-1], drawn.prompt_words[-1].rstrip("\n") + "\n", *drawn.words
    used = drawn.prompt_layers + drawn.layers
    if picture:
        heat_map.picture(words, used, total - routed, total, picture, f"prompt and answer of {label}")
    if not as_json:
        Console(highlight=False).print(heat_map.terminal(words, used, total - routed, total))
    deliver(result, sheets.layers, output, as_json)


def forced(
    model: Model = "synthetic:routed-135m:0.3",
    skipped: Annotated[
        list[int] | None, typer.Option(min=0, help="Routed layers skipped, the last ones; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each run.")] = 32,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of runs of each row.")] = 10,
    dtype: options.Dtype = "auto",
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Skip routed layers by command, whatever the routers say: the time it saves beside the bytes it saves."""
    from . import sheets
    from .forced_routes import measure
    from .layers import load_routed
    from .record import deliver, header

    with load_routed(model, dtype) as engine:
        routed = len(engine.config.routing.layers) if engine.config.routing else 0
        counts = skipped or sorted({0, routed // 4, routed // 2, 3 * routed // 4, routed})
        rows = measure(engine, counts, tokens, pairs, lambda count: None)
        result = {
            **header("forced", engine, model),
            "tokens": tokens,
            "pairs": pairs,
            "rows": [asdict(row) for row in rows],
        }
    deliver(result, sheets.forced, output, as_json)
