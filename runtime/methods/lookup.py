"""Prompt lookup decoding: the draft is what followed the last few tokens when they were seen before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from ..batch import Batch, Draft
from ..cache import KVCache
from ..errors import RequestError
from ..model import Model
from .base import Method
from .drafting import acceptance


@dataclass(frozen=True)
class Options:
    """Drafts of `num_draft_tokens` after a match of the last `max_ngram` tokens or fewer, down to one."""

    num_draft_tokens: int = 7
    max_ngram: int = 3
    acceptance: str = "coupled"

    def __post_init__(self) -> None:
        for option, high in (("num_draft_tokens", 64), ("max_ngram", 16)):
            value = getattr(self, option)
            if not 1 <= value <= high:
                raise RequestError(f"method lookup: option {option} expects 1 to {high}, got {value}")
        acceptance("lookup", self.acceptance)


class Lookup(Method):
    """Drafts from the prompt and the text so far, at no cost to the model."""

    name = "lookup"

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        self._options = options
        self.rejection = options.acceptance == "rejection"

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        k, ngram = self._options.num_draft_tokens, self._options.max_ngram
        with model.mark("draft", len(batch), 0, 0):
            drafts = [continuation(s.tokens, ngram, max(0, min(k, s.room))) for s in batch.sequences]
        width = max(map(len, drafts))
        tokens = torch.tensor([draft + [0] * (width - len(draft)) for draft in drafts], device=batch.device)
        return Draft(tokens.long(), torch.tensor([len(draft) for draft in drafts], device=batch.device))


def continuation(tokens: list[int], max_ngram: int, count: int) -> list[int]:
    """What followed the most recent earlier occurrence of the longest n-gram that ends `tokens`; [] without one."""
    return match(tokens, max_ngram, count)[1]


def match(tokens: list[int], max_ngram: int, count: int) -> tuple[int, list[int]]:
    """The length of the longest n-gram that ends `tokens` and was there before, and what followed it: `count` tokens.

    The most recent occurrence counts; 0 and [] without one. Where the text runs out before `count` tokens, it is taken
    to repeat from the match on.
    """
    text = np.asarray(tokens)
    for n in range(min(max_ngram, len(tokens) - 1), 0, -1):
        ends = np.flatnonzero((sliding_window_view(text[:-1], n) == text[-n:]).all(axis=1)) + n
        if len(ends):
            start = int(ends[-1])
            return n, [tokens[start + i % (len(tokens) - start)] for i in range(count)]
    return 0, []
