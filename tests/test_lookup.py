"""Prompt lookup: which continuation is drafted, and that it changes no token."""

import random
from fractions import Fraction

import pytest

from skipjack import SamplingParams
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods import registry
from skipjack.runtime.ngrams import GAP, MOST, Memory, Text, likeliest, newest


def continuation(tokens: list[int], ngram: int, count: int) -> list[int]:
    return newest(Text(tokens), ngram, count).tokens


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
    draw = random.Random(seed)
    for _ in range(300):
        tokens = [draw.randrange(4) for _ in range(draw.randrange(1, 20))]
        ngram = draw.randrange(1, 5)
        start = plainly_longest(tokens, ngram)
        expected = [] if start is None else (tokens[start:] * 20)[:6]
        assert continuation(tokens, ngram, 6) == expected


def plainly_likeliest(memory: list[int], text: list[int], ngram: int, count: int, tree: bool) -> list[tuple[int, int]]:
    """The nodes and their parents by the definition, every occurrence followed by hand, in exact arithmetic."""
    whole, known = [*memory, GAP, *text], len(memory) + 1
    votes: dict[int, Fraction] = {}
    for at in range(len(whole) - 1):
        n = 0
        while n < min(ngram, len(text)) and n <= at and whole[at - n] == whole[-1 - n]:
            n += 1
        if n:
            votes[at + 1] = Fraction(4) ** (n - 1) * (10 if at >= known else 1)
    nodes: list[tuple[int, int]] = []
    open_nodes: list[tuple[Fraction, int, int, int, dict[int, Fraction]]] = []

    def expand(row: int, chance: Fraction, votes: dict[int, Fraction]) -> None:
        votes = {at: vote for at, vote in votes.items() if at < len(whole)}
        sums = {token: sum(v for at, v in votes.items() if whole[at] == token) for token in {whole[at] for at in votes}}
        ranked = sorted(sums, key=lambda token: (-sums[token], token))
        for token in ranked if tree else ranked[:1]:
            if token != GAP:
                below = {at + 1: vote for at, vote in votes.items() if whole[at] == token}
                share = chance * sums[token] / (sum(votes.values()) + 10)
                open_nodes.append((-share, len(nodes), token, row, below))

    expand(0, Fraction(1), votes)
    while open_nodes and len(nodes) < count:
        best = min(open_nodes, key=lambda node: node[:3])
        open_nodes.remove(best)
        nodes.append((best[2], best[3]))
        expand(len(nodes), -best[0], best[4])
    return nodes


@pytest.mark.parametrize("tree", [False, True])
def test_the_likeliest_continuation_is_the_definition(tree: bool) -> None:
    draw = random.Random(3)
    for _ in range(150):
        memory = [draw.choice([GAP, 0, 1, 2]) for _ in range(draw.randrange(0, 15))]
        text = [draw.randrange(3) for _ in range(draw.randrange(1, 20))]
        ngram, count = draw.randrange(1, 5), draw.randrange(0, 8)
        guess = likeliest(Text(text), ngram, count, Text(memory), tree=tree)
        assert list(zip(guess.tokens, guess.parent, strict=True)) == plainly_likeliest(memory, text, ngram, count, tree)


def test_what_followed_most_often_is_likelier_than_what_followed_last() -> None:
    text = Text([1, 2, 5, 1, 2, 5, 1, 2, 6, 1, 2])
    assert newest(text, 3, 1).tokens == [6]
    assert likeliest(text, 3, 1).tokens == [5]
    assert likeliest(text, 3, 4, tree=True) == (2, [5, 1, 2, 6], [0, 1, 2, 0])


def test_memory_keeps_the_newest_tokens_and_where_texts_end() -> None:
    memory = Memory(6)
    memory.add([1, 2, 3])
    memory.add([4, 5])
    assert memory.text.tokens == [1, 2, 3, GAP, 4, 5]
    memory.add([7])
    assert memory.text.tokens == [3, GAP, 4, 5, GAP, 7]
    assert likeliest(Text([9, 3]), 3, 2, memory.text).tokens == [], "no draft goes on into another text"
    empty = Memory(0)
    empty.add([1])
    assert empty.text.tokens == []


def test_a_text_that_grows_is_known_as_one_that_was_there_at_once() -> None:
    draw = random.Random(5)
    tokens, text = [draw.randrange(3) for _ in range(2 * MOST)], Text()
    for at, token in enumerate(tokens):
        text.extend([token])
        assert likeliest(text, 4, 7) == likeliest(Text(tokens[: at + 1]), 4, 7)


def test_the_longest_matches_vote_and_of_equally_long_ones_the_newest() -> None:
    draw = random.Random(6)
    for _ in range(100):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 60))]
        places = []
        for at in range(len(tokens) - 1):
            n = 0
            while n < min(3, at + 1) and tokens[at - n] == tokens[-1 - n]:
                n += 1
            places += [(n, at)] * (n > 0)
        text = Text(tokens)
        for most in (1, 5, 100):
            assert text.ends(text, 3, most) == sorted(places, reverse=True)[:most]


LIKELIEST = "lookup:choose=likeliest,max_ngram=4"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "options",
    ["num_draft_tokens=1", "num_draft_tokens=12", "choose=likeliest,remember=100", "choose=likeliest,tree=true"],
)
def test_tokens_are_those_of_plain_decoding(synthetic, options: str, temperature: float) -> None:
    engine = synthetic("tiny", vocab=24)
    prompts = [[3, 4, 5, 6] * 5, [7], [*range(3, 20), 3, 4]]
    params = SamplingParams(max_tokens=32, temperature=temperature, seed=4, ignore_eos=True)
    plain = [engine.generate(prompt, params).token_ids for prompt in prompts]
    drafted = engine.generate(prompts, params, method=f"lookup:{options}")
    assert [output.token_ids for output in drafted] == plain
    assert sum(output.stats.accepted for output in drafted) > 0
    assert drafted[0].stats.lossless


def test_an_answer_that_is_remembered_is_drafted_whole(synthetic) -> None:
    engine, params = synthetic("tiny"), SamplingParams(max_tokens=41, ignore_eos=True)
    method = f"{LIKELIEST},remember=1000"
    first, again = (engine.generate([9, 8, 7], params, method=method) for _ in range(2))
    assert again.token_ids == first.token_ids
    assert again.stats.rounds < min(8, first.stats.rounds)
    assert engine.generate([9, 8, 7], params, method=LIKELIEST).stats.rounds == first.stats.rounds


@pytest.mark.parametrize(
    ("option", "value"), [("num_draft_tokens", 0), ("num_draft_tokens", 65), ("max_ngram", 17), ("remember", -1)]
)
def test_options_are_checked(option: str, value: int) -> None:
    with pytest.raises(RequestError, match=f"lookup: option {option} expects [01] to"):
        registry.parse(f"lookup:{option}={value}")


@pytest.mark.parametrize(
    ("options", "message"),
    [("choose=best", "expects newest or likeliest, got 'best'"), ("tree=true", "expect choose=likeliest, got newest")],
)
def test_trees_and_memory_need_a_vote(options: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        registry.parse(f"lookup:{options}")
