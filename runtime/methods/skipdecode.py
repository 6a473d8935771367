"""SkipDecode (arXiv 2307.02628): the later in a text, the fewer layers a token runs, the same ones at every place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from ...kernels.host import ints
from ..batch import Batch
from ..cache import KVCache
from ..errors import RequestError
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Steps
from .checked import Checked, Within
from .policy import Policy, Step


@dataclass(frozen=True)
class Options(Checked, method="skipdecode"):
    """The first generated token runs `most` layers (0: all); up to token `length` that falls evenly to `least` (0: half
    of them), where it stays.

    What runs are the first `warm_up` layers and the last ones.
    """

    most: Annotated[int, Within(0, 2**15)] = 0
    least: Annotated[int, Within(0, 2**15)] = 0
    length: Annotated[int, Within(1, 2**20)] = 128
    warm_up: Annotated[int, Within(0, 2**15)] = 1


@dataclass(frozen=True)
class Decay(Steps):
    """Steps of ever fewer layers, of `num_layers`: `most` for the first token, `least` from token `length` on."""

    num_layers: int
    most: int
    least: int
    length: int
    warm_up: int

    def layers(self, token: Tensor) -> Tensor:
        """How many layers generated token `token` int64 [S], the first being 0, runs: int64 [S], halves rounded up."""
        gone = token.clamp(0, self.length) * (self.most - self.least)
        return self.most - (2 * gone + self.length - 1) // (2 * self.length)

    def runs(self, layers: Tensor) -> Tensor:
        """Which layers a token runs that runs so many, int64 [S]: bool [L, S]."""
        layer = torch.arange(self.num_layers, device=layers.device)[:, None]
        return (layer < self.warm_up) | (layer >= self.num_layers - layers + self.warm_up)

    def plan(self, layers: int) -> LayerPlan:
        """What a token runs that runs so many layers."""
        kept = torch.nonzero(self.runs(torch.tensor([layers]))[:, 0]).flatten()
        return LayerPlan.full(self.num_layers).keeping(ints(kept))

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        layers = self.layers(batch.length - batch.prompt)
        rows = replace(batch.newest(), mask=self.runs(layers).repeat_interleave(2, dim=0))
        return model.forward(rows, cache, LayerPlan.full(self.num_layers)), 2 * layers


class SkipDecode(Policy):
    """One number of layers for every place in a text, which falls: the prompt runs all of them.

    A token runs no layer that an earlier one left out, so that keys and values are there of all that it reads, and the
    sequences of a batch need not be at the same place.
    """

    name = "skipdecode"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        most = options.most or num_layers
        least = options.least or (most + 1) // 2
        if not options.warm_up <= least <= most <= num_layers:
            raise RequestError(
                f"method skipdecode: expected warm_up <= least <= most <= {num_layers} layers, got {options.warm_up}, "
                f"{least} and {most}"
            )
        self._steps = Decay(num_layers, most, least, options.length, options.warm_up)
        self._plans = {count: self._steps.plan(count) for count in range(least, most + 1)}

    @property
    def steps(self) -> Steps:
        return self._steps

    @property
    def plan(self) -> LayerPlan:
        """What the last tokens of a long text run."""
        return self._plans[self._steps.least]

    def step(self, model: Model, cache: KVCache, batch: Batch) -> Step:
        """Where all sequences are as far, and a pass without a mask is one call, without one."""
        layers = ints(self._steps.layers(torch.tensor([s.cached - len(s.prompt) for s in batch.sequences])))
        if len(set(layers)) > 1 or model.joined is None:
            return super().step(model, cache, batch)
        hidden = model.forward(batch.newest(), cache, self._plans[layers[0]])
        return Step(hidden, [float(count) for count in layers], layers[0])
