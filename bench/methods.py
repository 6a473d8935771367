"""Methods against plain decoding, prompt by prompt: speed, acceptance, and the speed-up the acceptance would allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..loaders.config import ModelConfig
from ..loaders.synthetic import synthetic_config, synthetic_weights
from ..runtime.choices import dtype_of, place_of
from ..runtime.costs import weight_pass
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.prompts import Check
from ..runtime.request import Output, SamplingParams
from .prompts import Prompt, source
from .record import summarise

PLAIN = "autoregressive"
SYNTHETIC = "synthetic:"


@dataclass(frozen=True)
class Row:
    """One prompt with one method, run plain, method, plain: `speed` is the mean time of plain decoding ÷ its own.

    The method sees a prompt once: what it may remember of an answer must not draft it.
    The parts of a round are in units of a plainly decoded token: draft, verify, search and what is left.
    `depth` is the mean draft depth of a round; `ideal` the speed if a pass took its share of the weights and all else
    nothing: tokens a round ÷ (1 + draft passes a round × their share), a lookup being no pass.
    """

    method: str
    category: str
    tokens: int
    identical: bool
    speed: float
    rounds: int
    drafted: int
    accepted: int
    depth: float
    draft: float
    verify: float
    search: float
    other: float
    ideal: float


@dataclass(frozen=True)
class Line:
    """The rows of one method and category. Speeds are medians over prompts, with the 10th and 90th percentile."""

    method: str
    category: str
    prompts: int
    tokens: int
    identical: int
    speed: float
    speed_p10: float
    speed_p90: float
    ideal: float
    gap: str
    acceptance_rate: float
    mean_acceptance_length: float


def synthetic(model: str) -> tuple[str, float] | None:
    """Shape and scale of "synthetic:SHAPE[:LATE_SCALE]", whose late layers matter that much, as all do without it.

    None for any other model.

    Raises:
        RequestError: the scale is not a finite number.
    """
    if not model.startswith(SYNTHETIC):
        return None
    shape, colon, scale = model.removeprefix(SYNTHETIC).partition(":")
    try:
        late_scale = float(scale) if colon else 1.0
    except ValueError:
        late_scale = math.nan
    if not math.isfinite(late_scale):
        raise RequestError(f"MODEL: expected synthetic:SHAPE[:LATE_SCALE], a finite number, got {model!r}")
    return shape, late_scale


def load(
    model: str,
    dtype: str,
    method: str = PLAIN,
    *,
    device: str = "auto",
    backend: str = "auto",
    ranges: str | None = None,
    graphs: bool | None = None,
    cache_tokens: int | None = None,
    check: Check | None = None,
) -> Engine:
    """The engine of a model folder, "demo", or a synthetic model as `synthetic` reads it.

    `method` is the engine's own: a checkpoint made for one runs by no other. `check` is asked before weights are read.

    Raises:
        RequestError: a synthetic model is not spelled so, or there is no such device.
    """
    named = synthetic(model)
    if named is None:
        return Engine.load(
            model,
            dtype=dtype,
            method=method,
            device=device,
            backend=backend,
            ranges=ranges,
            graphs=graphs,
            cache_tokens=cache_tokens,
            check=check,
        )
    shape, late_scale = named
    config = ModelConfig.parse(synthetic_config(shape), model)
    if check is not None:
        check(config, None)
    place = place_of(device)
    weights = synthetic_weights(config, 0, dtype_of(dtype, config), late_scale, place)
    return Engine(
        config, weights, method=method, backend=backend, ranges=ranges, graphs=graphs, cache_tokens=cache_tokens
    )


def compare(
    engine: Engine,
    methods: Sequence[str],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    progress: Callable[[Row], None],
) -> list[Row]:
    """Every prompt with every method. A model without a tokenizer gets random token ids of the prompt's length."""
    rows: list[Row] = []
    if "triton" in engine.backend:
        # What is compiled or captured in a timed run would count as its decoding.
        engine.warm_up(methods, sequences=1)
    for method in (PLAIN, *methods):
        engine.generate([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True), method=method)
    for number, prompt in enumerate(prompts):
        for method in methods:
            rows.append(_row(engine, method, prompt, number, params))
            progress(rows[-1])
    return rows


def summary(rows: Sequence[Row]) -> list[Line]:
    """A line for every method and category, and one for all categories of a method."""
    return summarise(rows, _line)


def _row(engine: Engine, method: str, prompt: Prompt, number: int, params: SamplingParams) -> Row:
    given = source(prompt, engine.tokenizer, engine.config)

    def run(name: str) -> Output:
        return engine.generate(given, params, method=name)

    first, own, last = run(PLAIN), run(method), run(PLAIN)
    count = max(1, len(first.token_ids) - 1)
    plain = (first.stats.decode_s + last.stats.decode_s) / 2
    stats = own.stats
    per_token, rounds = plain / count, max(1, stats.rounds)

    def part(seconds: float) -> float:
        return seconds / rounds / per_token if per_token else 0.0

    depth = sum(stats.drafted_per_position) / rounds
    skipped = 2 * (stats.layers - stats.layers_kept)
    passes = stats.executed_skips / rounds / skipped if skipped else 0.0
    return Row(
        method,
        prompt.category,
        stats.completion_tokens,
        first.token_ids == own.token_ids == last.token_ids,
        plain / stats.decode_s if stats.decode_s else 1.0,
        stats.rounds,
        stats.drafted,
        stats.accepted,
        depth,
        part(stats.draft_s),
        part(stats.verify_s),
        part(stats.search_s),
        part(stats.other_s),
        stats.mean_acceptance_length / (passes * weight_pass(engine.config, stats.layers_kept) + 1),
    )


def _line(method: str, category: str, rows: Sequence[Row]) -> Line:
    speeds = [row.speed for row in rows]
    drafted, accepted = sum(row.drafted for row in rows), sum(row.accepted for row in rows)
    low, middle, high = (float(value) for value in np.percentile(speeds, (10, 50, 90)))
    return Line(
        method,
        category,
        len(rows),
        sum(row.tokens for row in rows),
        sum(row.identical for row in rows),
        middle,
        low,
        high,
        float(np.median([row.ideal for row in rows])),
        _gap(rows),
        accepted / drafted if drafted else 0.0,
        1 + accepted / max(1, sum(row.rounds for row in rows)),
    )


def _gap(rows: Sequence[Row]) -> str:
    """What a round spends beyond the ideal: the largest part, in units of a plainly decoded token."""
    parts = {
        "draft": float(np.median([row.draft - max(0.0, _accepted_length(row) / row.ideal - 1) for row in rows])),
        "verify": float(np.median([row.verify - 1 for row in rows])),
        "search": float(np.median([row.search for row in rows])),
        "other": float(np.median([row.other for row in rows])),
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name} +{parts[name]:.2f}" if parts[name] > 0.005 else "none"


def _accepted_length(row: Row) -> float:
    return 1 + row.accepted / max(1, row.rounds)
