"""Finding a set of sub-layers the model can draft without (SWIFT, arXiv 2410.06916, §4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .cache import KVCache
from .model import Model
from .plan import LayerPlan
from .rows import one_sequence


def matchness(model: Model, cache: KVCache, pages: list[int], tokens: list[int], window: int, plan: LayerPlan) -> float:
    """Share of the last `window` tokens that `plan` predicts, teacher-forced, after the full model's own cache.

    One pass over the window on a fork of the sequence: the full model's keys and values before the window are shared,
    those of the window are the sub-network's own and are thrown away. `tokens` lie in `pages`.
    """
    start = len(tokens) - window - 1
    fork = cache.fork(pages, start, len(tokens))
    try:
        rows = one_sequence(tokens[start:-1], start, fork, model.ops.prefill_tile, model.device)
        predicted = model.predict(model.forward(rows, cache, plan)).token
    finally:
        cache.release(fork)
    return float((predicted == torch.tensor(tokens[start + 1 :], device=model.device)).float().mean())


@dataclass
class Incumbent:
    """The best set so far and its score on the window it was last measured on."""

    plan: LayerPlan
    score: float = -1.0


@dataclass
class RandomSearch:
    """Uniform random skip sets of a fixed size over the sub-layers of layers 1 to L - 2, the best one kept.

    `size` = int(D·ratio) of the D = 2(L - 2) sub-layers are skipped. A candidate replaces the incumbent at once when
    it scores higher. The search is over when the incumbent scores above `max_score`, after `patience` candidates
    without improvement, or after `max_candidates`.
    """

    num_layers: int
    ratio: float
    max_score: float
    patience: int
    max_candidates: int
    seed: int
    incumbent: Incumbent = field(init=False)
    candidates: int = 0
    since_improvement: int = 0
    events: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self.incumbent = Incumbent(initial_plan(self.num_layers) if self.size else LayerPlan.full(self.num_layers))

    @property
    def dimensions(self) -> int:
        return max(0, 2 * (self.num_layers - 2))

    @property
    def size(self) -> int:
        """Sub-layers a candidate skips."""
        return int(self.dimensions * self.ratio)

    @property
    def finished(self) -> bool:
        return (
            self.size == 0
            or self.incumbent.score > self.max_score
            or self.since_improvement >= self.patience
            or self.candidates >= self.max_candidates
        )

    def suggest(self) -> LayerPlan:
        """The next candidate."""
        chosen = self._random.choice(self.dimensions, self.size, replace=False)
        return plan_of(self.num_layers, chosen.tolist())

    def remeasure(self, score: float) -> None:
        """The incumbent's score on a new window: a best score from another window would be a lucky one."""
        self.incumbent.score = score

    def record(self, plan: LayerPlan, score: float, tokens: int) -> None:
        """A candidate's score, measured when `tokens` tokens had been generated; swaps it in if it is the best."""
        swapped = score > self.incumbent.score
        self.candidates += 1
        self.since_improvement = 0 if swapped else self.since_improvement + 1
        if swapped:
            self.incumbent = Incumbent(plan, score)
        self.events.append(
            {
                "iteration": self.candidates,
                "kind": "random",
                "score": score,
                "best": self.incumbent.score,
                "swapped": swapped,
                "tokens": tokens,
            }
        )


def initial_plan(num_layers: int) -> LayerPlan:
    """Layers 1, 3, 5, … below L - 1 skipped, both sub-layers."""
    odd = range(1, num_layers - 1, 2)
    return LayerPlan.full(num_layers).without(attention=odd, mlp=odd)


def plan_of(num_layers: int, skipped: list[int]) -> LayerPlan:
    """The plan of a skip vector's ones: i below L - 2 is the attention of layer i + 1, the rest are MLPs."""
    inner = num_layers - 2
    return LayerPlan.full(num_layers).without(
        attention=[i + 1 for i in skipped if i < inner], mlp=[i - inner + 1 for i in skipped if i >= inner]
    )
