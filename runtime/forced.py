"""A continuation that is given: decoding as ever, but every token is replaced by the one that comes next there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import cast

from ..loaders.config import ModelConfig
from .errors import RequestError
from .prompts import Prompts, TokenIds, checked_ids, is_many
from .request import Piece, SamplingParams
from .sequence import Sequence


@dataclass(frozen=True)
class Scored:
    """What a method made of a given continuation, an entry a token.

    `chosen` are the tokens it would have taken, `logprobs` its natural-log probabilities of the given ones,
    `layers_per_token` the layers' worth of sub-layers that ran for them, empty for plain decoding and layerskip.
    """

    chosen: tuple[int, ...]
    logprobs: tuple[float, ...]
    layers_per_token: tuple[float, ...]


def expect_pairs(prompts: Prompts, continuations: Collection[TokenIds]) -> None:
    """Refuse, with a RequestError, what is no list of prompts with a continuation for each."""
    if not is_many(prompts):
        raise RequestError("score: expected a list of one prompt or more")
    given = cast(object, continuations)
    if not isinstance(given, Collection) or isinstance(given, (str, bytes, Mapping)):
        raise RequestError(f"score: expected a list of continuations, got {type(continuations).__name__}")
    if len(prompts) != len(continuations):
        raise RequestError(f"score: expected {len(prompts)} continuations, got {len(continuations)}")


@dataclass
class Forced(Sequence):
    """A sequence whose every next token is given."""

    given: Ids[int] = ()
    chosen: list[int] = field(default_factory=list[int])

    @staticmethod
    def of(index: int, prompt: list[int], given: list[int]) -> Forced:
        """A greedy sequence of `prompt` and the tokens `given`."""
        params = SamplingParams(max_tokens=len(given), ignore_eos=True, logprobs=0)
        length = len(prompt) + len(given)
        return Forced(index, 0, prompt, params, 0, frozenset(), length, None, given=given)

    @staticmethod
    def all(prompts: list[list[int]], continuations: Collection[TokenIds], config: ModelConfig) -> list[Forced]:
        """One for every prompt and its continuation; RequestError where that is no ids or exceeds the context."""
        given_ids = [checked_ids(f"continuations[{i}]", ids, config.vocab_size) for i, ids in enumerate(continuations)]
        for i, (prompt, given) in enumerate(zip(prompts, given_ids, strict=True)):
            if not given:
                raise RequestError(f"continuations[{i}]: expected at least one token, got none")
            if len(prompt) + len(given) > config.max_context:
                raise RequestError(f"score: {len(prompt)} + {len(given)} tokens, the context is {config.max_context}")
        return [Forced.of(i, *pair) for i, pair in enumerate(zip(prompts, given_ids, strict=True))]

    def extend(self, tokens: list[int], drafted: int) -> list[Piece]:
        if min(tokens) < 0:
            self.lose()
            return []
        first = self.generated
        self.chosen += tokens
        return super().extend(list(self.given[first : first + len(tokens)]), drafted)

    def scored(self) -> Scored:
        return Scored(tuple(self.chosen), tuple(entry.logprob for entry in self.logprobs), tuple(self.layers_used))
