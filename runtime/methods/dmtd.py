"""Direct Multi-Token Decoding (arXiv 2510.11958): the thinking layers run once for several tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...loaders.config import Cycle, ModelConfig
from ..batch import Batch
from ..cache import KVCache
from ..costs import weight_pass
from ..errors import RequestError
from ..model import Model, Pass
from ..plan import LayerPlan
from ..prefill import prompt_rows
from ..sequence import Sequence
from .base import Method
from .policy import Policy, Step

_CHOICES = {
    "prefill": ("plain", "readd", "cyclic"),
    "phase": ("prompt", "absolute"),
    "history": ("real", "shadow"),
}
MAX_HORIZON = 64


@dataclass(frozen=True)
class Options:
    """The conventions in which published codes differ.

    `prefill`: what enters the decoding layers for a prompt token: t (plain), e + t (readd), or e with t at every
    position that is a multiple of the horizon (cyclic, as in training). `phase`: generated heads stand every horizon
    positions from the prompt's end (prompt) or from position 0 (absolute). `history`: a head fills the thinking layers'
    keys and values of the tokens before it (real), or they are never filled and never read (shadow). `horizon` 0 is
    the checkpoint's own.
    """

    prefill: str = "plain"
    phase: str = "prompt"
    history: str = "real"
    horizon: int = 0

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            value = getattr(self, option)
            if value not in choices:
                raise RequestError(f"method dmtd: option {option} expects {' or '.join(choices)}, got {value!r}")
        if not 0 <= self.horizon <= MAX_HORIZON:
            raise RequestError(f"method dmtd: option horizon expects 0 to {MAX_HORIZON}, got {self.horizon}")


@dataclass
class Memory:
    """e [1, H] of each token that still has to think, and how many heads there have been."""

    waiting: list[Tensor] = field(default_factory=list[Tensor])
    heads: int = 0


class DirectMultiToken(Policy):
    """Cycles of `horizon` tokens: the head's late input is e + t, that of the others e.

    e is the residual stream after the encoding layers, t after the thinking layers. A head takes the tokens that
    skipped the thinking layers through them with it, in one pass over their weights: their keys and values are the
    true ones, late by less than a cycle. `encoding`, `thinking` and `decoding` are the passes a token is made of.
    """

    name = "dmtd"
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

    def admits(self, running: list[Sequence]) -> bool:
        """At heads only, where cycles start with a prompt's end: sequences whose heads coincide share their passes."""
        return self._options.phase == "absolute" or all(self._is_head(sequence) for sequence in running)

    def read(self, model: Model, cache: KVCache, sequence: Sequence) -> Step:
        sequence.memory = Memory()
        hidden = torch.empty(0, device=model.device)
        for rows in prompt_rows(model, sequence):
            laid = model.lay(rows, cache)
            x = model.embed(laid)
            model.run(laid, cache, self.encoding, x)
            early = x.clone()
            model.run(laid, cache, self.thinking, x)
            x = self._late_prompt(laid, early, x)
            model.run(laid, cache, self.decoding, x)
            hidden = x[len(rows) - 1 : len(rows)]
        return Step(hidden, [self._full.layers_kept])

    def step(self, model: Model, cache: KVCache, batch: Batch) -> Step:
        laid = model.lay(batch.newest(), cache)
        x = model.embed(laid)
        model.run(laid, cache, self.encoding, x)
        early = x[: len(batch)].clone()
        entering = [self._entering(sequence, early[i : i + 1]) for i, sequence in enumerate(batch.sequences)]
        if any(entering):
            heads = torch.tensor([i for i, rows in enumerate(entering) if rows], device=model.device)
            x[heads] += self._think(model, cache, batch, entering)
        model.run(laid, cache, self.decoding, x)
        used = [self._full.layers_kept if rows else self.plan.layers_kept for rows in entering]
        return Step(x[: len(batch)], used, max(used))

    def _is_head(self, sequence: Sequence) -> bool:
        """Whether the sequence's newest token, the next to be read, starts a cycle."""
        start = len(sequence.prompt) if self._options.phase == "prompt" else 0
        return (sequence.cached - start) % self.horizon == 0

    def _late_prompt(self, laid: Pass, e: Tensor, t: Tensor) -> Tensor:
        """The late input of prompt rows [R, H]."""
        if self._options.prefill == "plain":
            return t
        if self._options.prefill == "readd":
            return e + t
        head = laid.rows.position % self.horizon == 0
        return torch.where(head[:, None], e + t, e)

    def _entering(self, sequence: Sequence, e: Tensor) -> list[Tensor]:
        """The rows that go through the thinking layers with the newest token, whose e is given; none but for a head."""
        memory: Memory = sequence.memory
        if not self._is_head(sequence):
            if self._options.history == "real":
                memory.waiting.append(e)
            return []
        entering, memory.waiting = [*memory.waiting, e], []
        memory.heads += 1
        return entering

    def _think(self, model: Model, cache: KVCache, batch: Batch, entering: list[list[Tensor]]) -> Tensor:
        """t [heads, H] of the heads of a batch; fills what their cycles have left open.

        Without refill the thinking layers hold the prompt and the heads, one after the other.
        """
        rows = batch.recent([len(own) for own in entering])
        if self._options.history == "shadow":
            place = [
                len(s.prompt) + s.memory.heads - 1 for s, own in zip(batch.sequences, entering, strict=True) if own
            ]
            rows = replace(rows, position=torch.tensor(place, device=model.device), angle=rows.position)
        thought = model.forward(rows, cache, self.thinking, torch.cat([e for own in entering for e in own]))
        last = torch.tensor([len(own) for own in entering if own], device=model.device).cumsum(0) - 1
        return thought[last]
