"""Attention of draft trees: every node equals, bit for bit, the same token at the end of a plain sequence."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from skipjack.kernels import attention
from skipjack.kernels.attention_index import AttentionIndex, TritonIndex
from skipjack.kernels.reference import dense
from skipjack.kernels.values import Tree

PAGE = 64
TILE = 8
HEADS, KV_HEADS, D = 6, 2, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "chain": [-1, 0, 1, 2, 3, 4, 5],
    "star": [-1, 0, 0, 0, 0, 0, 0, 0, 0],
    "binary": [-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4],
    "comb": [-1, 0, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11],
    "two roots": [-1, -1, 0, 1, 2, 3, 3],
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def path(parents: list[int], node: int) -> list[int]:
    """The node's ancestors and itself, root first."""
    found = [node]
    while parents[found[-1]] >= 0:
        found.append(parents[found[-1]])
    return found[::-1]


class Draft:
    """Sequences of `lengths` tokens, each with a tree of drafts, in one paged cache; one padding row after each.

    Nodes lie in shuffled slots from the sequence's length on; every slot that holds nothing is filled with `unwritten`.
    """

    def __init__(self, lengths: list[int], trees: list[list[int]], unwritten: float) -> None:
        self.lengths, self.trees, self.unwritten = lengths, trees, unwritten
        width = -(-(max(lengths) + 32) // PAGE)
        self.table = (torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(3)) + 1).view(
            -1, width
        )
        self.prefix = randn(2, len(lengths), max(lengths), KV_HEADS, D, seed=1)
        self.nodes = randn(2, len(lengths), 32, KV_HEADS, D, seed=2)
        self.keys, self.values = self._cache()
        rows: list[tuple[int, int, int, list[int]]] = []
        self.members: list[tuple[int, int]] = []
        for s, (length, parents) in enumerate(zip(lengths, trees, strict=True)):
            place = torch.randperm(len(parents), generator=torch.Generator().manual_seed(s)).tolist()
            for node in range(len(parents)):
                self._write(self.keys, self.values, s, length + place[node], self.nodes[:, s, node])
                line = path(parents, node)
                rows.append((s, length + len(line) - 1, length, [length + place[n] for n in line]))
                self.members.append((s, node))
            rows.append((-1, 0, 0, []))
            self.members.append((-1, 0))
        depth = max(len(row[3]) for row in rows)
        unread = 10**9
        self.sequence, self.position, length = (torch.tensor([row[i] for row in rows]) for i in range(3))
        self.tree = Tree(length, torch.tensor([row[3] + [unread] * (depth - len(row[3])) for row in rows]))

    def _cache(self) -> tuple[Tensor, Tensor]:
        keys, values = torch.full((2, int(self.table.max()) + 1, KV_HEADS, PAGE, D), self.unwritten)
        for s, length in enumerate(self.lengths):
            for p in range(length):
                self._write(keys, values, s, p, self.prefix[:, s, p])
        return keys, values

    def _write(self, keys: Tensor, values: Tensor, s: int, slot: int, pair: Tensor) -> None:
        page, offset = self.table[s, slot // PAGE], slot % PAGE
        keys[page, :, offset], values[page, :, offset] = pair

    def chain(self, row: int) -> tuple[Tensor, Tensor]:
        """The cache of a sequence that ends with the row's path."""
        s, node = self.members[row]
        keys, values = self._cache()
        for depth, ancestor in enumerate(path(self.trees[s], node)):
            self._write(keys, values, s, self.lengths[s] + depth, self.nodes[:, s, ancestor])
        return keys, values

    def exact(self, row: int, q: Tensor, window: int | None, slopes: Tensor | None) -> Tensor:
        """The row in float64."""
        s, node = self.members[row]
        line = path(self.trees[s], node)
        k, v = torch.cat([self.prefix[:, s, : self.lengths[s]], self.nodes[:, s, line]], 1).double()
        distance = torch.arange(len(k)) - (len(k) - 1)
        scores = torch.einsum("hd,thd->ht", q.double(), k.repeat_interleave(HEADS // KV_HEADS, 1)) * D**-0.5
        if slopes is not None:
            scores += slopes.double()[:, None] * distance
        if window is not None:
            scores = scores.masked_fill(distance <= -window, -torch.inf)
        return torch.einsum("ht,thd->hd", scores.softmax(-1), v.repeat_interleave(HEADS // KV_HEADS, 1)).flatten()


def run(
    backend: str,
    draft: Draft,
    q: Tensor,
    rows: list[int],
    cache: tuple[Tensor, Tensor],
    tree: Tree | None,
    window: int | None,
    slopes: Tensor | None,
    active: Tensor | None = None,
) -> Tensor:
    index, attend, device = AttentionIndex, dense.attend, "cpu"
    if backend == "triton":
        index, attend, device = TritonIndex, attention.attend, DEVICE
    elif backend == "compiled":
        attend = pytest.importorskip("skipjack.kernels.cpu.compiled", reason="numba is not installed").attend
    q, keys, values, sequence, position, table = (
        x.to(device) for x in (q[rows], *cache, draft.sequence[rows], draft.position[rows], draft.table)
    )
    if tree is not None:
        tree = Tree(tree.length[rows].to(device), tree.slot[rows].to(device))
    slopes, active = (None if x is None else x.to(device) for x in (slopes, active))
    made = index(sequence, position, table, page_size=PAGE, tile=TILE, tree=tree)
    return attend(q, keys, values, made, scale=D**-0.5, window=window, slopes=slopes, active=active).cpu()


def drafts(name: str, backend: str) -> Draft:
    lengths = {"chain": [1, 61], "star": [60], "binary": [125], "comb": [119, 64], "two roots": [300, 63]}[name]
    trees = [SHAPES[name], SHAPES["binary"]][: len(lengths)]
    return Draft(lengths, trees, 3.0 if backend == "torch" else torch.nan)


@pytest.mark.parametrize("backend", ["torch", "compiled", "triton"])
@pytest.mark.parametrize(
    ("name", "window", "alibi"),
    [
        ("chain", None, False),
        ("star", None, True),
        ("binary", 9, False),
        ("comb", None, False),
        ("comb", 70, True),
        ("two roots", None, False),
    ],
)
def test_every_node_is_its_path_decoded_as_a_chain(name: str, window: int | None, alibi: bool, backend: str) -> None:
    draft = drafts(name, backend)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1) if alibi else None
    rows = list(range(len(draft.members)))
    q = randn(len(rows), HEADS, D, seed=4)
    got = run(backend, draft, q, rows, (draft.keys, draft.values), draft.tree, window, slopes)
    for row in rows:
        if draft.sequence[row] < 0:
            continue
        expected = draft.exact(row, q[row], window, slopes)
        assert (got[row].double() - expected).norm() < 1e-5 * expected.norm(), f"node {draft.members[row]}"
        if backend != "triton" or row % 3 == 1 or row > len(rows) - 4:
            plain = run(backend, draft, q, [row], draft.chain(row), None, window, slopes)
            assert torch.equal(plain[0], got[row]), f"node {draft.members[row]}"


@pytest.mark.parametrize("backend", ["torch", "compiled", "triton"])
def test_nodes_do_not_depend_on_the_rows_they_share_a_pass_with(backend: str) -> None:
    draft = drafts("comb", backend)
    rows = list(range(len(draft.members)))
    q = randn(len(rows), HEADS, D, seed=5)
    cache = (draft.keys, draft.values)
    together = run(backend, draft, q, rows, cache, draft.tree, None, None)
    for chosen in ([0], [7, 12], [2, 5, 11, 13, 14, 20]):
        apart = run(backend, draft, q, chosen, cache, draft.tree, None, None)
        valid = [i for i, row in enumerate(chosen) if draft.sequence[row] >= 0]
        assert torch.equal(apart[valid], together[[chosen[i] for i in valid]])


@pytest.mark.parametrize("backend", ["torch", "compiled", "triton"])
def test_inactive_nodes_leave_the_others_as_they_are(backend: str) -> None:
    draft = drafts("two roots", backend)
    rows = list(range(len(draft.members)))
    q = randn(len(rows), HEADS, D, seed=6)
    cache = (draft.keys, draft.values)
    usual = run(backend, draft, q, rows, cache, draft.tree, None, None)
    active = torch.tensor([row % 3 != 1 for row in rows])
    got = run(backend, draft, q, rows, cache, draft.tree, None, None, active)
    chosen = active & (draft.sequence >= 0)
    assert torch.equal(got[chosen], usual[chosen])
