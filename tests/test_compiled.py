"""The compiled operations of a CPU against float64, over memory that is poisoned; which of its two tables is in use."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="numba is not installed")

import numba

from skipjack import Engine, SamplingParams
from skipjack.kernels import ops
from skipjack.kernels.attention_index import AttentionIndex
from skipjack.kernels.cpu import compiled, instructions, openmp
from skipjack.kernels.cpu.lanes import exp, kernel, read, splat, write
from skipjack.kernels.ops import TORCH
from skipjack.kernels.reference import dense
from skipjack.kernels.values import Norm, Rope, RowMap, Slots, Stack, Tree
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights

DTYPES = [torch.float32, torch.bfloat16]
RTOL = {torch.float32: 1e-6, torch.bfloat16: 3e-3}


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(compiled)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < RTOL[got.dtype], f"relative error {error:.2e}"


@numba.njit("void(int64, int64, int64)")
def exponentials(x: int, out: int, count: int) -> None:
    for i in range(0, count, 16):
        write(out, i, exp(read(x, i, False)), False)


@numba.njit("void(int64, int64, int64)")
def roundings(x: int, out: int, count: int) -> None:
    for i in range(0, count, 16):
        write(out, i, read(x, i, False) * splat(1.0), True)


@numba.njit("void(int64, int64, int64)")
def widenings(x: int, out: int, count: int) -> None:
    for i in range(0, count, 16):
        write(out, i, read(x, i, True), False)


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    x = torch.cat([torch.linspace(-86.9, 87.9, 1 << 18), randn(1 << 16), torch.zeros(16)])
    out = torch.full_like(x, torch.nan)
    exponentials(x.data_ptr(), out.data_ptr(), len(x))
    exact = x.double().exp()
    assert ((out.double() - exact) / exact).abs().max() < 2 * 2**-23
    assert out[-1] == 1


def test_exp_beyond_its_range_stays_at_its_ends() -> None:
    x = torch.tensor([-torch.inf, -1e30, -200.0, 100.0, 1e30, torch.inf, torch.nan, -0.0]).repeat(2)
    out = torch.full_like(x, 7.0)
    exponentials(x.data_ptr(), out.data_ptr(), len(x))
    assert (out[:3] < 2e-38).all()
    assert (out[:3] >= 0).all()
    assert (out[3:6] > 1e38).all()
    assert out[3:6].isfinite().all()
    assert out[6].isnan()
    assert out[7] == 1


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    halfway = torch.arange(0x3F800000, 0x3F900000, 0x8000).to(torch.int32)
    x = torch.cat([bits, halfway, halfway + 1, halfway - 1]).view(torch.float32)
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45] * 2)])
    x = x[: len(x) // 16 * 16].clone()
    out = torch.zeros(len(x), dtype=torch.bfloat16)
    roundings(x.data_ptr(), out.data_ptr(), len(x))
    nearest = x.bfloat16()
    assert out[x.isnan()].isnan().all()
    # An instruction for it makes 0 of what is below the least normal number.
    tiny = (x.abs() < torch.finfo(torch.float32).tiny) & instructions.PAIRED
    assert (out[tiny] == 0).all()
    known = ~x.isnan() & ~tiny
    assert torch.equal(out[known].view(torch.int16), nearest[known].view(torch.int16))
    wide = torch.zeros(len(x))
    widenings(out.data_ptr(), wide.data_ptr(), len(x))
    assert torch.equal(wide[known], out.float()[known])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [16, 576, 4096])
def test_normalise(width: int, centred: bool, dtype: torch.dtype) -> None:
    x, weight, bias = randn(7, width, dtype=dtype), randn(width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    got = compiled.normalise(x, Norm(weight, bias if centred else None, 1e-5))
    wide = x.double() - (x.double().mean(1, keepdim=True) if centred else 0)
    expected = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_near(got, expected + (bias.double() if centred else 0))
    every_other = compiled.normalise(x[::2], Norm(weight, bias if centred else None, 1e-5))
    assert torch.equal(every_other, got[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    y = 4 * randn(9, 96, dtype=dtype)
    gate, up = y.double().chunk(2, 1)
    assert_near(compiled._activate(y, "silu_gate"), gate / (1 + (-gate).exp()) * up)
    wide = y.double()
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    assert_near(compiled._activate(y, "gelu_tanh"), 0.5 * wide * (1 + inner.tanh()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 33])
def test_a_mask_changes_no_bit_of_an_activation(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 48 columns the kernel takes vectors, though not of their half; 33, of whose half it could, are not for it."""
    x, weight = randn(9, 64, dtype=dtype), compiled.prepare(randn(width, 64, dtype=dtype, seed=1) / 8)
    if width == 33:
        monkeypatch.setattr(compiled.small_ops, "gelu_tanh", lambda *_: pytest.fail("elements beyond the last"))
    plain = compiled.linear(x, weight, tile=8, activation="gelu_tanh")
    masked = compiled.linear(x, weight, tile=8, activation="gelu_tanh", active=torch.ones(9, dtype=torch.bool))
    assert torch.equal(plain, masked)


@pytest.mark.parametrize("table", [compiled.COMPILED, TORCH], ids=["compiled", "torch"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu_gate"])
@pytest.mark.parametrize("width", [96, 50])
def test_a_residual_is_added_after_the_activation(width: int, activation: str, table: Any) -> None:
    x, weight = randn(5, 64, dtype=torch.float32), randn(width, 64, dtype=torch.float32, seed=1) / 8
    y = dense.activate(x.double() @ weight.double().T, activation)
    residual = randn(5, y.shape[1], dtype=torch.float32, seed=2)
    expected = y + residual.double()
    assert_near(table.linear(x, table.prepare(weight), tile=8, activation=activation, residual=residual), expected)
    assert_near(residual, expected)


class Projected:
    """What `qkv_rope_append` is given, and where it writes: pages of NaN."""

    def __init__(self, head_dim: int, dtype: torch.dtype, normed: bool, rotated: bool) -> None:
        self.heads, self.kv_heads, self.dim, rows = 6, 2, head_dim, 11
        self.x = randn(rows, 64, dtype=dtype)
        self.weight = randn((6 + 2 * 2) * head_dim, 64, dtype=dtype, seed=1) / 8
        self.norm = Norm(randn(64, dtype=dtype, seed=2), None, 1e-6)
        self.head_norms = [randn(head_dim, dtype=dtype, seed=s) for s in (3, 4)] if normed else [None, None]
        angle = randn(rows, 1, head_dim // 2, seed=5)
        self.angle = angle if rotated else torch.zeros_like(angle)
        cos, sin = angle.cos().repeat(1, 1, 2), torch.cat([-angle.sin(), angle.sin()], -1)
        self.rope = Rope(cos, sin) if rotated else None
        self.slots = Slots(torch.tensor([1, 2] * 5 + [3]), torch.arange(rows) * 3)
        self.keys, self.values = torch.full((2, 4, 2, 40, head_dim), torch.nan, dtype=dtype)

    def run(self, rows: list[int], write: Tensor | None = None) -> Tensor:
        rope = None if self.rope is None else Rope(self.rope.cos[rows], self.rope.sin[rows])
        slots = Slots(self.slots.page[rows], self.slots.offset[rows])
        return compiled.qkv_rope_append(
            self.x[rows], self.norm, TORCH.prepare(self.weight), None, *self.head_norms, rope, self.keys, self.values,
            slots, heads=self.heads, tile=8, write=write,
        )  # fmt: skip

    def written(self) -> tuple[Tensor, Tensor]:
        """The keys and values in the rows' slots; every other slot is as it was."""
        slots = torch.zeros(4, 40, dtype=torch.bool)
        slots[self.slots.page, self.slots.offset] = True
        for cache in (self.keys, self.values):
            assert cache.transpose(1, 2)[~slots].isnan().all()
        return tuple(cache[self.slots.page, :, self.slots.offset] for cache in (self.keys, self.values))

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in float64 from the products as they are rounded."""
        y = compiled.linear(self.x, TORCH.prepare(self.weight), tile=8, norm=self.norm).double()
        q, k, v = y.view(len(y), -1, self.dim).split([self.heads, self.kv_heads, self.kv_heads], 1)
        turned: list[Tensor] = []
        for part, norm in zip((q, k), self.head_norms, strict=True):
            if norm is not None:
                part = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()  # noqa: PLW2901
            a, b = part.chunk(2, -1)
            cos, sin = self.angle.double().cos(), self.angle.double().sin()
            turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
        return turned[0], turned[1], v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "normed", "rotated"), [(64, False, True), (128, True, True), (80, False, True), (32, True, False)]
)
def test_qkv_rope_append(head_dim: int, normed: bool, rotated: bool, dtype: torch.dtype) -> None:
    case = Projected(head_dim, dtype, normed, rotated)
    q = case.run(list(range(11)))
    for got, expected in zip((q, *case.written()), case.exact(), strict=True):
        assert (got.double() - expected).norm() < 3 * RTOL[dtype] * expected.norm()
    keys, values = case.keys.clone(), case.values.clone()
    alone = torch.cat([case.run([row]) for row in range(11)])
    assert torch.equal(alone, q)
    assert torch.equal(case.keys.nan_to_num(9), keys.nan_to_num(9))
    assert torch.equal(case.values.nan_to_num(9), values.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_write_nothing_leave_their_slots(dtype: torch.dtype) -> None:
    case = Projected(64, dtype, False, True)
    case.run(list(range(11)))
    keys, values = case.keys.clone(), case.values.clone()
    for cache in (case.keys, case.values):
        cache.fill_(torch.nan)
    write = torch.arange(11) % 3 != 1
    case.run(list(range(11)), write)
    for cache, whole in ((case.keys, keys), (case.values, values)):
        got = cache[case.slots.page, :, case.slots.offset]
        assert torch.equal(got[write], whole[case.slots.page, :, case.slots.offset][write])
        assert got[~write].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_filled_keys_are_those_the_layer_would_have_written(dtype: torch.dtype) -> None:
    case = Projected(64, dtype, True, True)
    case.run(list(range(11)))
    keys, values = torch.full((2, 1, *case.keys.shape), torch.nan, dtype=dtype)
    row = torch.arange(11, dtype=torch.int32)[None]
    norm = Norm(case.norm.weight[None], None, case.norm.eps)
    k_norm = case.head_norms[1]
    assert k_norm is not None
    compiled.fill_kv(
        case.x, RowMap(row, torch.tensor([11])), norm, Stack((TORCH.prepare(case.weight),), None), None, k_norm[None],
        case.rope, None, keys, values, case.slots, heads=case.heads, tile=8,
    )  # fmt: skip
    assert torch.equal(keys[0].nan_to_num(9), case.keys.nan_to_num(9))
    assert torch.equal(values[0].nan_to_num(9), case.values.nan_to_num(9))


SEEN = [(9, 3, 64, None, False), (4, 4, 16, None, True), (8, 2, 128, 300, False), (6, 2, 80, 40, True)]


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "window", "alibi"), SEEN)
def test_attention_reads_what_a_row_sees_and_no_more(
    heads: int, kv_heads: int, head_dim: int, window: int | None, alibi: bool, dtype: torch.dtype
) -> None:
    """Slots past a row's position and before its window, and pages of others, hold NaN."""
    size, last = 64, 700
    table = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:12].view(1, 12)
    flat = randn(2, last + 1, kv_heads, head_dim, dtype=dtype)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    for at in (0, 1, 15, 16, 63, 64, 639, last):
        first = 0 if window is None else max(0, at - window + 1)
        keys, values = torch.full((2, 24, kv_heads, size, head_dim), torch.nan, dtype=dtype)
        span = torch.arange(first, at + 1)
        for cache, part in ((keys, flat[0]), (values, flat[1])):
            cache[table[0, span // size], :, span % size] = part[span]
        q = randn(1, heads, head_dim, dtype=dtype, seed=2)
        index = AttentionIndex(torch.tensor([0]), torch.tensor([at]), table, page_size=size, tile=8)
        got = compiled.attend(q, keys, values, index, scale=head_dim**-0.5, window=window, slopes=slopes)
        k, v = (part[span].double().repeat_interleave(heads // kv_heads, 1) for part in flat)
        scores = torch.einsum("hd,thd->ht", q[0].double(), k) / head_dim**0.5
        if slopes is not None:
            scores += slopes.double()[:, None] * (span - at)
        assert_near(got[0], torch.einsum("ht,thd->hd", scores.softmax(-1), v).flatten())


def test_tensors_that_are_parts_of_others_are_read_as_they_lie() -> None:
    whole = randn(3, 6, 64)
    keys, values = randn(2, 3, 2, 64, 64, seed=1)
    table = torch.tensor([[9, 0, 1], [9, 2, 0]])[:, 1:]
    sequence, position = torch.tensor([0, 9, 0, 9, 1, 9])[::2], torch.tensor([70, 9, 71, 9, 80, 9])[::2]
    got, expected = (
        compiled.attend(q, keys, values, AttentionIndex(*rows, pages, page_size=64, tile=8), scale=0.1)
        for q, rows, pages in (
            (whole[:, :4], (sequence, position), table),
            (whole[:, :4].clone(), (sequence.clone(), position.clone()), table.clone()),
        )
    )
    assert torch.equal(got, expected)
    case = Projected(64, torch.float32, False, True)
    q, rope = case.run(list(range(11))), case.rope
    assert rope is not None
    wide = torch.stack([*rope, *rope], dim=-1)
    case.rope = Rope(wide[..., 0], wide[..., 1])
    pairs = torch.stack([*case.slots], dim=1)
    case.slots = Slots(pairs[:, 0], pairs[:, 1])
    keys = case.keys.clone()
    got = compiled.qkv_rope_append(
        case.x, case.norm, TORCH.prepare(case.weight), None, None, None, case.rope, case.keys, case.values,
        case.slots, heads=case.heads, tile=8,
    )  # fmt: skip
    assert torch.equal(got, q)
    assert torch.equal(case.keys.nan_to_num(9), keys.nan_to_num(9))


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_attention_of_keys_that_differ_a_lot_is_finite_and_right(scale: float, dtype: torch.dtype) -> None:
    keys, values = randn(2, 1, 1, 256, 64, dtype=dtype)
    q = randn(3, 1, 64, dtype=dtype, seed=1)
    index = AttentionIndex(
        torch.zeros(3).long(), torch.tensor([253, 254, 255]), torch.tensor([[0]]), page_size=256, tile=4
    )
    got = compiled.attend(q, keys, values, index, scale=scale)
    for row in range(3):
        k, v = keys[0, 0, : 254 + row].double(), values[0, 0, : 254 + row].double()
        expected = (k @ q[row, 0].double() * scale).softmax(0) @ v
        assert (got[row].double() - expected).norm() < 10 * RTOL[dtype] * (1 + scale) * expected.norm()


class Rows:
    """Rows of three sequences over shuffled pages, enough of them for a team of threads."""

    def __init__(self, seed: int = 0) -> None:
        self.keys, self.values = randn(2, 13, 2, 64, 32, dtype=torch.bfloat16, seed=seed)
        self.q = randn(11, 6, 32, dtype=torch.bfloat16, seed=seed + 1)
        table = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).view(3, 4) + 1
        sequence = torch.tensor([0] * 5 + [1] * 3 + [-1] + [2] * 2)
        position = torch.tensor([200, 201, 202, 203, 204, 7, 8, 9, 0, 254, 255])
        self.index = AttentionIndex(sequence, position, table, page_size=64, tile=16)

    def run(self) -> Tensor:
        return compiled.attend(self.q, self.keys, self.values, self.index, scale=0.2)


class Shared:
    """Rows that share keys: of a chain, far apart in a sequence, of no sequence, and of a tree with two branches."""

    def __init__(self, group: int, head_dim: int, dtype: torch.dtype) -> None:
        self.sequence = torch.tensor([0] * 9 + [-1] * 2 + [1] * 4 + [2] * 5)
        self.position = torch.tensor([*range(150, 159), 0, 0, 3, 40, 41, 99, 70, 71, 71, 72, 72])
        # Of sequence 2 the nodes after 70 positions lie in slots 70 to 74: 70 - 71 - 73 and 70 - 72 - 74.
        paths = [[]] * 15 + [[70], [70, 71], [70, 72], [70, 71, 73], [70, 72, 74]]
        length = [at + 1 for at in self.position[:15].tolist()] + [70] * 5
        self.tree = Tree(torch.tensor(length), torch.tensor([path + [10**9] * (3 - len(path)) for path in paths]))
        self.table = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(3, 4) + 1
        self.keys, self.values = randn(2, 13, 2, 48, head_dim, dtype=dtype)
        for cache in (self.keys, self.values):
            cache[0] = torch.nan
            for s, end in enumerate((159, 100, 75)):
                cache[self.table[s, end // 48], :, end % 48 :] = torch.nan
                cache[self.table[s, end // 48 + 1 :]] = torch.nan
        self.q = randn(20, 2 * group, head_dim, dtype=dtype, seed=1)

    def run(self, rows: list[int], window: int | None, slopes: Tensor | None, branches: bool) -> Tensor:
        tree = Tree(self.tree.length[rows], self.tree.slot[rows]) if branches else None
        index = AttentionIndex(self.sequence[rows], self.position[rows], self.table, page_size=48, tile=16, tree=tree)
        return compiled.attend(self.q[rows], self.keys, self.values, index, scale=0.2, window=window, slopes=slopes)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_rows_that_share_keys_have_the_bits_they_have_alone(
    group: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With many threads each would take its queries one by one.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    case, slopes = Shared(group, head_dim, dtype), 2.0 ** -torch.arange(1, 2 * group + 1)
    for window, slope in ((None, None), (37, None), (None, slopes), (5, slopes)):
        for branches in (False, True):
            # Without the tree rows 15 to 19 are a chain in which positions come twice.
            alone = torch.cat([case.run([row], window, slope, branches) for row in range(20)])
            assert alone.isfinite().all()
            assert not alone[9:11].any()
            for rows in ([*range(16)], [*range(4, 20)], [*range(1, 6)], [0, 3, 4, 8], [7, 8, 9, 11, 14], [15, 17, 19]):
                assert torch.equal(case.run(rows, window, slope, branches), alone[rows])
        # The path 70 - 71 - 73 where a chain would have it.
        chain = Shared(group, head_dim, dtype)
        for cache in (chain.keys, chain.values):
            cache[case.table[2, 1], :, 72 % 48] = cache[case.table[2, 1], :, 73 % 48]
        assert torch.equal(chain.run([18], window, slope, False), alone[18:19])


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_tree_stand_in_any_order(dtype: torch.dtype) -> None:
    """A later row's window begins before the first one's; a tree may hold more slots than a row has seen."""
    keys, values = randn(2, 4, 1, 64, 64, dtype=dtype)
    q, table = randn(3, 1, 64, dtype=dtype, seed=1), torch.tensor([[2, 0, 3, 1]])
    trees = (
        ([102, 101, 100], [100] * 3, [[100, 101, 102], [100, 103, 0], [100, 0, 0]], (None, 10, 80)),
        ([40, 150, 149], [200] * 3, [[200, 0, 0]] * 3, (None, 20)),
    )
    for at, length, slot, windows in trees:
        for window in windows:

            def run(rows: list[int], window: int | None, at: list[int], *tree: list[Any]) -> Tensor:
                index = AttentionIndex(
                    torch.zeros(len(rows)).long(), torch.tensor(at)[rows], table, page_size=64, tile=4,
                    tree=Tree(*(torch.tensor(part)[rows] for part in tree)),
                )  # fmt: skip
                return compiled.attend(q[rows], keys, values, index, scale=0.2, window=window)

            together = run([0, 1, 2], window, at, length, slot)
            for row in range(3):
                assert torch.equal(run([row], window, at, length, slot)[0], together[row]), (window, row)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("at", "window", "spoilt", "value"),
    [([100, 101, 102], None, 102, math.inf), ([100, 101, 102], 10, 91, math.nan), ([100, 300], 10, 200, math.nan)],
)
def test_values_that_only_others_see_spoil_no_row(
    at: list[int], window: int | None, spoilt: int, value: float, dtype: torch.dtype
) -> None:
    keys, values = randn(2, 1, 1, 320, 64, dtype=dtype)
    values[0, 0, spoilt] = value
    q, sees = randn(3, 1, 64, dtype=dtype, seed=1), [p - (window or 10**9) < spoilt <= p for p in at]

    def run(rows: list[int]) -> Tensor:
        index = AttentionIndex(
            torch.zeros(len(rows)).long(), torch.tensor(at)[rows], torch.tensor([[0]]), page_size=320, tile=4
        )
        return compiled.attend(q[rows], keys, values, index, scale=0.2, window=window)

    together = run(list(range(len(at))))
    assert [not row.isfinite().all() for row in together] == sees
    for row, seen in enumerate(sees):
        assert seen or torch.equal(run([row])[0], together[row])


@pytest.mark.usefixtures("unit")
def test_threads_change_no_bit_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, threads = Rows(), torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(openmp, "team", lambda: 0)
        alone = rows.run()
        assert compiled.COMPILED.description(torch.bfloat16).count("all on one thread") == 1
    assert not alone.isnan().any()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for _ in range(50):
                assert torch.equal(rows.run(), alone)
    finally:
        torch.set_num_threads(threads)


def test_attention_may_be_called_by_several_threads_at_once() -> None:
    cases = [Rows(seed) for seed in range(4)]
    alone = [case.run() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            assert all(map(torch.equal, pool.map(Rows.run, cases), alone))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the library among what Linux has mapped")
def test_the_team_is_that_of_the_library_torch_has_loaded() -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this PyTorch has other threads")
    assert openmp.team() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [64, 49152])
def test_head(vocabulary: int, dtype: torch.dtype) -> None:
    x, norm = randn(5, 64, dtype=dtype), Norm(torch.ones(64, dtype=dtype), None, 1e-6)
    weight = randn(vocabulary // 2, 64, dtype=dtype, seed=1).repeat(2, 1)
    matrix, ids = TORCH.prepare(weight), torch.arange(vocabulary) * 3
    scores = compiled.logits(x, norm, matrix, tile=8)
    got = compiled.head(x, norm, matrix, tile=8)
    assert torch.equal(got.token, scores.double().argmax(1))
    assert torch.equal(got.value, scores.amax(1))
    assert (got.log_sum_exp.double() - scores.double().logsumexp(1)).abs().max() < 1e-5
    assert torch.equal(compiled.head(x, norm, matrix, tile=8, ids=ids).token, 3 * got.token)
    for row in range(5):
        alone = compiled.head(x[row : row + 1], norm, matrix, tile=8)
        assert [part[0] for part in alone] == [part[row] for part in got]


@pytest.mark.parametrize("dtype", DTYPES)
def test_which_rows_share_a_pass_changes_no_bit_of_a_model(
    synthetic: Callable[..., Engine], dtype: torch.dtype
) -> None:
    """A short sequence beside long ones, by any method: the tokens each has alone."""
    engine = synthetic("tiny", dtype=dtype)
    assert "compiled small operations" in engine.backend
    prompts = [[5, 6, 7], [9, 8] * 140, list(range(20, 90))]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
    for method in (
        "autoregressive",
        "swift",
        "swift:tree=true",
        "layerskip",
        "kangaroo:adapter=untrained,exit_layer=5",
    ):
        assert [o.token_ids for o in engine.generate(prompts, params, method=method)] == alone, method


def test_what_is_not_compiled_is_the_reference() -> None:
    x, norm = randn(3, 64, dtype=torch.float16), Norm(randn(64, dtype=torch.float16), None, 1e-5)
    assert torch.equal(compiled.normalise(x, norm), dense.normalise(x, norm))
    odd, norm = randn(3, 40), Norm(randn(40), None, 1e-5)
    assert torch.equal(compiled.normalise(odd, norm), dense.normalise(odd, norm))


def test_the_table_in_use_is_said_and_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.select("torch") is compiled.COMPILED
    assert "compiled small operations" in ops.select("torch").description(torch.bfloat16)
    assert "plain small operations" in ops.select("torch").description(torch.float16)
    monkeypatch.setenv("SKIPJACK_CPU_KERNELS", "torch")
    assert ops.select("torch") is TORCH
    assert "plain small operations" in ops.select("torch").description(torch.bfloat16)


def test_without_a_numba_that_can_be_imported_the_operations_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("Numba needs another NumPy")

    monkeypatch.setattr(ops, "import_module", refuse)
    assert ops.plain_because() == "numba cannot be imported: Numba needs another NumPy"
    assert ops.select("torch") is TORCH
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert ops.plain_because() == "numba is not installed"
    assert ops.select("torch") is TORCH


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_kernels_are_kept_on_disk_and_need_no_folder_to_keep_them(tmp_path: Path) -> None:
    load = "from skipjack.kernels.cpu.enter import lay as kernel; "
    load += "print(len(kernel.stats.cache_hits), len(kernel.stats.cache_misses))"
    kept = str(tmp_path / "kept")
    assert run(load, NUMBA_CACHE_DIR=kept).split() == ["0", "1"]
    assert run(load, NUMBA_CACHE_DIR=kept).split() == ["1", "0"]
    nowhere = {"kernel": kernel}
    exec("@kernel('int64(int64)')\ndef double(x):\n    return 2 * x\n", nowhere)
    assert nowhere["double"](21) == 42


@pytest.mark.parametrize(("dtype", "filled"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_passes_have_no_rows_but_their_own(dtype: torch.dtype, filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def spy(x: Tensor, *rest: object, **how: object) -> Tensor:
        seen.add(x.shape[0])
        return compiled.linear(x, *rest, **how)

    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    engine = Engine(config, synthetic_weights(config, 0, dtype, 0.3))
    model = engine._loaded()[0]
    monkeypatch.setattr(model, "ops", replace(model.ops, linear=spy))
    engine.generate([[5, 9, 11], [7] * 21, [8] * 67], SamplingParams(max_tokens=4, ignore_eos=True))
    assert seen == ({128, 4} if filled else {3, 91})
