"""`skipjack bench host`: what the host does for a round that the device runs alone.

A GPU runs rounds ahead of the host. It never waits as long as the host needs less time for a round (commit, stop rules,
text, the next launch) than the device does. Here the device's part is taken away: every round finds the same report,
all draft tokens accepted, which is the most the host can be given to do.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Annotated, Any

import typer

from ..runtime import round_graph
from ..runtime.cache import KVCache
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.model import Model
from ..runtime.recipe import Recipe, Steps
from ..runtime.request import SamplingParams
from ..runtime.round import State
from . import options
from .clock import Spread
from .record import Sheet, deliver, header, title, where

# The first rounds enqueue several at once, and load the sequences.
SETTLED = 8
METHODS = ("autoregressive", "swift:threshold=0,search_budget=0", "layerskip")


@dataclass(frozen=True)
class Line:
    """The host's time for a round of `sequences` sequences, `emitted` tokens each; seconds."""

    method: str
    sequences: int
    emitted: int
    seconds: Spread


@contextmanager
def absent_device(token: int) -> Generator[list[float], None, None]:
    """Rounds whose device part is a report that says `token` was accepted throughout; yields the host's times."""
    honest, times, left = (round_graph.device_round, round_graph.device_steps), list[float](), 0.0

    def report(_model: Model, _cache: KVCache, state: State, recipe: Recipe) -> None:
        nonlocal left
        times.append(perf_counter() - left)
        k = recipe.num_draft_tokens
        state.report[..., :3] = k
        state.report[..., 3:] = token
        left = perf_counter()

    def report_steps(model: Model, _cache: KVCache, state: State, _steps: Steps, _sampled: bool) -> None:
        nonlocal left
        times.append(perf_counter() - left)
        state.report[...] = 2 * model.config.num_layers
        state.report[..., 3] = token
        left = perf_counter()

    round_graph.device_round, round_graph.device_steps = report, report_steps
    try:
        yield times
    finally:
        round_graph.device_round, round_graph.device_steps = honest


def measure(engine: Engine, method: str, sequences: int, rounds: int) -> Line:
    """Generate with `sequences` prompts for `rounds` rounds each.

    Raises:
        RequestError: the method's rounds are steered by the host, or the context has no room for so many.
    """
    token = engine.config.vocab_size // 2  # One with text: the first ones are often special.
    prompts = [[3 + i, token, token] for i in range(sequences)]
    with absent_device(token) as times:
        probe = list(engine.stream(prompts[0], SamplingParams(max_tokens=33, ignore_eos=True), method=method))
        if not times:
            raise RequestError(f"--method: expected one whose rounds run on the device alone, got {method}")
        emitted = max(len(chunk.token_ids) for chunk in probe)
        needed = emitted * (rounds + SETTLED)
        if needed + 3 > engine.config.max_context:
            raise RequestError(f"--rounds: expected at most {engine.config.max_context // emitted - SETTLED - 3}")
        times.clear()
        engine.generate(prompts, SamplingParams(max_tokens=needed, ignore_eos=True), method=method)
    return Line(method, sequences, emitted, Spread.of(times[SETTLED:-SETTLED]))


def sheet(result: dict[str, Any]) -> Sheet:
    """The host's time for a round and for a token."""
    return Sheet(
        f"The host's part of a round: {title(result)}",
        ("method", "sequences", "tokens a sequence", "µs a round", "p10–p90", "µs a token"),
        tuple(_cells(line) for line in result["lines"]),
        (
            "Rounds of the device alone, whose device part is left out: from one report to the next. On a GPU the "
            f"replay of the graph and the wait for its event come on top. Measured on {where(result['machine'])}.",
        ),
    )


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    median, low, high = (1e6 * line["seconds"][key] for key in ("median", "p10", "p90"))
    each = median / line["sequences"] / line["emitted"]
    method = line["method"].partition(":")[0]
    return (
        method,
        str(line["sequences"]),
        str(line["emitted"]),
        f"{median:.0f}",
        f"{low:.0f}–{high:.0f}",
        f"{each:.0f}",
    )


def host(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='A model folder, "demo", or synthetic:SHAPE[:LATE_SCALE].')
    ] = "demo",
    method: options.Methods = None,
    sequences: Annotated[
        list[int] | None, typer.Option(min=1, max=16, help="Generated together; repeatable; default 1, 4 and 16.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2 * SETTLED, help="Rounds of each.")] = 100,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """The Python work of a round that the device runs alone, in microseconds."""
    from .methods import load

    note = options.notes()
    names = method or METHODS
    with load(model, "auto", device="cpu", graphs=True, check=options.able(names)) as engine:
        lines: list[Line] = []
        for name in names:
            for count in sequences or (1, 4, 16):
                note(f"{name}, {count} sequences")
                lines.append(measure(engine, name, count, rounds))
        result = header("host", engine, model) | {"rounds": rounds, "lines": [asdict(line) for line in lines]}
    deliver(result, sheet, output, as_json)
