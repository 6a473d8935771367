"""A profile of warm rounds: a timeline for Chrome's viewer or Nsight, and what the parts of a round take."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from ..runtime.errors import RequestError
from . import options
from .record import Sheet, deliver, header, title, where

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from ..runtime.prompts import Prompt
    from ..runtime.request import Chunk

_RANGE = re.compile(r"(?P<part>prefill|round|draft\[\d+\]|verify|commit|search) S=\d+ R=\d+")
# Tokens a sequence may gain in a round, as far as room is reserved for them.
ROUND_TOKENS = 16
TOP_OPS = 12


class Profiler(str, Enum):
    """Who watches: torch itself, or Nsight around this process."""

    TORCH = "torch"
    NSIGHT = "nsight"


@dataclass(frozen=True)
class Share:
    """A part of a round: how often it ran, its milliseconds in a round on average, and its share of the rounds."""

    part: str
    count: int
    round_ms: float
    share: float


@dataclass(frozen=True)
class OpTime:
    """An operation's time without those it calls, summed over the rounds; on a GPU, its kernels' time."""

    name: str
    count: int
    self_ms: float
    share: float


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='A folder, "demo", or synthetic:SHAPE[:LATE_SCALE].')],
    method: Annotated[str, typer.Option(metavar="NAME[:key=value,…]", help="Decoding method.")] = "autoregressive",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are captured.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds of the same request before them.")] = 3,
    batch: Annotated[int, typer.Option(min=1, max=16, help="Sequences that share the rounds.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    profiler: Annotated[Profiler, typer.Option(help="nsight only marks the region, for nsys or ncu.")] = Profiler.TORCH,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Rounds on the device, captured on a GPU: a range a round, none inside.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write the timeline here: .json or .json.gz.", callback=options.writable)
    ] = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Profile warm rounds; ranges are prefill, round, draft[i], verify, commit and search."""
    from .methods import load
    from .prompts import load as load_prompts
    from .prompts import source

    nsight = profiler is Profiler.NSIGHT
    for name, path in (("--trace", trace), ("--output", output)):
        if nsight and path:
            raise RequestError(f"{name}: expected no file with --profiler nsight, whose tools write their own")
    with load(model, dtype, method, ranges="nvtx" if nsight else "torch", graphs=graphs) as engine:
        texts = load_prompts(None, 2)
        prompts = [source(texts[i % len(texts)], engine.tokenizer, engine.config) for i in range(batch)]
        if nsight:
            run(engine, prompts, method, warm_up, rounds, cuda_region())
            Console(stderr=True, highlight=False).print(
                f"{rounds} rounds between cudaProfilerStart and cudaProfilerStop"
            )
            return
        shares, ops = profiled(engine, prompts, method, warm_up, rounds, trace)
        setting = {"method": method, "rounds": rounds, "sequences": batch, "graphs": graphs}
        parts = {"parts": [asdict(share) for share in shares], "ops": [asdict(op) for op in ops]}
        deliver(header("profile", engine, model) | setting | parts, sheets, output, as_json)


def run(
    engine: Engine,
    prompts: list[Prompt],
    method: str,
    warm_up: int,
    rounds: int,
    region: AbstractContextManager[object],
) -> None:
    """Decode `warm_up` rounds of a request, then `rounds` more of them within `region`, and end it.

    Raises:
        RequestError: the request cannot be that long, or ended before.
    """
    from ..runtime.request import SamplingParams

    context = engine.config.max_context
    if warm_up + rounds >= context:
        raise RequestError(
            f"profile: expected fewer rounds than the model's context of {context}, got {warm_up + rounds}"
        )
    params = SamplingParams(max_tokens=ROUND_TOKENS * (warm_up + rounds + 1), ignore_eos=True)
    stream = engine.stream(prompts, params, method=method)
    try:
        _advance(stream, 1 + warm_up)
        with region:
            _advance(stream, rounds)
    finally:
        stream.close()


def profiled(
    engine: Engine, prompts: list[Prompt], method: str, warm_up: int, rounds: int, trace: Path | None = None
) -> tuple[list[Share], list[OpTime]]:
    """`run` under the torch profiler: the parts of a round, and the operations that take most."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities)
    run(engine, prompts, method, warm_up, rounds, profiler)
    if trace:
        profiler.export_chrome_trace(str(trace))
    events = cast("Any", profiler.events())
    host = [event for event in events if event.device_type.name == "CPU"]
    spans = [(event.name, (event.time_range.end - event.time_range.start) / 1e6) for event in host]
    return breakdown(spans), _ops(cast("Any", profiler.key_averages()), on_gpu)


def breakdown(spans: Iterable[tuple[str, float]]) -> list[Share]:
    """What the rounds among named durations, seconds, consist of; what lies in no part of theirs is "other"."""
    seconds, counts = dict[str, float](), dict[str, int]()
    for name, duration in spans:
        found = _RANGE.fullmatch(name)
        if found:
            part = found["part"]
            seconds[part] = seconds.get(part, 0.0) + duration
            counts[part] = counts.get(part, 0) + 1
    total, rounds = seconds.pop("round", 0.0), counts.pop("round", 0)
    seconds.pop("prefill", None)
    if not rounds:
        return []
    seconds["other"], counts["other"] = total - sum(seconds.values()), rounds
    order = sorted(seconds, key=lambda part: (_ORDER.index(part.partition("[")[0]), len(part), part))
    return [Share(part, counts[part], 1e3 * seconds[part] / rounds, seconds[part] / total) for part in order]


_ORDER = ("draft", "verify", "commit", "search", "other")


@contextmanager
def cuda_region() -> Generator[None, None, None]:
    """The region between cudaProfilerStart and cudaProfilerStop, with the GPU idle at both ends."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _advance(stream: Iterator[Chunk], rounds: int) -> None:
    """Take chunks until the first sequence has had one for each of `rounds`; its chunk comes first in every round."""
    for done in range(rounds):
        if not any(chunk.index == 0 for chunk in stream):
            raise RequestError(f"profile: the request ended {rounds - done} rounds early: lower --rounds or --warm-up")


def _ops(averages: Iterable[Any], on_gpu: bool) -> list[OpTime]:
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = [(op.key, op.count, getattr(op, clock) / 1e3) for op in averages if not _RANGE.fullmatch(op.key)]
    total = sum(spent for *_, spent in times) or 1.0
    highest = sorted(times, key=lambda op: -op[2])[:TOP_OPS]
    return [OpTime(name, count, spent, spent / total) for name, count, spent in highest]


def sheets(result: dict[str, Any]) -> tuple[Sheet, ...]:
    """The parts of a round, and the operations that take most."""
    what = f"{result['rounds']} rounds of {result['method']}, {result['sequences']} sequences"
    return (
        Sheet(
            f"A round: {title(result)}",
            ("part of a round", "ranges", "ms a round", "share"),
            tuple(_cells(one, "part", "round_ms") for one in result["parts"]),
        ),
        Sheet(
            f"Operations of rounds: {title(result)}",
            ("operation", "calls", "ms by itself", "share"),
            tuple(_cells(one, "name", "self_ms") for one in result["ops"]),
            (f"{what}. Measured on {where(result['machine'])}.",),
        ),
    )


def _cells(one: dict[str, Any], name: str, spent: str) -> tuple[str, ...]:
    return one[name], str(one["count"]), f"{one[spent]:.3f}", f"{one['share']:.1%}"
