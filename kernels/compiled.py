"""The op table of a CPU whose small operations are compiled: what lies between two products is one kernel.

The products are those of `reference`, and so is what is rare: float16 and float64, sizes that are no multiple of the
lanes, and the attention of prompts, whose tiles are large enough for a library. Which of the two computes something
depends on the dtype, the model's shape and the pass's tile, and never on its rows; a kernel computes every row by itself.
"""

from dataclasses import replace

import torch
from torch import Tensor

from . import cpu_kernels, reference, reference_routes, tiles
from .attention_index import AttentionIndex, Index
from .lanes import WIDTH
from .ops import TORCH, Ops
from .values import Heads, Matrix, Norm, Prediction, Rope, RowMap, Slots, Split, Stack

_FEW = max(tiles.FULL, *tiles.OTHERS)
_HALF = {torch.float32: False, torch.bfloat16: True}


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm: w·x/√(mean x² + eps); LayerNorm: w·(x − mean)/√(var + eps) + b. [R, H] → [R, H]."""
    width = x.shape[-1]
    if not _fits(x, width) or norm.weight.dtype != x.dtype:
        return reference.normalise(x, norm)
    half, out = _HALF[x.dtype], torch.empty_like(x, memory_format=torch.contiguous_format)
    if norm.bias is None:
        cpu_kernels.rms_norm(_at(x), _at(norm.weight), _at(out), x.numel() // width, width, norm.eps, half)
    else:
        cpu_kernels.layer_norm(
            _at(x), _at(norm.weight), _at(norm.bias), _at(out), x.numel() // width, width, norm.eps, half
        )
    return out


def linear(
    x: Tensor,
    weight: Matrix,
    *,
    tile: int | None,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """As `reference.linear`."""
    return reference.linear_by(_AROUND, x, weight, tile, norm, bias, activation, residual, scale, active)


def qkv_rope_append(
    x: Tensor,
    norm: Norm,
    weight: Matrix | Split,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    rope: Rope | None,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    *,
    heads: int,
    tile: int | None,
    active: Tensor | None = None,
    write: Tensor | None = None,
) -> Tensor:
    """As `reference.qkv_rope_append`."""
    _, kv_heads, size, head_dim = keys.shape
    qkv = reference.project(linear, x, norm, weight, bias, tile, active, write)
    if not _fits(x, head_dim):
        return reference.rope_append(
            qkv, q_norm, k_norm, norm.eps, rope, keys, values, slots, heads=heads, tile=tile, write=write
        )
    rows = x.shape[0]
    q = qkv.new_empty(rows, heads, head_dim)
    page = slots.page if write is None else torch.where(write, slots.page, -1)
    cpu_kernels.rope_append(
        _at(qkv),
        _at(q_norm),
        _at(k_norm),
        norm.eps,
        _at(None if rope is None else rope.cos),
        _at(None if rope is None else rope.sin),
        _at(page),
        _at(slots.offset),
        _at(q),
        _at(keys),
        _at(values),
        rows,
        heads,
        kv_heads,
        head_dim,
        size,
        _HALF[x.dtype],
    )
    return q


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Index,
    *,
    scale: float,
    window: int | None = None,
    slopes: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """As `reference.attend`; what a row sees of a tree is its own path, so that its sums are those of a chain."""
    rows, heads, head_dim = q.shape
    if not isinstance(index, AttentionIndex) or (index.tile or rows) > _FEW or not _fits(q, head_dim):
        return reference.attend(q, keys, values, index, scale=scale, window=window, slopes=slopes, active=active)
    sequence = index.sequence if active is None else torch.where(active, index.sequence, -1)
    out, table, tree = q.new_empty(rows, heads * head_dim), index.block_table, index.tree
    cpu_kernels.attend(
        _at(q.contiguous()),
        _at(keys),
        _at(values),
        _at(out),
        _at(sequence),
        _at(index.position),
        _at(table),
        table.shape[1],
        _at(None if tree is None else tree.length),
        _at(None if tree is None else tree.slot),
        0 if tree is None else tree.slot.shape[1],
        _at(slopes),
        rows,
        heads,
        keys.shape[1],
        head_dim,
        keys.shape[2],
        window or 0,
        scale,
        _HALF[q.dtype],
    )
    return out


def fill_kv(
    x: Tensor,
    rows: RowMap,
    norm: Norm,
    weight: Stack,
    bias: Tensor | None,
    k_norm: Tensor | None,
    rope: Rope | None,
    rotated: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    *,
    heads: int,
    tile: int | None,
) -> None:
    """As `reference_routes.fill_kv`."""
    reference_routes.fill_layers(
        qkv_rope_append, x, rows, norm, weight, bias, k_norm, rope, rotated, keys, values, slots, heads, tile
    )


def logits(x: Tensor, norm: Norm, weight: Matrix, *, tile: int | None) -> Tensor:
    """norm(x)·Wᵀ: x [R, H], W [V, H] → [R, V]."""
    return linear(x, weight, tile=tile, norm=norm)


def head(
    x: Tensor,
    norm: Norm,
    weight: Matrix,
    *,
    tile: int | None,
    top_k: int | None = None,
    ids: Tensor | None = None,
    active: Tensor | None = None,
) -> Prediction:
    """As `reference.head`."""
    return reference.predict(linear(x, weight, tile=tile, norm=norm, active=active), top_k, ids)


def rounds_alike(weights: list[Matrix], heads: Heads, dtype: torch.dtype, tile: int) -> bool:
    """Whether random rows come out of `tile` as out of the full one, bit for bit."""
    return tiles.alike_by(normalise, attend, weights, heads, dtype, tile)


def _fits(x: Tensor, width: int) -> bool:
    return x.dtype in _HALF and width % WIDTH == 0 and width >= 2 * WIDTH


def _at(tensor: Tensor | None) -> int:
    """Where a contiguous tensor lies; 0 for none."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()} of {tuple(tensor.shape)}")
    return tensor.data_ptr()


def _activate(y: Tensor, activation: str) -> Tensor:
    rows, width = y.shape
    if not _fits(y, width // 2):
        return reference.activate(y, activation)
    if activation == "silu_gate":
        out = y.new_empty(rows, width // 2)
        cpu_kernels.silu_gate(_at(y), _at(out), rows, width // 2, _HALF[y.dtype])
    else:
        out = torch.empty_like(y)
        cpu_kernels.gelu_tanh(_at(y), _at(out), y.numel(), _HALF[y.dtype])
    return out


_AROUND = reference.Around(normalise, _activate)
COMPILED: Ops = replace(
    TORCH,
    describe=lambda dtype: f"{TORCH.describe(dtype)}, {'compiled' if dtype in _HALF else 'plain'} small operations",
    rounds_alike=rounds_alike,
    normalise=normalise,
    linear=linear,
    qkv_rope_append=qkv_rope_append,
    attend=attend,
    fill_kv=fill_kv,
    logits=logits,
    head=head,
)
