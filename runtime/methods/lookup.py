"""Prompt lookup decoding: the draft is what followed the last few tokens where they were seen before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..batch import Batch, Draft, Tally
from ..cache import KVCache
from ..errors import RequestError
from ..model import Model
from ..ngrams import MOST, Guess, Memory, Text, likeliest, newest
from ..recipe import Ngrams, Recipe
from ..sequence import Sequence as Continuation
from .base import Method, sampled
from .checked import Acceptance, Checked, DraftTokens, OneOf, Within


@dataclass(frozen=True)
class Options(Checked, method="lookup"):
    """Drafts of `num_draft_tokens` after a match of the last `max_ngram` tokens or fewer, down to one.

    `choose` newest drafts what followed the most recent of the longest matches, likeliest what followed most of the
    matches by their length, as a `tree` of that many nodes if asked for, and looks also in the newest `remember` tokens
    of earlier answers of this engine.
    """

    num_draft_tokens: DraftTokens = 7
    max_ngram: Annotated[int, Within(1, 16)] = 3
    choose: Annotated[str, OneOf(("newest", "likeliest"))] = "newest"
    tree: bool = False
    remember: Annotated[int, Within(0, 10**6)] = 0
    acceptance: Acceptance = "coupled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choose == "newest" and (self.tree or self.remember):
            raise RequestError("method lookup: options tree and remember expect choose=likeliest, got newest")


class Lookup(Method):
    """Drafts from the prompt and the text so far, at no cost to the model."""

    name = "lookup"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        self._options = options
        self.rejection = options.acceptance == "rejection"
        self.tree = options.tree
        self._memory = Memory(options.remember)

    @property
    def widest(self) -> int:
        return self._options.num_draft_tokens

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        with model.mark("draft", len(batch), 0, 0):
            guesses = [self._guess(sequence) for sequence in batch.sequences]
        return lay_out(batch, guesses, tree=self._options.tree)

    def _guess(self, sequence: Continuation) -> Guess:
        options = self._options
        text, count = text_of(sequence), max(0, min(options.num_draft_tokens, sequence.room))
        if options.choose == "newest":
            return newest(text, options.max_ngram, count)
        return likeliest(text, options.max_ngram, count, self._memory.text, tree=options.tree)

    def recipe(self, sequences: list[Continuation]) -> Recipe:
        options = self._options
        votes = None if options.choose == "newest" else MOST
        return Recipe(
            self._full,
            self._full,
            options.num_draft_tokens,
            rejection=self.rejection and sampled(sequences),
            ngrams=Ngrams(options.max_ngram, votes, options.remember, options.tree),
        )

    @property
    def remembered(self) -> Tensor | None:
        return self._memory.tokens if self._options.remember else None

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        remember(self._memory, tally)
        return 0.0


def text_of(sequence: Continuation) -> Text:
    """The tokens of a sequence so far, as `ngrams` knows them; kept with it, since it only grows."""
    if sequence.memory is None:
        sequence.memory = Text()
    text: Text = sequence.memory
    text.extend(sequence.tokens[len(text.tokens) :])
    return text


def remember(memory: Memory, tally: Tally) -> None:
    """Keep the answers that ended with this round."""
    for sequence in tally.sequences:
        if sequence.finish_reason:
            memory.add(sequence.tokens[len(sequence.prompt) :])


def lay_out(batch: Batch, guesses: Sequence[Guess], *, tree: bool = False) -> Draft:
    """The draft of one guess a sequence."""
    width = max(len(guess.tokens) for guess in guesses)

    def padded(lists: list[list[int]]) -> torch.Tensor:
        return torch.tensor([values + [0] * (width - len(values)) for values in lists], device=batch.device).long()

    return Draft(
        padded([guess.tokens for guess in guesses]),
        torch.tensor([len(guess.tokens) for guess in guesses], device=batch.device),
        parent=padded([guess.parent for guess in guesses]) if tree and width else None,
    )
