"""Logits of which no token can be chosen, as of activations that left the range of their dtype: −1 by every table."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("numba", reason="numba is not installed")

from skipjack.kernels.cpu.compiled import COMPILED
from skipjack.kernels.ops import TORCH, Ops
from skipjack.kernels.triton_ops import TRITON
from skipjack.kernels.values import Grown, Norm, Progress

TABLES = {"torch": TORCH, "compiled": COMPILED, "triton": TRITON}
every_table = pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SIZE = 1600
# Temperature, top_k, top_p, min_p.
RULES = [(0.0, 0, 1.0, 0.0), (0.8, 0, 1.0, 0.0), (0.8, 20, 0.9, 0.0), (1.5, 0, 0.6, 0.0), (0.8, 0, 1.0, 0.1)]


def scores(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of which nothing can be chosen, and others with NaN; those with −∞ in place of NaN."""
    given = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    given[0], given[1], given[2, ::2], given[2, 1::2] = torch.nan, -torch.inf, torch.nan, -torch.inf
    given[3, given[3].argmax()], given[4, :1100], given[5, 40:] = torch.nan, torch.nan, torch.nan
    return given, torch.where(given.isnan(), -torch.inf, given)


def rule_of(rows: int, rule: tuple[float, int, float, float]) -> list[Tensor]:
    temperature, top_k, top_p, min_p = rule
    return [
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.arange(rows) + 5,
    ]


@every_table
@every_dtype
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [None, 3])
def test_a_sample(ops: Ops, dtype: torch.dtype, rule: tuple[float, int, float, float], count: int | None) -> None:
    given, without = scores(dtype)
    *warping, seed = rule_of(len(given), rule)
    position = torch.full_like(seed, 9)
    token = ops.sample(given, *warping, seed, position, count=count).view(len(given), -1)
    assert token[:3].eq(-1).all()
    assert token[3:].ge(0).all()
    expected = TORCH.sample(without, *warping, seed, position, count=count).view(len(given), -1)
    assert torch.equal(token, expected)
    infinite = given[6:].clone()
    infinite[0, 700] = torch.inf
    found = ops.sample(infinite, *(field[6:] for field in warping), seed[6:], position[6:], count=count)
    assert found.flatten()[0] == (700 if rule[0] == 0 else -1)


@every_table
@every_dtype
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_head(ops: Ops, dtype: torch.dtype, top_k: int | None, reduced: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((4, 64), (SIZE, 64)))
    norm, ids = Norm(torch.ones(64, dtype=dtype), None, 1e-5), torch.arange(SIZE) * 2 if reduced else None
    plain = ops.head(x, norm, ops.prepare(weight), tile=ops.decode_tile, top_k=top_k, ids=ids).token
    x[1], x[2, 3] = torch.nan, torch.inf
    found = ops.head(x, norm, ops.prepare(weight), tile=ops.decode_tile, top_k=top_k, ids=ids).token
    assert found[1:3].eq(-1).all()
    assert torch.equal(found[[0, 3]], plain[[0, 3]])
    best = plain.view(4, -1)[0, 0] // (2 if reduced else 1)
    weight[best] = torch.nan
    found = ops.head(x, norm, ops.prepare(weight), tile=ops.decode_tile, top_k=top_k, ids=ids).token
    weight[best] = 0
    expected = TORCH.head(x, norm, TORCH.prepare(weight), tile=TORCH.decode_tile, top_k=top_k, ids=ids).token
    assert torch.equal(found[0], expected[0])


@every_table
@every_dtype
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("certain", [True, False])
def test_a_rejection(
    ops: Ops, dtype: torch.dtype, rule: tuple[float, int, float, float], shape: str, certain: bool
) -> None:
    """NaN before any draft token, after one that is accepted, and in what the draft was drawn from."""
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(4, 4, SIZE, generator=generator).to(dtype)
    draft = torch.randint(SIZE, (4, 3), generator=generator)
    given[torch.arange(4), 0, draft[:, 0]] = 60  # That one is accepted.
    given[0], given[1, 1:] = torch.nan, torch.nan
    given[2, 1:] = -torch.inf
    proposals = None if certain else torch.randn(4, 3, SIZE, generator=generator).to(dtype)
    if proposals is not None:
        proposals[3] = torch.nan
    *warping, seed = rule_of(4, rule)
    count, length = torch.full((4,), 3), torch.arange(4) + 10
    parent = torch.tensor([[0, 1, 1]] * 4) if shape == "tree" else None

    def of(table: Ops) -> list[Tensor]:
        return list(table.verify_rejection(given, draft, proposals, count, length, *warping, seed, parent=parent))

    found = of(ops)
    assert found[0][:3].tolist() == [0, 1, 1]
    assert found[1][:3].tolist() == [-1, -1, -1]
    assert found[1][3] >= 0
    for mine, expected in zip(found, of(TORCH), strict=True):
        assert torch.equal(mine, expected)


@every_table
def test_a_draft_and_the_next_round_start_from_a_token(ops: Ops) -> None:
    """The host is told −1; what the device goes on from is token 0, which is safe to look up."""
    out, going = torch.full((3,), 7), torch.tensor([True, True, False])
    token = torch.tensor([-1, 5, -1])
    ops.extend(None, going, torch.full((3,), 4), token, None, None, None, out)
    assert out.tolist() == [0, 5, 0]

    progress = Progress.of(torch.tensor([3, 3, 3]), torch.tensor([4, 4, 4]), torch.tensor([5, 5, 0]))
    report, times = torch.zeros(1, 3, 4, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int32)
    text = torch.full((3, 12), 8, dtype=torch.int32)
    ops.commit(None, token, None, None, progress, report, times=times, text=text)
    assert report[0, :, 3].tolist() == [-1, 5, -1]
    assert progress.last.tolist() == [0, 5, 3]
    assert times.tolist() == [[1, *[0] * 8], [*[0] * 5, 1, 0, 0, 0], [0] * 9]
    assert text[:, 5].tolist() == [0, 5, 8]

    tree = Grown.bare(torch.full((1,), 6), 4, 2)
    unlikely: Any = torch.full((1,), -1.0)
    ops.branch(tree, torch.full((1,), 4), torch.tensor([[-1, 3, -1]]), unlikely, torch.zeros(1), None, widths=())
    assert tree.token[0, :2].tolist() == [0, 3]
