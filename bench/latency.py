"""Latencies of one engine under an event loop, as a service would embed it: first token, between tokens, and stalls."""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from ..runtime.engine import Engine
from ..runtime.methods import registry
from ..runtime.prompts import Prompt as Source
from ..runtime.request import SamplingParams
from .record import Sheet, Spread, title

BEAT_S = 0.002
DEFINITIONS = (
    "First token: from the request to its first token, waiting for other requests included. Between tokens: the time "
    "between two arrivals, spread over the tokens of the second, which a round of speculation delivers together. "
    "Pause: the time between two arrivals as a reader sees it.",
    f"Loop delay: how late a task that sleeps {BEAT_S * 1e3:g} ms on the same event loop woke up.",
    "Requests at the same time by one method share its rounds.",
)


@dataclass
class Arrivals:
    """What the tasks of one run noted, in seconds."""

    first: list[float] = field(default_factory=list[float])
    between: list[float] = field(default_factory=list[float])
    pauses: list[float] = field(default_factory=list[float])
    delays: list[float] = field(default_factory=list[float])
    token_ids: dict[int, list[int]] = field(default_factory=dict[int, list[int]])


@dataclass(frozen=True)
class Row:
    """One method at one concurrency; times are seconds. `identical` requests had the tokens of plain decoding."""

    method: str
    lossless: bool
    concurrency: int
    requests: int
    tokens: int
    identical: int
    tokens_per_s: float
    first_token: Spread | None
    between_tokens: Spread | None
    pause: Spread | None
    loop_delay: Spread | None


def measure(
    engine: Engine,
    methods: Sequence[str],
    concurrencies: Sequence[int],
    sources: Sequence[Source],
    params: SamplingParams,
    progress: Callable[[Row], None],
) -> list[Row]:
    """Every source once, with every method and at every concurrency, after a warm-up of each method."""
    plain = [engine.generate(source, params, method="autoregressive").token_ids for source in sources]
    rows: list[Row] = []
    for method in methods:
        lossless = engine.generate(sources[0], params, method=method).stats.lossless
        for concurrency in concurrencies:
            # A method that has seen the prompts may remember its answers: a new one has not.
            engine._methods().forget(registry.parse(method))  # pyright: ignore[reportPrivateUsage]
            engine.generate(sources[0], replace(params, max_tokens=2), method=method)
            with _nothing_old_collected():
                start = perf_counter()
                seen = asyncio.run(_serve(engine, method, concurrency, sources, params))
                seconds = perf_counter() - start
            tokens = sum(len(ids) for ids in seen.token_ids.values())
            rows.append(
                Row(
                    method,
                    lossless,
                    concurrency,
                    len(sources),
                    tokens,
                    sum(seen.token_ids[i] == ids for i, ids in enumerate(plain)),
                    tokens / seconds,
                    *(Spread.of(values) for values in (seen.first, seen.between, seen.pauses, seen.delays)),
                )
            )
            progress(rows[-1])
    return rows


@contextmanager
def _nothing_old_collected() -> Generator[None]:
    """As a service does that cares: what lives already is not searched for garbage, which stops every thread."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def sheet(result: dict[str, Any]) -> Sheet:
    """The rows as a table, milliseconds."""
    columns = (
        "method",
        "concurrent",
        "requests",
        "tokens/s",
        "first token p50/p90/p99/max, ms",
        "between tokens p50/p90/p99/max, ms",
        "pause p50/p99/max, ms",
        "loop delay p99/max, ms",
    )
    whole = ("p50", "p90", "p99", "max")
    rows = tuple(
        (
            row["method"],
            str(row["concurrency"]),
            str(row["requests"]),
            f"{row['tokens_per_s']:.1f}",
            _milliseconds(row["first_token"], whole),
            _milliseconds(row["between_tokens"], whole),
            _milliseconds(row["pause"], ("p50", "p99", "max")),
            _milliseconds(row["loop_delay"], ("p99", "max")),
        )
        for row in result["rows"]
    )
    return Sheet(f"Latency: {title(result)}, {result['max_tokens']} tokens", columns, rows, DEFINITIONS)


async def _serve(
    engine: Engine, method: str, concurrency: int, sources: Sequence[Source], params: SamplingParams
) -> Arrivals:
    seen = Arrivals()
    waiting = deque(enumerate(sources))
    heart = asyncio.create_task(_beat(seen))
    try:
        await asyncio.gather(*(_client(engine, method, waiting, params, seen) for _ in range(concurrency)))
    finally:
        heart.cancel()
    return seen


async def _client(
    engine: Engine, method: str, waiting: deque[tuple[int, Source]], params: SamplingParams, seen: Arrivals
) -> None:
    while waiting:
        number, source = waiting.popleft()
        ids = seen.token_ids[number] = []
        before = perf_counter()
        async for chunk in engine.astream(source, params, method=method):
            if not chunk.token_ids:
                continue
            now = perf_counter()
            passed, before = now - before, now
            if ids:
                seen.pauses.append(passed)
                seen.between += [passed / len(chunk.token_ids)] * len(chunk.token_ids)
            else:
                seen.first.append(passed)
            ids += chunk.token_ids


async def _beat(seen: Arrivals) -> None:
    while True:
        start = perf_counter()
        await asyncio.sleep(BEAT_S)
        seen.delays.append(perf_counter() - start - BEAT_S)


def _milliseconds(spread: dict[str, float] | None, points: Sequence[str]) -> str:
    return " / ".join(f"{1e3 * spread[point]:.1f}" for point in points) if spread else "none"
