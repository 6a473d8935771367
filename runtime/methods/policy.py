"""What every lossy method is: a decode policy, which says how a prompt is read and how each next token's pass runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..prefill import read
from ..recipe import Recipe, Steps
from ..sequence import Sequence
from .base import Method


class Step(NamedTuple):
    """What a policy's pass left for S sequences.

    hidden [S, H]: the residual stream each one's next token is chosen from. used [S]: the layers' worth of sub-layers
    that ran for it. layers_read: the layers' worth of weights the pass took, however many rows shared them.
    """

    hidden: Tensor
    used: list[float]
    layers_read: float | None = None


class Policy(Method):
    """Plain decoding, one token a sequence and round, through the passes the policy chooses; nothing is verified.

    What it has to remember of a sequence lies in `Sequence.memory`.
    """

    lossless = False
    # The most tokens a sequence can get, in the long run, of one reading of all weights; None where routes decide.
    bound: float | None = None

    def read(self, model: Model, cache: KVCache, sequence: Sequence) -> Step:
        """Cache the prompt of one sequence, whatever else runs; S = 1."""
        raise NotImplementedError

    def step(self, model: Model, cache: KVCache, batch: Batch) -> Step:
        """The pass over each sequence's newest token, which writes what later passes will read of it."""
        raise NotImplementedError

    def memory(self, sequence: Sequence) -> Tensor | None:
        return sequence.memory

    def notes(self, executed_skips: int) -> list[str]:
        return [] if executed_skips else ["nothing was skipped: every layer ran for every token"]


@dataclass(frozen=True)
class PlannedSteps(Steps):
    """Steps of one plan, which every token runs."""

    plan: LayerPlan

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        ran = torch.full_like(batch.length, len(self.plan.sublayers))
        return model.forward(batch.newest(), cache, self.plan), ran


class Planned(Policy):
    """A policy that has decided beforehand: the plan `prompt` reads every prompt and `target` every token after it."""

    def read(self, model: Model, cache: KVCache, sequence: Sequence) -> Step:
        return Step(read(model, cache, sequence, self.prompt), [self.prompt.layers_kept])

    def step(self, model: Model, cache: KVCache, batch: Batch) -> Step:
        hidden = model.forward(batch.newest(), cache, self.target)
        return Step(hidden, [self.target.layers_kept] * len(batch), self.target.layers_kept)

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        return Recipe(self.target, self.target, steps=PlannedSteps(self.target))
