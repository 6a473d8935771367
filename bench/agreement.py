"""How well a lossy method follows the full model: agreement and likelihood on the full model's own continuations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..runtime.engine import Engine
from ..runtime.prompts import Prompt as Source
from ..runtime.request import SamplingParams
from .prompts import Prompt, source
from .record import summarise

PLAIN = "autoregressive"


@dataclass(frozen=True)
class Row:
    """One prompt with one method, teacher-forced over the full model's greedy continuation of `tokens` tokens.

    `agreed` tokens are those the method would have chosen too; `nll` is the sum of its negative natural-log
    probabilities of the full model's tokens, `layers` that of the layers' worth of sub-layers it ran for them (None
    where it does not count them).
    """

    method: str
    category: str
    tokens: int
    agreed: int
    nll: float
    layers: float | None


class Given(NamedTuple):
    """Token ids of a prompt, and of the full model's continuation."""

    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Line:
    """The rows of one method and category: shares and means over tokens, in nats; perplexity = exp(nll)."""

    method: str
    category: str
    prompts: int
    tokens: int
    agreement: float
    nll: float
    perplexity: float
    layers: float | None


def compare(
    engine: Engine,
    methods: Sequence[str],
    prompts: Sequence[Prompt],
    max_tokens: int,
    progress: Callable[[Row], None],
) -> list[Row]:
    """Score every method on every prompt; a model without a tokenizer gets token ids instead.

    Continuations end with the full model's end of text or after `max_tokens` tokens.
    """
    rows: list[Row] = []
    for first in range(0, len(prompts), engine.max_sequences):
        some = prompts[first : first + engine.max_sequences]
        given = continuations(engine, some, max_tokens)
        for method in methods:
            for row in score(engine, method, some, given):
                rows.append(row)
                progress(row)
    return rows


def continuations(engine: Engine, prompts: Sequence[Prompt], max_tokens: int) -> list[Given]:
    """What the full model says to each prompt."""
    sources: list[Source] = [source(prompt, engine.tokenizer, engine.config) for prompt in prompts]
    outputs = engine.generate(sources, SamplingParams(max_tokens=max_tokens), method=PLAIN)
    return [Given(output.prompt_ids, output.token_ids) for output in outputs]


def score(engine: Engine, method: str, prompts: Sequence[Prompt], given: Sequence[Given]) -> list[Row]:
    """One method of an engine, along the continuations of the full model: a row a prompt."""
    scores = engine.score([g.prompt for g in given], [g.tokens for g in given], method=method)
    return [
        Row(
            method,
            prompt.category,
            len(tokens),
            sum(a == b for a, b in zip(scored.chosen, tokens, strict=True)),
            -sum(scored.logprobs),
            sum(scored.layers_per_token) if scored.layers_per_token else None,
        )
        for prompt, (_, tokens), scored in zip(prompts, given, scores, strict=True)
    ]


def summary(rows: Sequence[Row]) -> list[Line]:
    """A line for every method and category, and one for all categories of a method."""
    return summarise(rows, _line)


def _line(method: str, category: str, rows: Sequence[Row]) -> Line:
    tokens = sum(row.tokens for row in rows)
    nll = sum(row.nll for row in rows) / tokens
    layers = [row.layers for row in rows if row.layers is not None]
    return Line(
        method,
        category,
        len(rows),
        tokens,
        sum(row.agreed for row in rows) / tokens,
        nll,
        math.exp(nll),
        sum(layers) / tokens if layers else None,
    )
