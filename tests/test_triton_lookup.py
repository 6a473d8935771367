"""Drafts from the text on the device: the kernels and the PyTorch op against the host's search."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from skipjack.kernels import lookup, lookup_rule, matches, rounds
from skipjack.kernels.reference import lookup as reference_lookup
from skipjack.kernels.reference import rounds as reference_rounds
from skipjack.kernels.values import Progress
from skipjack.runtime import ngrams
from skipjack.runtime.rows import Lineage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = pytest.mark.parametrize("op", [lookup.lookup, reference_lookup.lookup], ids=["triton", "torch"])
Lookup = Callable[..., lookup.Found]


@pytest.fixture(autouse=True)
def poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(lookup)
    poison(matches)


def check(
    op: Lookup,
    texts: list[list[int]],
    rooms: list[int],
    longest: int,
    k: int,
    votes: int | None,
    capacity: int,
    *,
    memory: list[int] | None = None,
    tree: bool = False,
) -> None:
    """What the op drafts is what the host would; past the end of a text lies what must not be looked at."""
    text = torch.tensor([[*tokens, *tokens[-1:] * (capacity - len(tokens))] for tokens in texts], dtype=torch.int32)
    length, room = torch.tensor([len(tokens) - 1 for tokens in texts]), torch.tensor(rooms)
    given = (value.to(DEVICE) for value in (text, length, room))
    others = None if memory is None else torch.tensor(memory, dtype=torch.int32, device=DEVICE)
    found = op(*given, max_ngram=longest, num_draft_tokens=k, votes=votes, memory=others, tree=tree)
    assert (found.parent is not None) == tree
    for row, tokens in enumerate(texts):
        count, known = max(0, min(k, rooms[row])), ngrams.Text(tokens)
        if votes:
            guess = ngrams.likeliest(known, longest, count, ngrams.Text(memory or ()), tree=tree)
        else:
            guess = ngrams.newest(known, longest, count)
        drafted, padding = len(guess.tokens), [0] * (k - len(guess.tokens))
        assert found.tokens[row].tolist() == guess.tokens + padding
        assert int(found.drafted[row]) == drafted
        if found.parent is not None and found.depth is not None and found.path is not None:
            assert found.parent[row].tolist() == guess.parent + padding
            lineage = Lineage.of(found.parent[row : row + 1].cpu())
            entries = lineage.path.shape[2]
            assert found.depth[row].tolist() == lineage.depth[0].tolist()
            assert found.path[row, :, :entries].tolist() == lineage.path[0].tolist()
            itself = torch.arange(k + 1)[:, None].expand(-1, k + 1 - entries)
            assert found.path[row, :, entries:].tolist() == itself.tolist()


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
@pytest.mark.parametrize("votes", [16, 128])
@settings(max_examples=40, deadline=None)
@given(
    texts=texts(),
    memory=st.none() | st.lists(st.integers(-1, 4), min_size=1, max_size=60),
    tree=st.booleans(),
    rooms=st.tuples(*[st.integers(-1, 9)] * 3),
    longest=st.integers(1, 6),
    k=st.integers(1, 9),
)
def test_memory_votes_and_trees_grow_as_on_the_host(
    op: Lookup,
    votes: int,
    texts: list[list[int]],
    memory: list[int] | None,
    tree: bool,
    rooms: tuple[int, ...],
    longest: int,
    k: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup_rule, "LOOKUP_BLOCK", 16)
        patch.setattr(ngrams, "MOST", votes)
        check(op, texts, [*rooms[: len(texts)]], longest, k, votes, 64, memory=memory, tree=tree)


@OPS
@pytest.mark.parametrize("letters", [1, 3, 40])
def test_long_texts_grow_large_trees_from_much_that_is_remembered(op: Lookup, letters: int) -> None:
    draw = torch.Generator().manual_seed(letters)
    texts = [torch.randint(0, letters, (n,), generator=draw).tolist() for n in (3000, 1025)]
    memory = [*torch.randint(-1, letters, (2500,), generator=draw).tolist(), *[ngrams.GAP] * 1000]
    check(op, texts, [64, 20], 16 if letters == 1 else 4, 64, 128, 4096, memory=memory, tree=True)
    check(op, texts, [12, 64], 4, 12, 128, 4096, memory=memory)


@OPS
def test_shares_are_rounded_as_the_host_rounds_them(op: Lookup) -> None:
    """Here another order of product and quotient, or weights in float32, would choose another node."""
    first, second = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0], [1, 1, 3, *[1] * 17]
    assert ngrams.likeliest(ngrams.Text(first), 1, 8, ngrams.Text(), tree=True).parent == [0, 1, 2, 3, 2, 0, 1, 3]
    assert ngrams.likeliest(ngrams.Text(second), 16, 20, ngrams.Text(), tree=True).parent[-4:] == [0, 1, 17, 19]
    check(op, [first], [8], 1, 8, 128, 64, tree=True)
    check(op, [second], [20], 16, 20, 128, 64, tree=True)


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
    on_device = [value.to(DEVICE) for value in (accepted, token, torch.full((4,), 2), draft)]
    state = Progress.of(*(value.to(DEVICE) for value in (torch.zeros(4).long(), length, left)))
    text = text.to(DEVICE)
    op(*on_device, state, torch.zeros(1, 4, 6, dtype=torch.int64, device=DEVICE), text=text)
    none = -7
    assert text.tolist() == [
        [none, 7, *[none] * 6],
        [*[none] * 4, 3, 4, 8, none],
        [none] * 8,
        [*[none] * 6, 11, 10],
    ]
