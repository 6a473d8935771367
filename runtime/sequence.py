"""One continuation in the making."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .request import Choice, Piece, SamplingParams, TokenLogprob
from .text import TextStream


@dataclass
class Counters:
    """What one sequence's rounds added up to; prefill token + accepted + bonus = emitted tokens.

    The time of a round is counted once for a prompt, by the first of its sequences that were in it.
    """

    rounds: int = 0
    graph_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    bonus: int = 0
    drafted_per_position: list[int] = field(default_factory=list[int])
    accepted_per_position: list[int] = field(default_factory=list[int])
    executed_skips: int = 0
    weight_passes: float = 0.0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    search_s: float = 0.0
    decode_s: float = 0.0


@dataclass
class Sequence:
    """Tokens, cache pages and stop rules of one continuation.

    Between rounds the keys and values of all tokens but the last are cached: `cached` == len(tokens) - 1.
    """

    index: int
    choice: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    eos: frozenset[int]
    max_length: int
    text: TextStream | None
    tokens: list[int] = field(default_factory=list[int])
    pages: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    counters: Counters = field(default_factory=Counters)
    phases: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    # Layers' worth of sub-layers behind each generated token, those each prompt token ran where a policy decides token
    # by token, and what a method has to remember of it.
    layers_used: list[float] = field(default_factory=list[float])
    prompt_layers: list[float] = field(default_factory=list[float])
    memory: Any = None
    # Tokens of its prompt that the prefix cache had.
    known: int = 0
    # Whether others wait for their next token while its prompt is read.
    shares: bool = False
    finish_reason: str | None = None
    # Whether no token could be chosen for it: its activations have left the range of the dtype.
    lost: bool = False
    # The residual stream [1, H] its first token was chosen after: other choices of the prompt begin with it.
    entered: Tensor | None = None
    # Tokens that end it.
    ends: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = self.eos.union(self.params.stop_token_ids)
        self.tokens = list(self.prompt)
        self.max_length = min(self.max_length, len(self.prompt) + self.params.max_tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def cached(self) -> int:
        return len(self.tokens) - 1

    @property
    def room(self) -> int:
        """Draft tokens that can still be of use: a round adds one token more than it accepts."""
        return self.max_length - len(self.tokens) - 1

    @property
    def forbidden(self) -> frozenset[int]:
        """Tokens that end generation, while it is too short to end."""
        return self.ends if self.params.min_tokens else frozenset()

    def enter(self, phase: str) -> None:
        """Note the phase the next token is produced in."""
        if not self.phases or self.phases[-1][0] != phase:
            self.phases.append((phase, self.generated))

    def extend(self, tokens: list[int], drafted: int) -> list[Piece]:
        """Append the tokens of a round, the first `drafted` of them accepted drafts, up to the first that ends it.

        A token of −1 is none: nothing could be chosen, and the sequence is lost.
        """
        pieces: list[Piece] = []
        for i, token in enumerate(tokens):
            if token < 0:
                self.lose()
                break
            self.tokens.append(token)
            text = self.text.push(token, may_stop=self.generated >= self.params.min_tokens) if self.text else ""
            self.finish_reason = self._ends_with(token)
            if self.finish_reason and self.text:
                text += self.text.finish()
            pieces.append(Piece(token, text, i < drafted))
            if self.finish_reason:
                break
        return pieces

    def lose(self) -> None:
        """End it where no token could be chosen."""
        self.finish_reason, self.lost = "abort", True

    def result(self) -> Choice:
        text = self.text.text if self.text else None
        logprobs = list(self.logprobs) if self.params.logprobs is not None else None
        return Choice(text, self.tokens[len(self.prompt) :], self.finish_reason or "abort", logprobs)

    def _ends_with(self, token: int) -> str | None:
        if self.generated >= self.params.min_tokens and (
            token in self.ends or (self.text is not None and self.text.stopped)
        ):
            return "stop"
        return "length" if len(self.tokens) >= self.max_length else None


def most_logprobs(sequences: list[Sequence]) -> int | None:
    """How many likely tokens at a place the sequences want to be told of; None: not even the chosen one."""
    return max((s.params.logprobs for s in sequences if s.params.logprobs is not None), default=None)


def firsts(sequences: Iterable[Sequence]) -> list[Sequence]:
    """The first sequence of each prompt, of whatever request: those that count the time of a round."""
    found: dict[int, Sequence] = {}
    for sequence in sequences:
        found.setdefault(id(sequence.prompt), sequence)
    return list(found.values())
