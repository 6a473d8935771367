"""Direct Multi-Token Decoding (arXiv 2510.11958): the thinking layers run once for several tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from ...loaders.config import Cycle, ModelConfig
from ..batch import Batch
from ..cache import KVCache
from ..costs import weight_pass
from ..errors import RequestError
from ..laid import Pass
from ..model import Model
from ..plan import LayerPlan
from ..prefill import Reading, prompt_rows
from ..recipe import Steps
from ..sequence import Sequence
from .base import Method
from .checked import Checked, OneOf, Within
from .policy import Policy, Step


@dataclass(frozen=True)
class Options(Checked, method="dmtd"):
    """The conventions in which published codes differ.

    `prefill`: what enters the decoding layers for a prompt token: t (plain), e + t (readd), or e with t at every
    position that is a multiple of the horizon (cyclic, as in training). `phase`: generated heads stand every horizon
    positions from the prompt's end (prompt) or from position 0 (absolute). `history`: a head fills the thinking layers'
    keys and values of the tokens before it (real), or they are never filled and never read (shadow). `horizon` 0 is
    the checkpoint's own.
    """

    prefill: Annotated[str, OneOf(("plain", "readd", "cyclic"))] = "plain"
    phase: Annotated[str, OneOf(("prompt", "absolute"))] = "prompt"
    history: Annotated[str, OneOf(("real", "shadow"))] = "real"
    horizon: Annotated[int, Within(0, 64)] = 0


@dataclass(frozen=True)
class Cycles(Steps):
    """The cycles of `DirectMultiToken`, on the device one a round.

    The memory of a sequence is e [τ, H] of its last τ tokens, by their places in a cycle. `refill`: a head takes the
    tokens of the cycle before it through the thinking layers with it. Where cycles start with prompts (`aligned`) all
    sequences have their heads in the first step of a round; elsewhere in any, and the host says which: step 0.
    """

    encoding: LayerPlan
    thinking: LayerPlan
    decoding: LayerPlan
    horizon: int
    aligned: bool
    refill: bool

    @property
    def count(self) -> int:
        return self.horizon

    def memory(self, model: Model, sequences: int) -> Tensor:
        shape = (sequences, self.horizon, model.config.hidden_size)
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        laid = model.lay(batch.newest(), cache)
        x = model.embed(laid)
        model.run(laid, cache, self.encoding, x)
        e, each = x[: len(batch)], torch.arange(len(batch), device=batch.device)
        place = (batch.length - self._start(batch)) % self.horizon
        memory[each, place] = e
        head = place == 0
        own = len(self.encoding.sublayers) + len(self.decoding.sublayers)
        ran = torch.where(head, own + len(self.thinking.sublayers), own)
        if number == 0 or (not self.aligned and batch.alone):
            t = self._think(model, cache, batch, memory, head)
            e.copy_(torch.where(head[:, None], e + t, e))
        model.run(laid, cache, self.decoding, x)
        return x[: len(batch)], ran

    def _start(self, batch: Batch) -> Tensor:
        """Where the cycles of each sequence are counted from, int64 [S]."""
        return batch.prompt if self.aligned else torch.zeros_like(batch.prompt)

    def _think(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, head: Tensor) -> Tensor:
        """t [S, H] of each sequence that is at a `head`; fills what its last cycle has left open."""
        start, generated = self._start(batch), batch.length - batch.prompt + 1
        width = self.horizon if self.refill else 1
        count = torch.where(head, generated.clamp(max=width), 0)
        first = batch.length - generated.clamp(max=width) + 1
        chains = batch.rows(batch.last[:, None].expand(-1, width), first, count)
        if self.refill:
            # Where cycles do not begin together, a step of the device may be nobody's head: then no weight is read.
            rows = replace(chains, gated=not self.aligned and batch.alone)
        else:
            rows = chains.spread()
            heads = (batch.length - start) // self.horizon - (batch.prompt - start - 1) // self.horizon
            place = torch.where(rows.sequence >= 0, batch.prompt + heads - 1, 0)
            rows = replace(rows, position=place, angle=rows.position)
        at = (first[:, None] + torch.arange(width, device=batch.device) - start[:, None]) % self.horizon
        each = torch.arange(len(batch), device=batch.device)
        entering = memory[each[:, None], at]
        thought = model.forward(rows, cache, self.thinking, entering.flatten(0, 1)).view(entering.shape)
        return thought[each, (count - 1).clamp(min=0)]


class DirectMultiToken(Policy):
    """Cycles of `horizon` tokens: the head's late input is e + t, that of the others e.

    e is the residual stream after the encoding layers, t after the thinking layers. A head takes the tokens that
    skipped the thinking layers through them with it, in one pass over their weights: their keys and values are the
    true ones, late by less than a cycle. `encoding`, `thinking` and `decoding` are the passes a token is made of.
    """

    name = "dmtd"
    options = Options
    checkpoints = ("mtpqwen3", "dmtdqwen3")

    def __init__(self, options: Options, num_layers: int, cycle: Cycle) -> None:
        super().__init__(options, num_layers)
        self._options, self._cycle = options, cycle
        self.horizon = options.horizon or cycle.horizon
        self.period = self.horizon + 1
        think = cycle.encoding + cycle.thinking
        self.encoding = self._full.between(0, cycle.encoding)
        self.thinking = self._full.between(cycle.encoding, think)
        self.decoding = self._full.between(think, num_layers)

    @classmethod
    def fit(cls, options: Any, config: ModelConfig) -> Method:
        cycle = config.cycle
        if cycle is None:
            raise RequestError(f"method dmtd: expected a model split into cycles, got {config.model_type}")
        if options.history == "shadow" and cycle.encoding:
            raise RequestError(
                f"method dmtd: history=shadow expects a model without encoding layers, got {cycle.encoding} of them"
            )
        if options.history == "shadow" and config.window is not None:
            raise RequestError("method dmtd: history=shadow expects a model without a sliding window, got one")
        method = cls(options, config.num_layers, cycle)
        method.bound = method.horizon / sum(weight_pass(config, layers) for layers in method.layers_by_token)
        return method

    @property
    def layers_by_token(self) -> list[float]:
        """The layers whose weights each token of a cycle reads."""
        return [self._full.layers_kept] + [self.plan.layers_kept] * (self.horizon - 1)

    @property
    def plan(self) -> LayerPlan:
        """What a token that is not a head runs."""
        thinking = range(self._cycle.encoding, self._cycle.encoding + self._cycle.thinking)
        return self._full.without(attention=thinking, mlp=thinking)

    @property
    def steps(self) -> Steps:
        options = self._options
        aligned, refill = options.phase == "prompt", options.history == "real"
        return Cycles(self.encoding, self.thinking, self.decoding, self.horizon, aligned, refill)

    def number(self, sequences: list[Sequence]) -> int:
        return 0 if any(map(self._is_head, sequences)) else 1

    def admits(self, running: list[Sequence]) -> bool:
        """At heads only, where cycles start with a prompt's end: sequences whose heads coincide share their passes."""
        return self._options.phase == "absolute" or all(self._is_head(sequence) for sequence in running)

    def unites(self, sequences: list[Sequence]) -> bool:
        """As `admits`: where all are at the same place of their cycles."""
        return self._options.phase == "absolute" or len({self._place(sequence) for sequence in sequences}) == 1

    def read(self, model: Model, cache: KVCache, sequence: Sequence) -> Reading[Step]:
        shape = (self.horizon, model.config.hidden_size)
        sequence.memory = torch.zeros(shape, dtype=model.dtype, device=model.device)
        hidden = torch.empty(0, device=model.device)
        for rows in prompt_rows(model, sequence):
            yield len(rows)
            laid = model.lay(rows, cache)
            x = model.embed(laid)
            model.run(laid, cache, self.encoding, x)
            early = x.clone()
            model.run(laid, cache, self.thinking, x)
            x = self._late_prompt(laid, early, x)
            model.run(laid, cache, self.decoding, x)
            hidden = x[len(rows) - 1 : len(rows)]
        return Step(hidden, [self._full.layers_kept])

    def _is_head(self, sequence: Sequence) -> bool:
        """Whether the sequence's newest token, the next to be read, starts a cycle."""
        return self._place(sequence) == 0

    def _place(self, sequence: Sequence) -> int:
        """Where the sequence's newest token stands in its cycle."""
        start = len(sequence.prompt) if self._options.phase == "prompt" else 0
        return (sequence.cached - start) % self.horizon

    def _late_prompt(self, laid: Pass, e: Tensor, t: Tensor) -> Tensor:
        """The late input of prompt rows [R, H]."""
        if self._options.prefill == "plain":
            return t
        if self._options.prefill == "readd":
            return e + t
        head = laid.rows.position % self.horizon == 0
        return torch.where(head[:, None], e + t, e)
