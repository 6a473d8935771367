"""A continuation that is given: decoding as ever, but every token is replaced by the one that comes next there."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from ..loaders.config import ModelConfig
from .errors import RequestError
from .prompts import TokenIds, checked_ids
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
