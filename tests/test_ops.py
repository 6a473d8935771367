"""Every op against float64, and each of its rows against itself among other rows."""

import math

import pytest
import torch
from torch import Tensor

from skipjack.kernels.attention_index import AttentionIndex
from skipjack.kernels.elementwise import ONE_THREAD, steady
from skipjack.kernels.ops import TORCH, Ops
from skipjack.kernels.reference import dense
from skipjack.kernels.values import Norm, Rope, Slots

TILE = TORCH.decode_tile
PAGE = TORCH.page_size
ROW_COUNTS = [*range(1, 17), 32, 64]
SHAPES = [(576, 960), (576, 3072), (1536, 576), (40, 33), (7, 5), (56, 223)]
DTYPES = [torch.float32, torch.bfloat16]
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < RTOL[got.dtype], f"relative error {error:.2e}"


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_linear_with_norm_bias_and_residual_is_the_formula(
    table: Ops, columns: int, rows: int, dtype: torch.dtype
) -> None:
    x, weight = randn(11, columns, dtype=dtype), randn(rows, columns, dtype=dtype, seed=1) / columns**0.5
    bias, residual = randn(rows, dtype=dtype, seed=2), randn(11, rows, dtype=dtype, seed=3)
    scale = randn(columns, dtype=dtype, seed=4)
    expected = rms(x, scale, 1e-5) @ weight.double().T + bias.double() + residual.double()
    got = table.linear(x, TORCH.prepare(weight), tile=TILE, norm=Norm(scale, None, 1e-5), bias=bias, residual=residual)
    assert got is residual
    assert_near(got, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_activations_are_the_formulas(table: Ops, dtype: torch.dtype) -> None:
    x, weight = randn(5, 48, dtype=dtype), randn(70, 48, dtype=dtype, seed=1) / 7
    y = x.double() @ weight.double().T
    gate, up = y.chunk(2, -1)
    matrix = TORCH.prepare(weight)
    assert_near(table.linear(x, matrix, tile=TILE, activation="silu_gate"), gate / (1 + (-gate).exp()) * up)
    inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    assert_near(table.linear(x, matrix, tile=TILE, activation="gelu_tanh"), 0.5 * y * (1 + inner.tanh()))


def test_inactive_rows_keep_their_residual(table: Ops) -> None:
    x, weight, residual = randn(6, 32), randn(16, 32, seed=1), randn(6, 16, seed=2)
    active = torch.tensor([True, False, True, True, False, False])
    before = residual.clone()
    table.linear(x, TORCH.prepare(weight), tile=TILE, residual=residual, active=active)
    assert torch.equal(residual[~active], before[~active])
    assert_near(residual[active], (before + x @ weight.T)[active])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu_gate", "gelu_tanh"])
@pytest.mark.parametrize(("columns", "rows"), [*SHAPES, (64, 28672)])
def test_linear_rows_do_not_depend_on_their_number_or_place(
    table: Ops, columns: int, rows: int, activation: str | None, dtype: torch.dtype
) -> None:
    rows += rows % 2
    x, residual = randn(64, columns, dtype=dtype), randn(64, rows, dtype=dtype, seed=1)
    matrix, norm = (
        TORCH.prepare(randn(rows, columns, dtype=dtype, seed=2)),
        Norm(randn(columns, dtype=dtype), None, 1e-5),
    )

    def run(part: slice) -> Tensor:
        added = residual[part].clone() if activation is None else None
        return table.linear(x[part], matrix, tile=TILE, norm=norm, activation=activation, residual=added)

    alone = torch.cat([run(slice(i, i + 1)) for i in range(64)])
    for count in ROW_COUNTS if rows < 10000 else (3, 64):
        for start in (0, 64 - count):
            assert torch.equal(run(slice(start, start + count)), alone[start : start + count])


def attention_oracle(
    q: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, slopes: Tensor | None
) -> Tensor:
    """One row in float64: q [heads, D]; keys, values [T, kv_heads, D]."""
    heads, head_dim = q.shape
    first = 0 if window is None else max(0, position - window + 1)
    span = torch.arange(first, position + 1)
    repeat = heads // keys.shape[1]
    k = keys[span].double().repeat_interleave(repeat, 1)
    v = values[span].double().repeat_interleave(repeat, 1)
    scores = torch.einsum("hd,thd->ht", q.double(), k) / head_dim**0.5
    if slopes is not None:
        scores += slopes.double()[:, None] * (span - position)
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v).flatten()


class Cached:
    """A paged cache with two sequences of `length` random keys on shuffled pages."""

    def __init__(self, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        pages = -(-length // PAGE)
        order = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(5)) + 1
        self.table = order.view(2, pages)
        self.flat = randn(2, 2, pages * PAGE, kv_heads, head_dim, dtype=dtype, seed=6)
        self.keys, self.values = torch.zeros(2, 2 * pages + 1, kv_heads, PAGE, head_dim, dtype=dtype)
        for s in range(2):
            for p in range(pages):
                span = self.flat[:, s, p * PAGE : (p + 1) * PAGE].transpose(1, 2)
                self.keys[self.table[s, p]], self.values[self.table[s, p]] = span[0], span[1]

    def attend(
        self, table: Ops, q: Tensor, sequence: Tensor, position: Tensor, window: int | None, slopes: Tensor | None
    ) -> Tensor:
        index = AttentionIndex(sequence, position, self.table, page_size=PAGE, tile=TILE)
        return table.attend(q, self.keys, self.values, index, scale=q.shape[-1] ** -0.5, window=window, slopes=slopes)


ATTENTION = [
    (9, 3, 64, None, False),
    (4, 4, 12, None, True),
    (6, 2, 8, 40, False),
    (5, 1, 80, 300, False),
    (3, 3, 16, None, True),
]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "window", "alibi"), ATTENTION)
@pytest.mark.parametrize("position", [0, 1, 15, 16, 127, 129, 255, 256, 1000])
def test_attention_is_the_formula(
    table: Ops,
    position: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    alibi: bool,
    dtype: torch.dtype,
) -> None:
    cached = Cached(1024, kv_heads, head_dim, dtype)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    q = randn(3, heads, head_dim, dtype=dtype, seed=7)
    sequence, at = torch.tensor([0, 0, 1]), torch.tensor([position, position + 1, position])
    got = cached.attend(table, q, sequence, at, window, slopes)
    expected = torch.stack(
        [
            attention_oracle(q[i], *cached.flat[:, s], p, window, slopes)
            for i, (s, p) in enumerate(zip(sequence.tolist(), at.tolist(), strict=True))
        ]
    )
    assert_near(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "window", "alibi"), ATTENTION)
def test_attention_rows_do_not_depend_on_their_neighbours(
    table: Ops, heads: int, kv_heads: int, head_dim: int, window: int | None, alibi: bool, dtype: torch.dtype
) -> None:
    cached = Cached(1024, kv_heads, head_dim, dtype)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    position = torch.tensor([*range(250, 262), *range(0, 3), *range(500, 520)])
    sequence = torch.tensor([0] * 12 + [1] * 3 + [1] * 20)
    q = randn(len(position), heads, head_dim, dtype=dtype, seed=8)

    def run(rows: list[int]) -> Tensor:
        return cached.attend(table, q[rows], sequence[rows], position[rows], window, slopes)

    alone = torch.cat([run([i]) for i in range(len(position))])
    for rows in (list(range(35)), list(range(5, 14)), [3, 11, 34], list(range(1, 35, 2)), [0, 13, 14, 15, 33]):
        assert torch.equal(run(rows), alone[rows])


@pytest.mark.parametrize("before", [1, 3, 5])
def test_rows_may_follow_rows_of_no_sequence_in_a_tile_that_is_full(table: Ops, before: int) -> None:
    """The draft of the first sequence of a pass has stopped, or its cycle needs no refill."""
    cached = Cached(300, 2, 8, torch.float32)
    q, rows = randn(TILE, 4, 8), slice(before, before + 3)
    sequence, position = torch.full((TILE,), -1), torch.zeros(TILE, dtype=torch.int64)
    sequence[rows], position[rows] = 1, torch.tensor([254, 255, 256])
    expected = [attention_oracle(q[i], *cached.flat[:, 1], int(position[i]), None, None) for i in range(TILE)[rows]]
    assert_near(cached.attend(table, q, sequence, position, None, None)[rows], torch.stack(expected))


def test_attention_skips_padding_and_inactive_rows(table: Ops) -> None:
    cached = Cached(300, 2, 8, torch.float32)
    q = randn(4, 4, 8)
    index = AttentionIndex(
        torch.tensor([0, 0, -1, 1]), torch.tensor([7, 8, 0, 290]), cached.table, page_size=PAGE, tile=TILE
    )
    active = torch.tensor([True, False, True, True])
    out = table.attend(q, cached.keys, cached.values, index, scale=1.0, active=active)
    assert out[1].eq(0).all()
    assert out[2].eq(0).all()
    assert out[0].ne(0).all()
    assert out[3].ne(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_qkv_rope_append_is_the_formula(table: Ops, qk_norm: bool, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, hidden, rows = 4, 2, 12, 40, 11
    x, scale = randn(rows, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    weight = randn((heads + 2 * kv_heads) * head_dim, hidden, dtype=dtype, seed=2) / 6
    bias = randn(weight.shape[0], dtype=dtype, seed=3)
    norms = [randn(head_dim, dtype=dtype, seed=s) for s in (4, 5)] if qk_norm else [None, None]
    angle = randn(rows, 1, head_dim // 2, seed=6)
    cos, sin = angle.cos().repeat(1, 1, 2), torch.cat([-angle.sin(), angle.sin()], -1)
    slots = Slots(torch.tensor([1, 2] * 5 + [3]), torch.arange(rows) * 3)
    keys, values = torch.full((2, 4, kv_heads, 40, head_dim), torch.nan, dtype=dtype)
    q = table.qkv_rope_append(
        x, Norm(scale, None, 1e-6), TORCH.prepare(weight), bias, *norms, Rope(cos, sin), keys, values, slots,
        heads=heads, tile=TILE,
    )  # fmt: skip

    y = (rms(x, scale, 1e-6) @ weight.double().T + bias.double()).view(rows, -1, head_dim)
    parts = [y[:, :heads], y[:, heads : heads + kv_heads]]
    if qk_norm:
        parts = [rms(part, norm, 1e-6) for part, norm in zip(parts, norms, strict=True) if norm is not None]
    first, second = angle.cos().double(), angle.sin().double()
    rotated = [
        torch.cat([a * first - b * second, b * first + a * second], -1) for a, b in (p.chunk(2, -1) for p in parts)
    ]
    assert_near(q, rotated[0])
    assert_near(keys[slots.page, :, slots.offset], rotated[1])
    assert_near(values[slots.page, :, slots.offset], y[:, heads + kv_heads :])
    written = torch.zeros(4, 40, dtype=torch.bool)
    written[slots.page, slots.offset] = True
    assert keys.transpose(1, 2)[~written].isnan().all()


def test_head_ties_go_to_the_lowest_id(table: Ops) -> None:
    weight = randn(16, 8).repeat(3, 1)
    x = randn(6, 8, seed=1)
    prediction = table.head(x, Norm(torch.ones(8), None, 1e-6), TORCH.prepare(weight), tile=TILE)
    logits = rms(x, torch.ones(8), 1e-6) @ weight.double().T
    assert prediction.token.lt(16).all()
    assert torch.equal(prediction.token, logits[:, :16].argmax(-1))
    assert_near(prediction.log_sum_exp, logits.logsumexp(-1))


@pytest.mark.parametrize("function", [torch.exp, torch.log, torch.cos, torch.nn.functional.silu, dense._gelu_tanh])
def test_steady_functions_do_not_depend_on_place_or_threads(function: object) -> None:
    x = randn(3 * ONE_THREAD + 17).abs()
    whole = steady(function, x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for start, end in ((0, 1), (5, 38), (0, 32768), (1000, 1000 + ONE_THREAD + 3), (7, len(x))):
                assert torch.equal(steady(function, x[start:end]), whole[start:end])
    finally:
        torch.set_num_threads(threads)
