"""What fixes the shapes and the kernels of a round that the device runs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .adapter import Adapter
from .batch import Batch
from .cache import KVCache
from .model import Model
from .plan import LayerPlan
from .sequence import Sequence, most_logprobs


@dataclass(frozen=True)
class Steps:
    """The steps of a lossy policy: the device alone takes `count` of them a round, a token each, the host one.

    Equal steps share their graphs. `whole`: a step reads the weights of the layers of whoever runs most of them; where
    that is false every row decides for itself, and nobody counts.
    """

    whole: ClassVar[bool] = True

    @property
    def count(self) -> int:
        return 1

    def memory(self, model: Model, sequences: int) -> Tensor:
        """Room for what the method's `memory` keeps of each of S `sequences`, [S, …]."""
        return torch.empty(sequences, 0, device=model.device)

    def serves(self, wanted: Steps) -> bool:
        """Whether they do for the `wanted` ones too, while the graph of those is still to be built."""
        return self == wanted

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The pass over each sequence's newest token, the `number`-th of its round; nothing is asked of the host.

        Returns the residual stream [S, H] the next tokens are chosen from and how many sub-layers ran for each
        sequence, int64 [S]. `memory` [S, …] is changed in place.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Ngrams:
    """A draft from the text so far, by matches of at most `longest` tokens; see `ngrams.newest` and, with so many
    `votes`, `ngrams.likeliest`, which also grows a `tree` and looks in the newest `remember` tokens of other texts."""

    longest: int
    votes: int | None = None
    remember: int = 0
    tree: bool = False


@dataclass(frozen=True)
class Recipe:
    """What fixes the shapes and the kernels of a round.

    The draft has `num_draft_tokens` steps of `plan`. Where the skip set will not stay (`masked`), the plan is the whole
    model and the set lies in `State.mask`, so that changing it changes no launch; where the draft's length will not
    (`limited`), it is `State.limit` tokens at most, and the steps beyond launch and exit. `confident`: a draft ends
    with the first token less probable than `State.threshold`. `reuse`: verification goes on from the streams of the
    draft, whose plan is an early exit; with an `adapter` tokens are drafted after it. `rejection`: drafts are sampled,
    with noise of their own, and accepted by rejection sampling. Drafts come from the first `vocabulary` tokens, 0 being
    all, and with matrices in eight bits where it is `quantised`. With `max_nodes` they are trees of up to so many
    tokens, a depth a step; 0 are chains. With `ngrams` the draft comes from the text so far and no pass is run for it;
    with `steps` nothing is drafted: they are a lossy policy's.

    `reshaped`: penalties, a bias or a minimum length change the logits. `logprobs`: the report tells the probability of
    every token and of so many most likely ones. With either, greedy tokens are `sampled` at a temperature of 0.
    """

    target: LayerPlan
    plan: LayerPlan
    num_draft_tokens: int = 0
    masked: bool = False
    limited: bool = False
    confident: bool = False
    reuse: bool = False
    sampled: bool = False
    rejection: bool = False
    vocabulary: int = 0
    max_nodes: int = 0
    ngrams: Ngrams | None = None
    steps: Steps | None = None
    adapter: Adapter | None = None
    quantised: bool = False
    reshaped: bool = False
    logprobs: int | None = None

    def choosing(self, sequences: list[Sequence], vocabulary: int) -> Recipe:
        """The recipe that chooses the tokens of these sequences as they ask for, of a vocabulary of this size.

        It tells at least as many log-probabilities as they want: a power of two, so that few recipes are needed.
        """
        top, params = most_logprobs(sequences), [sequence.params for sequence in sequences]
        reshaped = any(p.reshapes_logits for p in params)
        written = reshaped or top is not None or any(not p.greedy for p in params)
        if top:
            top = min(vocabulary, 1 << (top - 1).bit_length())
        return replace(self, sampled=written, reshaped=reshaped, logprobs=top)

    @property
    def any_set(self) -> Recipe | None:
        """The recipe that drafts with the same skip set as a mask; None where there is no such set."""
        if not self.num_draft_tokens or self.ngrams or self.reuse or self.plan.span != self.target.span:
            return None
        return replace(self, plan=self.target, masked=True)
