"""The verification and compaction kernels make the decisions and moves of the PyTorch ops."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from skipjack.kernels import chains, partials, rejection, residual
from skipjack.kernels.compact import compact
from skipjack.kernels.reference import verify as reference_verify
from skipjack.kernels.values import Verdict
from skipjack.kernels.verify import verify, verify_rejection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUSH = [0, 0, 0, 1]


@pytest.fixture(autouse=True)
def poisoned(poison: Callable[[ModuleType], None]) -> None:
    for module in (chains, partials, rejection, residual):
        poison(module)


def same(got: Verdict, expected: Verdict) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [0, 1, 5, 15, 16])
def test_verify(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    target = torch.randint(0, 2, (6, k + 1), generator=generator)
    draft = torch.randint(0, 2, (6, k), generator=generator)
    draft[::2] = target[::2, :k]
    count, length = torch.randint(0, k + 1, (6,), generator=generator), torch.arange(6) * 1000
    count[::4] = k
    chain = [tensor.to(DEVICE) for tensor in (target, draft, count, length)]
    same(verify(*chain), reference_verify.verify(*chain))

    parent = (torch.rand(6, k, generator=generator) * torch.arange(1, k + 1)).long()
    for j in range(k):
        twin = (parent[:, :j] == parent[:, j : j + 1]) & (draft[:, :j] == draft[:, j : j + 1])
        draft[:, j] = torch.where(twin.any(dim=1), 100 + j, draft[:, j])
    tree = [tensor.to(DEVICE) for tensor in (target, draft, count, length, parent)]
    same(verify(*tree), reference_verify.verify(*tree))
    tree[1], tree[4] = (torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (tree[1], tree[4]))
    same(verify(*tree), reference_verify.verify(*tree))


def drafted(scores: Tensor, parent: list[int], seed: int) -> Tensor:
    """Draft tokens int64 [S, k]: the children of a row drawn from its scores [S, k, V] without replacement."""
    draft = torch.empty(scores.shape[:2], dtype=torch.int64)
    race = torch.empty(scores.shape).exponential_(generator=torch.Generator().manual_seed(seed))
    order = (scores.float() - race.log()).argsort(dim=-1, descending=True)
    for j, row in enumerate(parent):
        draft[:, j] = order[:, row, sum(follows == row for follows in parent[:j])]
    return draft


@pytest.mark.parametrize(
    ("size", "dtype", "parent", "drafter", "seed"),
    [
        (12, torch.float32, [0, 1, 2], "whole", 0),
        (40, torch.bfloat16, BUSH, "whole", 1),
        (33, torch.float16, BUSH, "reduced", 2),
        (1000, torch.bfloat16, BUSH, "certain", 3),
        (4099, torch.bfloat16, [0, 1], "reduced", 4),
        (9000, torch.bfloat16, [0, 0], "whole", 5),
        (12, torch.bfloat16, [], "whole", 6),
    ],
)
def test_rejection(size: int, dtype: torch.dtype, parent: list[int], drafter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences, k = 6, len(parent)
    scores = torch.randn(sequences, k + 1, size, generator=generator) * 2
    scores[:, :, 3::7] = -torch.inf
    draft_scores = scores[:, :k] + torch.randn(sequences, k, size, generator=generator) * 0.7
    ids = torch.randperm(size, generator=generator)[: size * 2 // 3].sort().values if drafter == "reduced" else None
    if ids is not None:
        draft_scores = torch.full_like(draft_scores, -torch.inf).index_copy_(2, ids, draft_scores[:, :, ids])
    scores, draft_scores = scores.to(dtype), draft_scores.to(dtype)
    draft = drafted(draft_scores, parent, seed)
    draft[5, :] = torch.arange(k) + 4
    count = torch.full((sequences,), k)
    count[4] = min(k, 1)
    arguments = [
        scores,
        draft,
        None if drafter == "certain" else draft_scores,
        count,
        torch.arange(sequences) * 31,
        torch.tensor([1.0, 0.0, 0.8, 1.0, 1.4, 1.0]),
        torch.tensor([0, 0, 6, 0, 0, 0]),
        torch.tensor([1.0, 0.5, 1.0, 0.9, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 0.0]),
        torch.randint(-(2**63), 2**63 - 1, (sequences,), generator=generator),
    ]
    arguments = [argument if argument is None else argument.to(DEVICE) for argument in arguments]
    chain = parent == list(range(k))
    options = {"parent": None if chain else torch.tensor(parent, device=DEVICE).expand(sequences, k)}
    expected = reference_verify.verify_rejection(*arguments, **options)
    same(verify_rejection(*arguments, **options), expected)
    if chain:
        options["parent"] = torch.tensor(parent, dtype=torch.int64, device=DEVICE).expand(sequences, k)
        same(verify_rejection(*arguments, **options), expected)


@pytest.mark.parametrize("op", [verify_rejection, reference_verify.verify_rejection], ids=["triton", "torch"])
def test_scores_may_be_given_once_for_every_depth(op: Callable[..., Verdict]) -> None:
    generator = torch.Generator().manual_seed(2)
    sequences, size, depth = 16, 23, [0, 1, 1, 1, 2]
    scores = torch.randn(sequences, 5, size, generator=generator)
    draft_scores = torch.randn(sequences, 2, size, generator=generator)
    draft = drafted(draft_scores[:, depth[:4]], BUSH, 1)
    one = torch.ones(sequences)
    count, length, seed = one.long() * 4, one.long(), torch.arange(sequences)
    rest = [given.to(DEVICE) for given in (count, length, one, one.long() * 0, one, one * 0, seed)]
    parent, drawn = (torch.tensor(given, device=DEVICE).expand(sequences, -1) for given in (BUSH, depth))
    scores, draft, draft_scores = (given.to(DEVICE) for given in (scores, draft, draft_scores))
    got = op(scores, draft, draft_scores, *rest, parent=parent, drawn=drawn)
    same(got, op(scores, draft, draft_scores[:, depth[:4]], *rest, parent=parent))
    assert set(got.accepted.tolist()) == {0, 1, 2}


def test_many_small_rounds_of_rejection() -> None:
    """Plain temperatures, where a row is cheap: hundreds of decisions, siblings rejected to the last."""
    generator = torch.Generator().manual_seed(9)
    sequences, parent = 24, [0, 0, 0]
    scores = torch.randn(sequences, 4, 7, generator=generator)
    draft_scores = torch.randn(sequences, 3, 7, generator=generator) * 2
    draft_scores[::5, :, 2:] = -torch.inf
    one = torch.ones(sequences)
    arguments = [
        scores, drafted(draft_scores, parent, 1), draft_scores, one.long() * 3, one.long(), one, one.long() * 0, one,
        one * 0, torch.arange(sequences),
    ]  # fmt: skip
    arguments = [argument.to(DEVICE) for argument in arguments]
    tree = torch.tensor(parent, device=DEVICE).expand(sequences, 3)
    got = verify_rejection(*arguments, parent=tree)
    same(got, reference_verify.verify_rejection(*arguments, parent=tree))
    assert set(got.accepted.tolist()) == {0, 1}


@pytest.mark.parametrize(("kv_heads", "page_size", "head_dim", "dtype"), [(3, 16, 64, torch.bfloat16), (1, 4, 5, None)])
def test_compact(kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype | None) -> None:
    shape = (2, 30, kv_heads, page_size, head_dim)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(shape, generator=generator).to(DEVICE, dtype or torch.float32)
    values = torch.randn(shape, generator=generator).to(DEVICE, dtype or torch.float32)
    table = torch.randperm(29, generator=generator)[:20].view(4, 5).to(DEVICE)
    path = torch.tensor([[0, 2, 3, 4, 9], [0, 1, 2, 3, 4], [0, 3, 3, 3, 3], [0, 1, 4, 5, 5]], device=DEVICE)
    accepted, length = torch.tensor([4, 4, 0, 3], device=DEVICE), torch.tensor([2, 0, 5, 7], device=DEVICE)
    wide = torch.cat([table, table], dim=1)
    for index in (table, table.int(), wide[:, :5]):
        expected = keys.clone(), values.clone()
        reference_verify.compact(*expected, index, path, accepted, length)
        got = keys.clone(), values.clone()
        compact(*got, index, path, accepted, length)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    compact(keys, values, table, path[:, :1], accepted * 0, length)
    fewer = torch.tensor([0, 1, 0, 1], device=DEVICE)
    expected, got = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    reference_verify.compact(*expected, table, path, fewer, length)
    compact(*got, table, path[:, :2], fewer, length)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
