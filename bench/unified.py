"""The first three experiments of Unified Layer Skipping (arXiv 2404.06954): patterns, batches, scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from ..runtime.costs import head_layers
from ..runtime.engine import Engine
from ..runtime.keep_sets import PATTERNS, keep_set
from ..runtime.prompts import Prompts
from ..runtime.request import SamplingParams
from . import agreement
from .prompts import Prompt, source

PLAIN = agreement.PLAIN
SPEEDUPS = (1.25, 1.5, 2.0, 3.0, 5.0)
SCALING = (2.0, 3.0, 5.0)
BATCHES = (1, 8)
SEEDS = (0, 1, 2)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Pattern:
    """A pattern of `kept` layers over the prompts of a category, scored along the full model's continuations.

    agreement: share of tokens the pattern would have chosen too; nll: mean negative log-likelihood of a token in nats.
    The first token of a continuation comes from the prompt, at full depth. Random is the mean of a few draws.
    """

    speedup: float
    pattern: str
    kept: int
    category: str
    tokens: int
    agreement: float
    nll: float


@dataclass(frozen=True)
class Batch:
    """`identical` of `prompts` got the tokens in a batch of `batch` that they get alone."""

    speedup: float
    batch: int
    prompts: int
    identical: int


@dataclass(frozen=True)
class Scale:
    """Decoding time of the full model ÷ that of the keep-set for the same number of tokens, in pairs.

    Every pair runs plain, unified, unified, plain; `measured` is the median, with the 10th and 90th percentile.
    `predicted` is (L + h)/(K + h) with the head worth h layers; `ratio` is measured ÷ predicted.
    """

    speedup: float
    batch: int
    kept: int
    of: int
    pairs: int
    plain_tokens_per_s: float
    tokens_per_s: float
    measured: float
    measured_p10: float
    measured_p90: float
    predicted: float
    ratio: float


def patterns(engine: Engine, prompts: Sequence[Prompt], max_tokens: int, progress: Progress) -> list[Pattern]:
    """Experiment 1: where the skipped layers lie. The full model is scored too, as "full" at speed-up 1."""
    layers = engine.config.num_layers
    cells = {PLAIN: (1.0, "full", layers)}
    for speedup in SPEEDUPS:
        kept = len(keep_set(layers, speedup))
        for pattern in PATTERNS:
            for seed in SEEDS if pattern == "random" else SEEDS[:1]:
                cells[f"unified:speedup={speedup},pattern={pattern},seed={seed}"] = (speedup, pattern, kept)
    done, total = 0, len(cells) * len(prompts)

    def tick(row: agreement.Row) -> None:
        nonlocal done
        done += 1
        if done % 10 == 0 or done == total:
            progress(f"patterns {done} of {total}")

    rows = agreement.compare(engine, list(cells), prompts, max_tokens, tick)
    names = {f"{speedup} {pattern}": (speedup, pattern, kept) for speedup, pattern, kept in cells.values()}
    named = [replace(row, method="{} {}".format(*cells[row.method])) for row in rows]
    return [
        Pattern(*names[line.method], line.category, line.tokens, line.agreement, line.nll)
        for line in agreement.summary(named)
    ]


def batches(engine: Engine, prompts: Sequence[Prompt], max_tokens: int, progress: Progress) -> list[Batch]:
    """Experiment 2: whether a batch gets the tokens its members get alone."""
    params, size = SamplingParams(max_tokens=max_tokens, ignore_eos=True), max(BATCHES)
    found: list[Batch] = []
    for speedup in SCALING:
        method, identical = f"unified:speedup={speedup}", 0
        for group in _groups(engine, prompts, size):
            together = engine.generate(group, params, method=method)
            alone = [engine.generate(prompt, params, method=method) for prompt in group]
            identical += sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
        found.append(Batch(speedup, size, len(prompts), identical))
        progress(f"batches {len(found)} of {len(SCALING)}")
    return found


def scaling(engine: Engine, prompts: Sequence[Prompt], max_tokens: int, pairs: int, progress: Progress) -> list[Scale]:
    """Experiment 3: the time that is saved, against plain decoding of the same prompts, `pairs` times each."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    found: list[Scale] = []
    for batch in BATCHES:
        several = [prompts[i % len(prompts)] for i in range(batch * pairs)]
        for speedup in SCALING:
            method = f"unified:speedup={speedup}"
            times = [_pair(engine, group, params, method) for group in _groups(engine, several, batch)]
            found.append(_scale(engine, speedup, batch, batch * (max_tokens - 1), np.array(times)))
            progress(f"scaling {len(found)} of {len(BATCHES) * len(SCALING)}")
    return found


def _pair(engine: Engine, prompts: Prompts, params: SamplingParams, method: str) -> tuple[float, float]:
    """Seconds of decoding, plain and by the method, each the mean of two runs in the order A B B A."""

    def seconds(name: str) -> float:
        return max(output.stats.decode_s for output in engine.generate(prompts, params, method=name))

    first, one, two, last = seconds(PLAIN), seconds(method), seconds(method), seconds(PLAIN)
    return (first + last) / 2, (one + two) / 2


def _scale(engine: Engine, speedup: float, batch: int, tokens: int, times: np.ndarray) -> Scale:
    """times [pairs, 2]: plain, unified."""
    layers, h = engine.config.num_layers, head_layers(engine.config)
    kept = len(keep_set(layers, speedup))
    low, middle, high = (float(value) for value in np.percentile(times[:, 0] / times[:, 1], (10, 50, 90)))
    plain, own = (float(tokens / seconds) for seconds in np.median(times, axis=0))
    predicted = (layers + h) / (kept + h)
    return Scale(speedup, batch, kept, layers, len(times), plain, own, middle, low, high, predicted, middle / predicted)


def _groups(engine: Engine, prompts: Iterable[Prompt], size: int) -> list[Prompts]:
    """The prompts, `size` at a time."""
    sources = iter([source(prompt, engine.tokenizer, engine.config) for prompt in prompts])
    groups: list[Prompts] = []
    while group := list(islice(sources, size)):
        groups.append(group)
    return groups
