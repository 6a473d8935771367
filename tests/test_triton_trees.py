"""Growing a draft tree, laying out its rows, reporting its path: kernels and PyTorch ops against plain Python."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from skipjack.kernels import enter as enter_module
from skipjack.kernels.branch import branch
from skipjack.kernels.reference import rounds as reference_rounds
from skipjack.kernels.rounds import commit
from skipjack.kernels.values import Entry, Grown, Progress

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = ((0.9, 1), (0.6, 2), (0.3, 5))
PAGE = 4


@pytest.fixture(autouse=True)
def poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(enter_module)


class Plain:
    """A draft tree as lists: each node its token and the rows from row 0 down to it; its rows in order."""

    def __init__(self, room: int, nodes: int) -> None:
        self.limit = min(room, nodes)
        self.tokens, self.paths, self.spine, self.going = list[int](), [[0]], 0, room > 0

    def branch(self, tokens: list[int], p: float, threshold: float | None) -> None:
        if not self.going:
            return
        width = next((count for above, count in WIDTHS if p > above), len(tokens))
        above = self.paths[self.spine]
        self.spine = len(self.paths)
        for place, token in enumerate(tokens[:width]):
            if len(self.tokens) < self.limit and (place == 0 or token != tokens[0]):
                self.paths.append([*above, len(self.paths)])
                self.tokens.append(token)
        self.going = len(self.tokens) < self.limit and (threshold is None or p >= threshold)

    def same(self, tree: Grown, s: int) -> None:
        nodes, entries = tree.token.shape[1], tree.path.shape[2]
        blank = nodes - len(self.tokens)
        assert tree.token[s].tolist() == self.tokens + [0] * blank
        assert tree.parent[s].tolist() == [path[-2] for path in self.paths[1:]] + [0] * blank
        assert tree.depth[s].tolist() == [len(path) - 1 for path in self.paths] + [0] * blank
        paths = [path + path[-1:] * (entries - len(path)) for path in self.paths]
        assert tree.path[s].tolist() == paths + [[0] * entries] * blank
        assert (int(tree.count[s]), int(tree.spine[s])) == (len(self.tokens), self.spine)
        assert bool(tree.going[s]) is self.going


@pytest.mark.parametrize("op", [branch, reference_rounds.branch], ids=["triton", "torch"])
@pytest.mark.parametrize(
    ("sequences", "nodes", "steps", "siblings"),
    [(1, 32, 7, 10), (5, 9, 4, 10), (3, 1, 1, 10), (4, 64, 25, 3), (2, 40, 3, 20), (3, 33, 16, 1)],
)
@pytest.mark.parametrize("threshold", [None, 0.45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_grows_as_lists_do(
    op: object, sequences: int, nodes: int, steps: int, siblings: int, threshold: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(nodes)
    room = torch.randint(0, nodes + 9, (sequences,), generator=generator)
    room[0] = nodes + 5
    plain = [Plain(int(most), nodes) for most in room]
    tree, least = Grown.bare(room.to(DEVICE), nodes, steps), None
    if threshold is not None:
        least = torch.tensor(threshold, device=DEVICE)
    for step in range(steps):
        tokens = torch.stack([torch.randperm(99, generator=generator)[:siblings] for _ in range(sequences)])
        distinct = torch.randint(1, siblings + 1, (sequences, 1), generator=generator)
        tokens = torch.where(torch.arange(siblings) < distinct, tokens, tokens[:, :1])
        # What follows is a column of something wider, as the values of siblings are.
        value = torch.randn(sequences, siblings, generator=generator).to(dtype)
        p = torch.rand(sequences, generator=generator) * 0.9 + 0.1 * (step % 2)
        total = value[:, 0].float() - p.log()
        p = (value[:, 0].float() - total).exp()
        op(
            tree,
            room.to(DEVICE),
            tokens.to(DEVICE),
            value.to(DEVICE)[:, 0],
            total.to(DEVICE),
            least,
            widths=WIDTHS,
        )
        for s, mine in enumerate(plain):
            mine.branch(tokens[s].tolist(), float(p[s]), threshold)
            mine.same(tree, s)
    assert any(len(mine.tokens) > 1 for mine in plain) or siblings == 1 or nodes == 1


@pytest.mark.parametrize(("sequences", "width", "entries", "rows"), [(1, 5, 3, 5), (3, 6, 20, 24), (4, 33, 8, 132)])
def test_rows_of_a_tree_lie_in_their_place_and_stand_at_their_depth(
    enter: Callable[..., Entry], sequences: int, width: int, entries: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    token = torch.randint(1, 30, (sequences, width), generator=generator)
    depth = torch.randint(0, entries, (sequences, width), generator=generator)
    path = torch.randint(0, width, (sequences, width, entries), generator=generator)
    first, count = torch.arange(sequences) * 5 % 7, torch.randint(0, width + 1, (sequences,), generator=generator)
    count[0] = width
    alive = torch.arange(sequences) != 1
    table = torch.randperm(90, generator=generator)[: sequences * 13].view(sequences, 13)
    inputs = [token, first, count, alive, table, torch.randn(30, 40, generator=generator)]
    inputs = [given.to(DEVICE) for given in inputs]
    where = {"depth": depth.to(DEVICE), "path": path.to(DEVICE)}
    got = enter(*inputs, None, rows=rows, ahead=2, page_size=PAGE, kv_heads=2, **where)
    assert got.tree is not None
    for row in range(rows):
        s, j = divmod(row, width)
        if s < sequences and j < count[s] and alive[s]:
            root = int(first[s]) + 2
            page = int(table[s, (root + j) // PAGE])
            at, slots, entered = root + int(depth[s, j]), (root + path[s, j]).tolist(), int(token[s, j])
        else:
            s, j, root, page, at, slots, entered = -1, 0, 0, 0, 0, [0] * entries, 0
        assert [int(part[row]) for part in got[:3]] == [entered, at, s]
        assert [int(part[row]) for part in got.slots] == [page, (root + j) % PAGE]
        assert int(got.tree.length[row]) == root
        assert got.tree.slot[row].tolist() == slots
        assert torch.equal(got.x[row], inputs[5][entered])


@pytest.mark.parametrize("op", [commit, reference_rounds.commit], ids=["triton", "torch"])
@pytest.mark.parametrize(("k", "told"), [(1, 1), (9, 4), (33, 20)])
def test_the_report_of_a_tree_has_the_tokens_of_its_path(op: object, k: int, told: int) -> None:
    generator = torch.Generator().manual_seed(k)
    left, count = torch.tensor([3, 50, 0, 7]), torch.tensor([k, k // 2, k, 0])
    depth = torch.randint(0, told + 1, (4, k + 1), generator=generator)
    depth[:, 0] = 0
    draft = torch.randint(1, 99, (4, 2 * k), generator=generator)[:, ::2]
    accepted = torch.minimum(torch.tensor([told, 1, 1, 0]), count)
    path = torch.zeros(4, k + 1, dtype=torch.int64)
    for s in range(4):
        rows = torch.randperm(k, generator=generator)[: int(accepted[s])].sort().values + 1
        path[s, 1:] = rows[-1] if len(rows) else 0
        path[s, 1 : 1 + len(rows)] = rows
    last, length, token = torch.arange(4) + 20, torch.arange(4) * 100, torch.tensor([7, 8, 9, 10])
    state = Progress.of(*(given.clone().to(DEVICE) for given in (last, length, left)))
    report, where = torch.full((1, 4, told + 4), -7, device=DEVICE), (path.to(DEVICE), depth.to(DEVICE))
    op(*(given.to(DEVICE) for given in (accepted, token, count, draft)), state, report, *where)
    for s in range(4):
        new = int(accepted[s]) + 1 if left[s] else 0
        assert [int(part[s]) for part in state[:3]] == [
            int(token[s] if new else last[s]),
            int(length[s]) + new,
            int(left[s]) - new,
        ]
        deepest = max(depth[s, : int(count[s]) + 1].tolist())
        tokens = [0 if row == 0 else int(draft[s, row - 1]) for row in path[s, 1 : told + 1].tolist()]
        assert report[0, s].tolist() == [new - 1, int(count[s]), deepest, int(token[s]), *tokens]
