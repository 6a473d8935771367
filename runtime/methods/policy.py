"""What every lossy method is: a decode policy, which says how a prompt is read and how each next token's pass runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.host import ints
from ..batch import Batch
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..prefill import Reading, read
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

    def read(self, model: Model, cache: KVCache, sequence: Sequence) -> Reading[Step]:
        """Cache the prompt of one sequence, by the plan `prompt`, whatever else runs; S = 1."""
        hidden = yield from read(model, sequence, partial(self.prompt_pass, model, cache))
        return Step(hidden, [self.prompt.layers_kept])

    @property
    def plain_prompts(self) -> bool:
        return type(self).read is Policy.read

    @property
    def steps(self) -> Steps:
        """The passes over each sequence's newest token, which write what later passes will read of it."""
        raise NotImplementedError

    def number(self, sequences: list[Sequence]) -> int:
        """Which step of its round the next one of these sequences is, as the device would count it."""
        return 0

    def step(self, model: Model, cache: KVCache, batch: Batch) -> Step:
        """The step that is due, steered by the host: as the device takes it alone."""
        steps, own = self.steps, [self.memory(sequence) for sequence in batch.sequences]
        kept = [memory for memory in own if memory is not None]
        memory = torch.stack(kept) if kept else steps.memory(model, len(batch))
        hidden, ran = steps.step(model, cache, batch, memory, self.number(batch.sequences))
        for row, one in enumerate(kept):
            one.copy_(memory[row])
        used = [count / 2 for count in ints(ran)]
        return Step(hidden, used, max(used) if steps.whole else None)

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        return Recipe(self.target, self.plan, steps=self.steps)

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

    def notes(self, executed_skips: int) -> list[str]:
        """What is skipped in prompts, or in tokens that never came, is skipped too."""
        whole = LayerPlan.full(self.plan.num_layers)
        return super().notes(executed_skips) if self.prompt == whole == self.target else []

    @property
    def steps(self) -> Steps:
        return PlannedSteps(self.target)
