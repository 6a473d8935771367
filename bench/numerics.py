"""What fast numerics changes: texts and logits against exact numerics, and the time it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.engine import Engine
from ..runtime.prefill import prefill_chunk
from ..runtime.request import Output, SamplingParams
from ..runtime.rows import one_sequence
from .prompts import Prompt, source
from .record import Sheet, title, where

METHODS = ("autoregressive", "lookup")
PASSES = (1, 8, 16)
# Of ‖Δ‖ ÷ ‖logits‖: what rounding comes to over all layers of a model, generously.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Gap:
    """The logits of given texts, read in passes of `rows` rows, by fast numerics against exact ones.

    `changed` of the `tokens` most likely tokens are others; `largest` and `mean` |Δ| are over every logit, `relative`
    is the norm of all Δ ÷ that of all logits.
    """

    rows: int
    tokens: int
    changed: int
    largest: float
    mean: float
    relative: float


@dataclass(frozen=True)
class Row:
    """One prompt with one method, run exact, fast, fast, exact: speeds are exact times ÷ fast ones.

    `shared` of the `tokens` of the exact text come before the first token that differs; all where none does.
    """

    method: str
    category: str
    tokens: int
    shared: int
    identical: bool
    speed: float
    prompt_speed: float


@dataclass(frozen=True)
class Line:
    """The rows of one method. Speeds are medians over prompts, with the 10th and 90th percentile."""

    method: str
    prompts: int
    identical: int
    tokens: int
    shared: int
    first_difference: int | None
    speed: float
    speed_p10: float
    speed_p90: float
    prompt_speed: float


def gaps(exact: Engine, fast: Engine, prompts: Sequence[Prompt], max_tokens: int) -> list[Gap]:
    """How far the logits are apart along what exact decoding says to each prompt, for every size of pass."""
    texts = [
        exact.generate(source(prompt, exact.tokenizer, exact.config), SamplingParams(max_tokens=max_tokens))
        for prompt in prompts
    ]
    found: list[Gap] = []
    for rows in PASSES:
        tokens = changed = entries = 0
        largest = total = squares = norm = 0.0
        for text in texts:
            a, b = (logits(engine, text.prompt_ids, text.token_ids, rows) for engine in (exact, fast))
            difference = (a - b).abs()
            tokens, entries = tokens + len(a), entries + a.numel()
            changed += int((a.argmax(dim=1) != b.argmax(dim=1)).sum())
            largest, total = max(largest, float(difference.max())), total + float(difference.sum())
            squares, norm = squares + float(difference.square().sum()), norm + float(a.square().sum())
        found.append(Gap(rows, tokens, changed, largest, total / entries, (squares / norm) ** 0.5))
    return found


def logits(engine: Engine, prompt: list[int], given: list[int], rows: int) -> Tensor:
    """What each of the `given` tokens was chosen from, float64 [T, V] on the CPU, read in passes of `rows` rows."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    text, ops, chunk = prompt + given[:-1], model.ops, prefill_chunk(model.device)
    parts = [(at, min(at + chunk, len(prompt))) for at in range(0, len(prompt), chunk)]
    parts += [(at, min(at + rows, len(text))) for at in range(len(prompt), len(text), rows)]
    found: list[Tensor] = []
    with engine._turn, torch.inference_mode():  # pyright: ignore[reportPrivateUsage]
        pages = cache.reserve(len(text))
        try:
            for first, end in parts:
                asked = end <= len(prompt)
                tile, length = (ops.prefill_tile, len(prompt)) if asked else (ops.decode_tile, None)
                laid = one_sequence(text[first:end], first, pages, tile, model.device, prompt=length)
                hidden = model.forward(laid, cache, model.full)
                if end >= len(prompt):
                    found.append(model.logits(hidden[-1:] if asked else hidden).double().cpu())
        finally:
            cache.release(pages)
    return torch.cat(found)


def trusted(found: Iterable[Gap], dtype: torch.dtype) -> bool:
    """Whether the logits differ by no more than rounding."""
    return all(gap.relative <= ROUNDING[dtype] for gap in found)


def compare(
    exact: Engine,
    fast: Engine,
    methods: Sequence[str],
    prompts: Sequence[Prompt],
    max_tokens: int,
    progress: Callable[[Row], None],
) -> list[Row]:
    """Every method on every prompt with both."""
    rows: list[Row] = []
    for method in methods:
        for prompt in prompts:
            rows.append(_row(exact, fast, method, prompt, SamplingParams(max_tokens=max_tokens)))
            progress(rows[-1])
    return rows


def summary(rows: Sequence[Row]) -> list[Line]:
    """A line for every method."""
    return [
        _line(method, [row for row in rows if row.method == method]) for method in dict.fromkeys(r.method for r in rows)
    ]


def sheets(result: dict[str, Any]) -> tuple[Sheet, Sheet]:
    """`bench numerics`: texts and speeds by method, logits by rows of a pass."""
    columns = ("method", "texts equal", "tokens before they differ", "first", "speed ÷ exact", "p10–p90", "of prompts")
    texts = tuple(
        (
            line["method"],
            f"{line['identical']} of {line['prompts']}",
            f"{line['shared']} of {line['tokens']}",
            "-" if line["first_difference"] is None else str(line["first_difference"]),
            f"{line['speed']:.2f}",
            f"{line['speed_p10']:.2f}–{line['speed_p90']:.2f}",
            f"{line['prompt_speed']:.2f}",
        )
        for line in result["summary"]
    )
    measured = f"Measured on {where(result['machine'])}."
    notes = ("Exact, fast, fast, exact for each prompt; medians over prompts of exact time ÷ fast time.", measured)
    logit = ("rows a pass", "most likely token changed", "largest |Δ logit|", "mean |Δ logit|", "‖Δ‖ ÷ ‖logits‖")
    gap = tuple(
        (
            str(line["rows"]),
            f"{line['changed']} of {line['tokens']}",
            *(f"{line[name]:.2g}" for name in ("largest", "mean", "relative")),
        )
        for line in result["gaps"]
    )
    name = title(result)
    return Sheet(f"Fast numerics: {name}", columns, texts, notes), Sheet(
        f"Fast logits: {name}", logit, gap, (measured,)
    )


def _row(exact: Engine, fast: Engine, method: str, prompt: Prompt, params: SamplingParams) -> Row:
    given = source(prompt, exact.tokenizer, exact.config)
    runs: list[Output] = [engine.generate(given, params, method=method) for engine in (exact, fast, fast, exact)]
    (a, b), text, other = (runs[0].stats, runs[1].stats), runs[0].token_ids, runs[1].token_ids
    shared = next((i for i, (x, y) in enumerate(zip(text, other, strict=False)) if x != y), min(len(text), len(other)))

    def per_token(output: Output) -> float:
        return output.stats.decode_s / max(1, output.stats.completion_tokens - 1)

    times = [per_token(run) for run in runs]
    reading = [run.stats.prefill_s for run in runs]
    return Row(
        method,
        prompt.category,
        a.completion_tokens,
        shared,
        text == other,
        (times[0] + times[3]) / (times[1] + times[2]) if b.decode_s else 1.0,
        (reading[0] + reading[3]) / (reading[1] + reading[2]),
    )


def _line(method: str, rows: Sequence[Row]) -> Line:
    low, middle, high = (float(value) for value in np.percentile([row.speed for row in rows], (10, 50, 90)))
    return Line(
        method,
        len(rows),
        sum(row.identical for row in rows),
        sum(row.tokens for row in rows),
        sum(row.shared for row in rows),
        min((row.shared for row in rows if not row.identical), default=None),
        middle,
        low,
        high,
        float(np.median([row.prompt_speed for row in rows])),
    )
