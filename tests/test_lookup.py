"""Prompt lookup: which continuation is drafted, and that it changes no token."""

import pytest

from skipjack import SamplingParams
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.lookup import continuation


@pytest.mark.parametrize(
    ("tokens", "ngram", "count", "expected"),
    [
        ([1, 2, 3, 9, 4, 1, 2, 3], 3, 2, [9, 4]),
        ([2, 3, 9, 4, 3, 8, 2, 3], 3, 2, [9, 4]),  # a longer match before a more recent one
        ([3, 5, 8, 3, 6, 8, 3], 1, 2, [6, 8]),  # the most recent of equally long ones
        ([1, 2, 3], 3, 4, []),
        ([4], 3, 4, []),
        ([6, 6], 3, 3, [6, 6, 6]),
        ([1, 5, 2, 5, 2], 2, 5, [5, 2, 5, 2, 5]),  # the text runs out and repeats
        ([0, 4, 0], 3, 1, [4]),
        ([1, 2, 3, 9, 1, 2, 3], 3, 0, []),
    ],
)
def test_continuation(tokens: list[int], ngram: int, count: int, expected: list[int]) -> None:
    assert continuation(tokens, ngram, count) == expected


def plainly_longest(tokens: list[int], max_ngram: int) -> int | None:
    """Where the continuation starts, by the definition and without arrays."""
    for n in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return start + n
    return None


@pytest.mark.parametrize("seed", range(5))
def test_continuation_is_the_definition(seed: int) -> None:
    import random

    draw = random.Random(seed)
    for _ in range(300):
        tokens = [draw.randrange(4) for _ in range(draw.randrange(1, 20))]
        ngram = draw.randrange(1, 5)
        start = plainly_longest(tokens, ngram)
        expected = [] if start is None else (tokens[start:] * 20)[:6]
        assert continuation(tokens, ngram, 6) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_are_those_of_plain_decoding(synthetic, temperature: float) -> None:
    engine = synthetic("tiny", vocab=24)
    prompts = [[3, 4, 5, 6] * 5, [7], [*range(3, 20), 3, 4]]
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=4, ignore_eos=True)
    plain = [engine.generate(prompt, params).token_ids for prompt in prompts]
    for k in (1, 5, 12):
        drafted = engine.generate(prompts, params, method=f"lookup:num_draft_tokens={k}")
        assert [output.token_ids for output in drafted] == plain
    assert sum(output.stats.accepted for output in drafted) > 0
    assert drafted[0].stats.lossless


@pytest.mark.parametrize(("option", "value"), [("num_draft_tokens", 0), ("num_draft_tokens", 65), ("max_ngram", 17)])
def test_options_are_checked(option: str, value: int) -> None:
    with pytest.raises(RequestError, match=f"lookup: option {option} expects 1 to"):
        registry.parse(f"lookup:{option}={value}")
