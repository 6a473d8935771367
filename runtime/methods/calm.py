"""Confident early exit (CALM, arXiv 2207.07061): every token leaves the model at the first layer that is sure of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from ...kernels.host import ints
from ..batch import Batch
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Steps
from .base import expect_layers
from .checked import Checked, OneOf, Share, Within
from .policy import Policy, Step


@dataclass(frozen=True)
class Options(Checked, method="calm"):
    """A token leaves after the first layer whose confidence is `threshold` or more; asked are layer `least` (0: half of
    them) and every `interval`-th after it.

    `measure` state: the cosine of the residual streams before and after the layer; softmax: how far the most likely
    token is ahead of the next, by the final norm and the LM head, which costs reading the head. With `decay` τ above 0
    the threshold λ of generated token t is 0.9·λ + 0.1·exp(−τ·t/N), N being `length`.
    """

    threshold: Share = 0.99
    measure: Annotated[str, OneOf(("state", "softmax"))] = "state"
    least: Annotated[int, Within(0, 2**15)] = 0
    interval: Annotated[int, Within(1, 2**15)] = 1
    decay: Annotated[float, Within(0, 1000)] = 0.0
    length: Annotated[int, Within(1, 2**20)] = 128


@dataclass(frozen=True)
class Exits(Steps):
    """Steps that every token leaves where its confidence allows; its stream there stands for those of later layers."""

    options: Options
    plan: LayerPlan
    least: int

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return self.leave(model, cache, batch, watched=False)

    def leave(self, model: Model, cache: KVCache, batch: Batch, *, watched: bool) -> tuple[Tensor, Tensor]:
        """The residual stream [S, H] each token left with and how many sub-layers it ran, int64 [S].

        The keys and values of the layers it did not run are filled with those of that stream (state propagation).
        `watched` by the host, the pass ends with the last token, and has no mask as long as none has left.
        """
        laid, count, layers = model.lay(batch.newest(), cache), len(batch), self.plan.num_layers
        x, threshold = model.embed(laid), self._threshold(batch.length - batch.prompt)
        # The layers each row runs; as many as there are until it is sure.
        ran = torch.full_like(laid.real, layers, dtype=torch.int64)
        staying, before = None, 0
        for asked in [*range(self.least, layers, self.options.interval), layers]:
            active = None if staying is None else staying.expand(2 * layers, -1)
            own = laid._replace(rows=replace(laid.rows, active=active), masked=active is not None)
            model.run(own, cache, self.plan.between(before, asked - 1), x)
            entered, before = x[:count].clone(), asked
            model.run(own, cache, self.plan.between(asked - 1, asked), x)
            if asked == layers:
                break
            going = None if staying is None else staying[:count]
            sure = self._confidence(model, entered, x[:count], going) >= threshold
            ran[:count] = torch.where(sure & (ran[:count] == layers), asked, ran[:count])
            staying = laid.real & (ran == layers)
            if watched:
                number = ints(staying.sum()[None])[0]
                if number == 0:
                    break
                staying = staying if number < count else None
        layer = torch.arange(self.least, layers, device=x.device)[:, None]
        model.fill(laid, cache, range(self.least, layers), x, laid.real & (layer >= ran))
        return x[:count], 2 * ran[:count]

    def _threshold(self, token: Tensor) -> Tensor:
        """That of generated token `token` int64 [S], the first being 0: float64 [S]."""
        threshold = torch.full_like(token, self.options.threshold, dtype=torch.float64)
        if not self.options.decay:
            return threshold
        decayed = torch.exp(-self.options.decay * token.double() / self.options.length)
        return (0.9 * threshold + 0.1 * decayed).clamp(0, 1)

    def _confidence(self, model: Model, entered: Tensor, x: Tensor, going: Tensor | None) -> Tensor:
        """How sure a layer is that x [S, H] left and `entered` [S, H] did, float64 [S]; anything where not `going`."""
        if self.options.measure == "state":
            # In float64, so that how a sum is ordered, which differs with the number of rows, does not decide.
            return torch.cosine_similarity(entered.double(), x.double(), dim=-1)
        _, most, total = model.predict(x, top_k=2, active=going)
        first, second = torch.exp(most.double() - total.double()[:, None]).unbind(-1)
        return first - second


class Calm(Policy):
    """The prompt at full depth, every generated token up to the layer that is sure enough."""

    name = "calm"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        expect_layers(self.name, num_layers)
        options.expect("least", Within(0, num_layers - 1))
        self._steps = Exits(options, self._full, options.least or (num_layers + 1) // 2)

    @property
    def steps(self) -> Steps:
        return self._steps

    def step(self, model: Model, cache: KVCache, batch: Batch) -> Step:
        """Watched, where a pass without a mask is one call."""
        if model.joined is None:
            return super().step(model, cache, batch)
        hidden, ran = self._steps.leave(model, cache, batch, watched=True)
        used = [count / 2 for count in ints(ran)]
        return Step(hidden, used, max(used))
