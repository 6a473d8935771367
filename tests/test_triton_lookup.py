"""Drafts from the text on the device: the kernels and the PyTorch op against the host's search."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from skipjack.kernels import lookup, lookup_rule, reference_lookup, reference_rounds, rounds
from skipjack.runtime import ngrams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = pytest.mark.parametrize("op", [lookup.lookup, reference_lookup.lookup], ids=["triton", "torch"])
Lookup = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(lookup)


def check(
    op: Lookup, texts: list[list[int]], rooms: list[int], longest: int, k: int, votes: int | None, capacity: int
) -> None:
    """What the op drafts is what the host would; past the end of a text lies what must not be looked at."""
    text = torch.tensor([[*tokens, *tokens[-1:] * (capacity - len(tokens))] for tokens in texts], dtype=torch.int32)
    length, room = torch.tensor([len(tokens) - 1 for tokens in texts]), torch.tensor(rooms)
    given = (value.to(DEVICE) for value in (text, length, room))
    draft, drafted = op(*given, max_ngram=longest, num_draft_tokens=k, votes=votes)
    for row, tokens in enumerate(texts):
        count, known = max(0, min(k, rooms[row])), ngrams.Text(tokens)
        guess = (ngrams.likeliest if votes else ngrams.newest)(known, longest, count)
        assert draft[row].tolist() == guess.tokens + [0] * (k - len(guess.tokens))
        assert int(drafted[row]) == len(guess.tokens)


@st.composite
def texts(draw: st.DrawFn) -> list[list[int]]:
    letters = st.integers(0, draw(st.integers(0, 4)))
    return draw(st.lists(st.lists(letters, min_size=1, max_size=60), min_size=1, max_size=3))


@OPS
@pytest.mark.parametrize("votes", [None, 16, 128])
@settings(max_examples=25, deadline=None)
@given(texts=texts(), rooms=st.tuples(*[st.integers(-1, 9)] * 3), longest=st.integers(1, 6), k=st.integers(1, 9))
def test_a_draft_is_what_the_host_would_guess(
    op: Lookup, votes: int | None, texts: list[list[int]], rooms: tuple[int, ...], longest: int, k: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup_rule, "LOOKUP_BLOCK", 16)
        patch.setattr(ngrams, "MOST", votes or ngrams.MOST)
        check(op, texts, [*rooms[: len(texts)]], longest, k, votes, 64)


@OPS
@pytest.mark.parametrize("votes", [None, 128])
@pytest.mark.parametrize("letters", [1, 3, 40])
def test_long_texts_of_few_and_many_letters(op: Lookup, votes: int | None, letters: int) -> None:
    """Several blocks of positions, with many more matches than may vote, or few and far between."""
    draw = torch.Generator().manual_seed(letters)
    texts = [torch.randint(0, letters, (n,), generator=draw).tolist() for n in (3000, 1024, 1025)]
    check(op, texts, [12, 64, 0], 16 if letters == 1 else 4, 12, votes, 4096)


@OPS
def test_a_match_is_found_at_the_far_end_of_a_text(op: Lookup) -> None:
    """Before anything newer that is shorter: an n-gram of the first tokens, and half of it everywhere."""
    tokens = [7, 8, 9, 5, 6, *[9, 4] * 1000, 7, 8, 9]
    assert ngrams.newest(ngrams.Text(tokens), 3, 2).tokens == [5, 6]
    for votes in (None, 128):
        check(op, [tokens], [2], 3, 2, votes, 2048)


def test_blocks_of_positions_cover_a_text_of_any_length() -> None:
    for capacity in (1, 64, 1024, 65536, 65600, 2**20):
        rule = lookup_rule.lookup_rule(capacity, 128)
        assert capacity <= rule.block * rule.blocks
        assert rule.block == 1024 or rule.block < 2 * capacity / rule.blocks
    assert [lookup_rule.lookup_rule(64, votes).kept for votes in (None, 16, 17, 128)] == [16, 16, 32, 128]


@pytest.mark.parametrize("op", [rounds.commit, reference_rounds.commit], ids=["triton", "torch"])
def test_new_tokens_follow_in_the_text(op: Callable[..., None]) -> None:
    accepted, token = torch.tensor([0, 2, 1, 1]), torch.tensor([7, 8, 9, 10])
    draft = torch.tensor([[1, 2], [3, 4], [5, 6], [11, 12]])
    length, left = torch.tensor([0, 3, 2, 5]), torch.tensor([1, 9, 0, 2])
    text = torch.full((4, 8), -7, dtype=torch.int32)
    state = [torch.zeros(4).long(), length, left, torch.zeros(4, 6).long()]
    on_device = [value.to(DEVICE) for value in (accepted, token, torch.full((4,), 2), draft, *state)]
    text = text.to(DEVICE)
    op(*on_device, text=text)
    none = -7
    assert text.tolist() == [
        [none, 7, *[none] * 6],
        [*[none] * 4, 3, 4, 8, none],
        [none] * 8,
        [*[none] * 6, 11, 10],
    ]
