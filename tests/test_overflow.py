"""Activations that leave the range of their dtype: what becomes of the rows beside them, of keys and of values."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("numba", reason="numba is not installed")

from skipjack.kernels.cpu.compiled import COMPILED
from skipjack.kernels.ops import TORCH, Ops
from skipjack.kernels.triton_ops import TRITON
from skipjack.kernels.values import Norm, Rope, RowMap, Slots
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.model import Model
from skipjack.runtime.rows import one_sequence

TABLES = {"torch": TORCH, "compiled": COMPILED, "triton": TRITON}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 64, 64

every_table = pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def projected(ops: Ops, x: Tensor, filled: bool) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, kv_heads, D] that x·Wᵀ, W all ones, leaves in the cache, by either op that writes them."""
    rows, dtype = x.shape[0], x.dtype
    weight = torch.ones((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, dtype=dtype)
    rope = Rope(torch.ones(rows, 1, DIM), torch.zeros(rows, 1, DIM))
    keys, values = torch.zeros(2, 1, 1, KV_HEADS, ops.page_size, DIM, dtype=dtype)
    slots = Slots(torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    norm = Norm(torch.full((HIDDEN,), torch.finfo(dtype).max / 16, dtype=dtype), None, 1e-5)
    if filled:
        every = RowMap(torch.arange(rows)[None].int(), torch.tensor([rows], dtype=torch.int32))
        ops.fill_kv(
            x, every, Norm(norm.weight[None], None, norm.eps), ops.prepare_stack(weight[None]), None, None, rope, None,
            keys, values, slots, heads=HEADS, tile=ops.decode_tile,
        )  # fmt: skip
    else:
        ops.qkv_rope_append(
            x, norm, ops.prepare(weight), None, None, None, rope, keys[0], values[0], slots,
            heads=HEADS, tile=ops.decode_tile,
        )  # fmt: skip
    return keys[0, 0, :, :rows].transpose(0, 1), values[0, 0, :, :rows].transpose(0, 1)


@every_table
@every_dtype
@pytest.mark.parametrize("filled", [False, True], ids=["appended", "filled"])
def test_keys_and_values_stay_in_range(ops: Ops, dtype: torch.dtype, filled: bool) -> None:
    """Sums four times as great as the greatest number there is, as great below zero, of an infinity, and of 0."""
    x = torch.ones(4, HIDDEN, dtype=dtype)
    x[1], x[2, 0], x[3] = -1, torch.inf, 0
    most = torch.finfo(dtype).max
    keys, values = projected(ops, x, filled)
    for row, expected in enumerate((most, -most, 0, 0)):
        assert values[row].eq(expected).all(), row
    # By a table that rounds before it turns, a key of infinities turned is none of the two.
    assert keys.isfinite().all()


@every_table
@every_dtype
def test_a_token_that_overflows_leaves_no_trace_in_those_before_it(ops: Ops, dtype: torch.dtype) -> None:
    """Neither in a pass over it, as a draft is verified, nor when it was rejected and its slot lies on a page read."""
    config = ModelConfig.parse(synthetic_config("tiny-llama") | {"num_hidden_layers": 4, "vocab_size": 200}, "tiny")
    weights = synthetic_weights(config, 3, dtype)
    weights.embedding[9] = torch.inf
    model = Model(config, weights, ops)
    tile = ops.decode_tile

    def hidden(tokens: list[int], later: list[int]) -> tuple[Tensor, Tensor]:
        cache = model.new_cache(1)
        pages = cache.reserve(8)
        together = model.forward(one_sequence(tokens, 0, pages, tile, model.device), cache, model.full)
        after = model.forward(one_sequence(later, 2, pages, tile, model.device), cache, model.full)
        return together[:2], after

    with torch.inference_mode():
        alone, drafted = hidden([5, 7], [11]), hidden([5, 7, 9, 8], [11])
    for got, expected in zip(drafted, alone, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(got, expected)
