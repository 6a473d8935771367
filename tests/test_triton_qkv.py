"""The fused projection against float64, and each of its rows against itself among other rows."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from skipjack.kernels import qkv
from skipjack.kernels.linear import prepare
from skipjack.kernels.product_rules import projection_rule
from skipjack.kernels.triton_ops import TRITON
from skipjack.kernels.values import Norm, Rope, Slots

TILE = 8
PAGE = 16
RTOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(qkv.torch, "empty", empty)


class Case:
    """One layer's inputs, with its caches views of larger ones, NaN everywhere."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        head_norm: bool = False,
        norm_bias: bool = False,
        rotated: bool = True,
        eight_bits: bool = False,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim, self.rows, self.dtype = heads, kv_heads, head_dim, rows, dtype
        total = (heads + 2 * kv_heads) * head_dim
        self.x = randn(rows, hidden, dtype=dtype)
        weight = (randn(total, hidden, seed=1) / hidden**0.5).to(dtype)
        self.matrix, self.values = prepare(weight), weight.double()
        if eight_bits:
            self.matrix = TRITON.quantise(self.matrix)
            assert self.matrix.scale is not None
            self.values = self.matrix.data[:, :hidden].double() * self.matrix.scale.double()[:, None]
        self.norm = Norm(
            1 + randn(hidden, dtype=dtype, seed=2) / 4, randn(hidden, dtype=dtype, seed=3) if norm_bias else None, 1e-5
        )
        self.bias = randn(total, dtype=dtype, seed=4) if bias else None
        self.q_norm = 1 + randn(head_dim, dtype=dtype, seed=5) / 4 if head_norm else None
        self.k_norm = 1 + randn(head_dim, dtype=dtype, seed=6) / 4 if head_norm else None
        self.rope = None
        if rotated:
            angle = torch.arange(rows)[:, None, None] * 0.3 + torch.rand(head_dim // 2)
            cos, sin = angle.cos(), angle.sin()
            self.rope = Rope(torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float())
        place = torch.randperm(4 * PAGE, generator=torch.Generator().manual_seed(7))[:rows]
        assert rows <= 4 * PAGE
        self.slots = Slots(place // PAGE, place % PAGE)

    def caches(self) -> tuple[Tensor, Tensor]:
        cache = torch.full((2, 3, 4, self.kv_heads, PAGE, self.head_dim), torch.nan, dtype=self.dtype)
        return cache[0, 1], cache[1, 1]

    def run(
        self, keys: Tensor, values: Tensor, rows: Tensor | None = None, tile: int = TILE, **masks: Tensor
    ) -> Tensor:
        rows = torch.arange(self.rows) if rows is None else rows
        rope = None if self.rope is None else Rope(self.rope.cos[rows], self.rope.sin[rows])
        slots = Slots(self.slots.page[rows], self.slots.offset[rows])
        inputs = (self.x[rows], self.norm, self.matrix, self.bias, self.q_norm, self.k_norm, rope)
        return qkv.qkv_rope_append(*inputs, keys, values, slots, heads=self.heads, tile=tile, **masks)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of every row: [R, heads, D] and twice [R, kv_heads, D], float64."""
        z = self.x.double()
        if self.norm.bias is None:
            z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.norm.weight.double()
        else:
            z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            z = z * self.norm.weight.double() + self.norm.bias.double()
        y = z @ self.values.T
        if self.bias is not None:
            y = y + self.bias.double()
        q, k, v = y.view(self.rows, -1, self.head_dim).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return self._positioned(q, self.q_norm), self._positioned(k, self.k_norm), v

    def _positioned(self, x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
        if self.rope is None:
            return x
        half = self.head_dim // 2
        cos, sin = self.rope.cos[..., half:].double(), self.rope.sin[..., half:].double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def written(cache: Tensor, slots: Slots, rows: Tensor) -> Tensor:
    """The written rows [n, kv_heads, D] of a cache in which nothing else is."""
    page, offset = slots.page[rows], slots.offset[rows]
    got = cache[page, :, offset].clone()
    rest = cache.clone()
    rest[page, :, offset] = torch.nan
    assert rest.isnan().all()
    assert cache._base is not None
    assert cache._base.isnan().sum() == cache._base.numel() - sum(
        view.numel() - view.isnan().sum() for view in (cache._base[0, 1], cache._base[1, 1])
    )
    return got


def assert_near(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).norm() / expected.norm()
    assert error < RTOL[got.dtype], f"relative error {error:.2e}"


CASES = {
    "llama": Case(576, 9, 3, 64, 5),
    "odd": Case(40, 3, 1, 12, 7, bias=True),
    "odd-norm": Case(33, 4, 2, 12, 3, head_norm=True, bias=True),
    "wide-head": Case(96, 2, 1, 80, 9, bias=True),
    "whole-head": Case(48, 2, 2, 80, 16, head_norm=True),
    "no-rope": Case(40, 2, 1, 16, 4, rotated=False, head_norm=True),
    "alibi": Case(33, 3, 3, 16, 6, rotated=False, norm_bias=True, bias=True),
    "two-tiles": Case(64, 4, 1, 32, 13),
    "bfloat16": Case(64, 4, 2, 32, 8, dtype=torch.bfloat16, bias=True, head_norm=True),
    "float16": Case(80, 4, 2, 20, 9, dtype=torch.float16, bias=True),
    "eight bits": Case(576, 3, 1, 64, 9, eight_bits=True),
    "eight bits, odd": Case(33, 4, 2, 12, 3, head_norm=True, bias=True, eight_bits=True),
    "eight bits, alibi": Case(40, 2, 2, 16, 6, rotated=False, norm_bias=True, bias=True, eight_bits=True),
    "eight bits, bfloat16": Case(64, 4, 2, 32, 17, dtype=torch.bfloat16, bias=True, head_norm=True, eight_bits=True),
    "eight bits, float16": Case(80, 4, 2, 20, 9, dtype=torch.float16, bias=True, eight_bits=True),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula_and_writes_only_its_slots(name: str) -> None:
    case = CASES[name]
    keys, values = case.caches()
    q, k, v = case.expected()
    assert_near(case.run(keys, values), q)
    rows = torch.arange(case.rows)
    assert_near(written(keys, case.slots, rows), k)
    assert_near(written(values, case.slots, rows), v)


def test_prefill_of_many_tiles() -> None:
    case = Case(40, 2, 1, 12, 64)
    keys, values = case.caches()
    q, k, v = case.expected()
    assert_near(case.run(keys, values, tile=32), q)
    assert_near(written(keys, case.slots, torch.arange(64)), k)
    assert_near(written(values, case.slots, torch.arange(64)), v)


@pytest.mark.parametrize("active", ["none", "some", "all", None])
@pytest.mark.parametrize("write", ["none", "some", "all", None])
def test_masks_choose_queries_and_writes_apart(active: str | None, write: str | None) -> None:
    case = Case(40, 3, 1, 12, 13, bias=True)
    some = torch.arange(13) % 3 == 1
    some[8:] = False
    masks = {"none": torch.zeros(13, dtype=torch.bool), "some": some, "all": torch.ones(13, dtype=torch.bool)}
    keys, values = case.caches()
    given = {"active": active, "write": write}
    got = case.run(keys, values, **{name: masks[mask] for name, mask in given.items() if mask is not None})
    q, k, v = case.expected()
    queried, stored = (masks[mask or "all"] for mask in (active, write))
    if queried.any():
        assert_near(got[queried], q[queried])
    assert got[~queried].isnan().all()
    rows = torch.nonzero(stored).flatten()
    kept = written(keys, case.slots, rows), written(values, case.slots, rows)
    if stored.any():
        assert_near(kept[0], k[stored])
        assert_near(kept[1], v[stored])


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("head_norm", [False, True])
def test_rows_do_not_depend_on_their_number_or_place(head_norm: bool, eight_bits: bool) -> None:
    case = Case(96, 3, 1, 24, 32, head_norm=head_norm, bias=True, eight_bits=eight_bits)
    keys, values = case.caches()
    q = case.run(keys, values)
    assert not q.isnan().any()
    for rows in (torch.tensor([5]), torch.tensor([31, 2, 7]), torch.randperm(32)[:16], torch.arange(32).flip(0)):
        own_keys, own_values = case.caches()
        assert torch.equal(case.run(own_keys, own_values, rows), q[rows])
        assert torch.equal(written(own_keys, case.slots, rows), written(keys, case.slots, torch.arange(32))[rows])
        assert torch.equal(written(own_values, case.slots, rows), written(values, case.slots, torch.arange(32))[rows])


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_mask_changes_no_bit_of_the_rows_it_keeps(eight_bits: bool) -> None:
    case = Case(576, 3, 1, 64, 11, eight_bits=eight_bits)
    keys, values = case.caches()
    q = case.run(keys, values)
    active = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    masked_keys, masked_values = case.caches()
    got = case.run(masked_keys, masked_values, active=active, write=active)
    rows = torch.nonzero(active).flatten()
    assert torch.equal(got[active], q[active])
    assert torch.equal(written(masked_keys, case.slots, rows), keys[case.slots.page, :, case.slots.offset][active])
    assert torch.equal(written(masked_values, case.slots, rows), values[case.slots.page, :, case.slots.offset][active])


@pytest.mark.parametrize(
    ("head_dim", "whole", "weight_rows", "blocks"),
    [
        # Blocks of 32 rows would be fewer than the processors.
        (64, False, 960, (16, 16)),
        (128, False, 6144, (32, 64)),
        (128, True, 6144, (128, 128)),
        (12, False, 6144, (16, 16)),
        (80, True, 960, (128, 128)),
    ],
)
def test_projection_rule_holds_pairs_of_one_head(
    head_dim: int, whole: bool, weight_rows: int, blocks: tuple[int, int]
) -> None:
    rules = [projection_rule(head_dim, whole, weight_rows, 4096, rows, 8, 2, 90) for rows in (1, 8, 16)]
    assert [rule.block_n for rule in rules] == [blocks[0], *blocks]
    assert len({rule.block_k for rule in rules}) == 1
