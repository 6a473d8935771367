"""The cache fill of skipped layers: against float64, and bit for bit against the dense path."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from skipjack.kernels import fill, linear, qkv
from skipjack.kernels.reference import dense
from skipjack.kernels.reference import routes as reference_routes
from skipjack.kernels.values import Norm, Rope, RowMap, Slots

TILE = 8
PAGE = 16
PAGES = 6
EPS = 1e-5
RTOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Case:
    """The inputs of every layer, and which rows each fills."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rows: int,
        counts: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        head_norm: bool = False,
        norm_bias: bool = False,
        rotated: tuple[bool, ...] | bool = True,
    ) -> None:
        layers, total = len(counts), (heads + 2 * kv_heads) * head_dim
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.x = randn(rows, hidden, dtype=dtype)
        self.weight = (randn(layers, total, hidden, seed=1) / hidden**0.5).to(dtype)
        shift = randn(layers, hidden, dtype=dtype, seed=3) if norm_bias else None
        self.norm = Norm(1 + randn(layers, hidden, dtype=dtype, seed=2) / 4, shift, EPS)
        self.bias = randn(layers, total, dtype=dtype, seed=4) if bias else None
        self.k_norm = 1 + randn(layers, head_dim, dtype=dtype, seed=5) / 4 if head_norm else None
        angle = torch.arange(rows)[:, None, None] * 0.3 + torch.rand(head_dim // 2)
        cos, sin = angle.cos(), angle.sin()
        turn = Rope(torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float())
        self.rope = None if rotated is False else turn
        self.rotated = torch.tensor(rotated) if isinstance(rotated, tuple) else None
        place = torch.randperm(PAGES * PAGE, generator=torch.Generator().manual_seed(6))[:rows]
        self.slots = Slots(place // PAGE, place % PAGE)
        self.rows = RowMap(torch.full((layers, rows), -1, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32))
        for layer, count in enumerate(counts):
            chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(layer))[:count].sort().values
            self.rows.row[layer, :count] = chosen.int()

    def caches(self) -> tuple[Tensor, Tensor]:
        """Keys and values [L, pages, kv_heads, P, D], NaN everywhere."""
        shape = (len(self.rows.count), PAGES, self.kv_heads, PAGE, self.head_dim)
        return torch.full(shape, torch.nan, dtype=self.dtype), torch.full(shape, torch.nan, dtype=self.dtype)

    def chosen(self, layer: int) -> Tensor:
        return self.rows.row[layer, : int(self.rows.count[layer])].long()

    def turns(self, layer: int) -> bool:
        return self.rope is not None and (self.rotated is None or bool(self.rotated[layer]))

    def run(self, table: object = fill, tile: int = TILE) -> tuple[Tensor, Tensor]:
        keys, values = self.caches()
        weight = (linear if table is fill else dense).prepare_stack(self.weight)
        inputs = (self.x, self.rows, self.norm, weight, self.bias, self.k_norm, self.rope, self.rotated)
        assert table.fill_kv(*inputs, keys, values, self.slots, heads=self.heads, tile=tile) is None
        return keys, values

    def dense(self, table: object, tile: int = TILE) -> tuple[Tensor, Tensor]:
        """The caches after a dense pass of all rows through `qkv_rope_append`, all but the chosen rows NaN again."""
        dense_keys, dense_values = self.caches()
        keys, values = self.caches()
        for layer in range(len(self.rows.count)):
            head_norm = None if self.k_norm is None else self.k_norm[layer]
            table.qkv_rope_append(
                self.x,
                Norm(self.norm.weight[layer], None if self.norm.bias is None else self.norm.bias[layer], EPS),
                (linear if table is qkv else dense).prepare(self.weight[layer]),
                None if self.bias is None else self.bias[layer],
                head_norm,
                head_norm,
                self.rope if self.turns(layer) else None,
                dense_keys[layer],
                dense_values[layer],
                self.slots,
                heads=self.heads,
                tile=tile,
            )
            page, offset = (place[self.chosen(layer)] for place in self.slots)
            keys[layer][page, :, offset] = dense_keys[layer][page, :, offset]
            values[layer][page, :, offset] = dense_values[layer][page, :, offset]
        return keys, values

    def expected(self) -> tuple[Tensor, Tensor]:
        """The caches by the formulas in float64."""
        keys, values = (cache.double() for cache in self.caches())
        for layer in range(len(self.rows.count)):
            row = self.chosen(layer)
            z = self.x[row].double()
            gain = self.norm.weight[layer].double()
            if self.norm.bias is None:
                z = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt() * gain
            else:
                z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + EPS).sqrt() * gain
                z = z + self.norm.bias[layer].double()
            y = z @ self.weight[layer].double().T
            if self.bias is not None:
                y = y + self.bias[layer].double()
            y = y.view(len(row), self.heads + 2 * self.kv_heads, self.head_dim)[:, self.heads :]
            k, v = y[:, : self.kv_heads], y[:, self.kv_heads :]
            if self.k_norm is not None:
                k = k / (k.square().mean(-1, keepdim=True) + EPS).sqrt() * self.k_norm[layer].double()
            if self.rope is not None and self.turns(layer):
                half = self.head_dim // 2
                cos, sin = self.rope.cos[row, :, half:].double(), self.rope.sin[row, :, half:].double()
                k = torch.cat(
                    [k[..., :half] * cos - k[..., half:] * sin, k[..., half:] * cos + k[..., :half] * sin], -1
                )
            page, offset = self.slots.page[row], self.slots.offset[row]
            keys[layer][page, :, offset], values[layer][page, :, offset] = k, v
        return keys, values


CASES = {
    "llama": Case(576, 9, 3, 64, 3, (2, 0, 1)),
    "counts": Case(40, 3, 1, 12, 13, (0, 1, 13, 9, 8), bias=True, rotated=(True, True, False, True, False)),
    "odd-norm": Case(33, 4, 2, 12, 5, (5, 2), head_norm=True, bias=True),
    "wide-head": Case(96, 2, 1, 80, 9, (9, 3), head_norm=True),
    "no-rope": Case(33, 3, 3, 16, 6, (4, 6), rotated=False, norm_bias=True, bias=True),
    "nothing": Case(40, 2, 1, 16, 4, (0, 0)),
    "bfloat16": Case(64, 4, 2, 32, 10, (10, 3), dtype=torch.bfloat16, bias=True, head_norm=True),
    "float16": Case(80, 4, 2, 20, 7, (2, 7), dtype=torch.float16, bias=True),
}


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Equal where something is expected, NaN elsewhere."""
    assert torch.equal(got.isnan(), expected.isnan())
    error = (got.double() - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp_min(1e-30)
    assert error < RTOL[got.dtype], f"relative error {error:.2e}"


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for cache, wanted in zip(got, expected, strict=True):
        assert torch.equal(cache.isnan(), wanted.isnan())
        assert torch.equal(cache.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("table", [fill, reference_routes], ids=["triton", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_fill_is_the_formula_and_writes_only_its_slots(name: str, table: object) -> None:
    case = CASES[name]
    for got, expected in zip(case.run(table), case.expected(), strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("name", ["counts", "odd-norm", "wide-head", "no-rope", "bfloat16"])
@pytest.mark.parametrize(("sparse", "dense"), [(fill, qkv), (reference_routes, dense)], ids=["triton", "torch"])
def test_fill_gives_the_bits_of_the_dense_path(name: str, sparse: object, dense: object) -> None:
    case = CASES[name]
    assert_same(case.run(sparse), case.dense(dense))


def test_many_rows_in_wide_tiles() -> None:
    case = Case(40, 2, 1, 12, 80, (70, 0, 33, 80))
    got = case.run(tile=32)
    assert_near(got[0], case.expected()[0])
    assert_same(got, case.dense(qkv, tile=32))


def test_rows_and_weights_without_work_do_not_matter() -> None:
    """NaN in rows that no layer fills, in the weights of layers that fill none, and in the rows of q."""
    case = Case(40, 3, 1, 12, 13, (0, 3, 2), bias=True)
    wanted = case.run()
    used = torch.cat([case.chosen(layer) for layer in range(3)]).unique()
    unused = torch.ones(13, dtype=torch.bool).index_fill(0, used, False)
    assert unused.any()
    case.x[unused] = torch.nan
    case.weight[0], case.weight[:, : 3 * 12], case.bias[:, : 3 * 12] = torch.nan, torch.nan, torch.nan
    case.slots.page[unused] = 2**40
    assert_same(case.run(), wanted)


def test_a_cache_of_more_layers_may_be_filled_in_part() -> None:
    """Layers one to three of five, as a view with strides of its own."""
    case = CASES["odd-norm"]
    whole = [torch.full((5, *cache.shape[1:]), torch.nan, dtype=cache.dtype) for cache in case.caches()]
    keys, values = (cache[1:4:2] for cache in whole)
    weight = linear.prepare_stack(case.weight)
    inputs = (case.x, case.rows, case.norm, weight, case.bias, case.k_norm, case.rope, case.rotated)
    fill.fill_kv(*inputs, keys, values, case.slots, heads=case.heads, tile=TILE)
    assert_same((keys, values), case.run())
    assert all(cache[[0, 2, 4]].isnan().all() for cache in whole)


def test_a_stack_without_one_tensor_is_refused() -> None:
    case = CASES["nothing"]
    weight = dense.prepare_stack(case.weight)
    keys, values = case.caches()
    inputs = (case.x, case.rows, case.norm, weight, case.bias, case.k_norm, case.rope, case.rotated)
    with pytest.raises(TypeError, match="one tensor"):
        fill.fill_kv(*inputs, keys, values, case.slots, heads=case.heads, tile=TILE)
