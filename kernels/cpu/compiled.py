"""The op table of a CPU whose operations are compiled: products, and one kernel for what lies between two of them.

What is rare is `reference`'s: float16 and float64, and sizes that are no multiple of the lanes. Which of the two
computes something depends on the dtype and the model's shape, and never on the rows of a pass.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..attention_index import AttentionIndex, Index
from ..ops import TORCH, Ops, products
from ..reference import dense, packed, tiles
from ..reference import routes as reference_routes
from ..reference import verify as reference_verify
from ..values import Heads, Matrix, Norm, Prediction, Rope, RowMap, Slots, Split, Stack
from . import attention, attention_tiles, enter, joined, matrix_unit, openmp, panels, rejection, small_ops
from . import sample as cpu_sample
from .lanes import WIDTH

_HALF = {torch.float32: False, torch.bfloat16: True}


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm: w·x/√(mean x² + eps); LayerNorm: w·(x − mean)/√(var + eps) + b. [R, H] → [R, H]."""
    width = x.shape[-1]
    if not _fits(x, width) or norm.weight.dtype != x.dtype:
        return dense.normalise(x, norm)
    x, rows, half = x.contiguous(), x.numel() // width, _HALF[x.dtype]
    out, weight = torch.empty_like(x), norm.weight.data_ptr()
    if norm.bias is None:
        small_ops.rms_norm(x.data_ptr(), weight, out.data_ptr(), rows, width, norm.eps, half)
    else:
        small_ops.layer_norm(x.data_ptr(), weight, norm.bias.data_ptr(), out.data_ptr(), rows, width, norm.eps, half)
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
    settled: bool = False,
    ahead: Matrix | None = None,
) -> Tensor:
    """As `dense.linear`; a weight in panels needs no tiles, and a whole tile none of the steps to make it one."""
    tile = None if weight.in_panels else tile
    if scale is not None or active is not None or tile not in (None, x.shape[0]):
        return dense.linear_by(_AROUND, x, weight, tile, norm, bias, activation, residual, scale, active)
    added = residual if activation is None else None
    if weight.in_panels and _fuses(weight, norm, activation, x):
        in_place = added if added is not None and added.is_contiguous() else None
        y = panels.product(x, weight, bias, added, in_place, norm, activation)
    else:
        y = packed.product(x if norm is None else normalise(x, norm), weight, bias, added)
        y = y if activation is None else _activate(y, activation)
    if residual is None or y is residual:
        return y
    return residual.copy_(y) if added is residual else residual.add_(y)


def prepare(weight: Tensor) -> Matrix:
    """The physical layout of a weight [N, K]: panels, or what `dense.prepare` says of those that fit into none."""
    return panels.pack(weight) if panels.fits(weight) else dense.prepare(weight)


def prepare_gated(weight: Tensor) -> Matrix:
    """`prepare` for one whose first half of rows are gates of the others, which an activation joins."""
    return panels.pack_gated(weight) if panels.fits(weight, 2) else prepare(weight)


def prepare_stack(weight: Tensor) -> Stack:
    """`prepare` for one weight of every layer, [L, N, K]."""
    return Stack(tuple(prepare(layer) for layer in weight), None)


def prepare_split(weight: Tensor, rows: int) -> Matrix | Split:
    """`prepare` for a q/k/v weight [N, K] whose first `rows` rows, the queries, are often not needed."""
    return Split(prepare(weight[:rows]), prepare(weight[rows:]))


def quantise(weight: Matrix) -> Matrix:
    """As `packed.quantise`, in panels where the weight lies in such."""
    return panels.quantise(weight) if weight.in_panels else packed.quantise(weight)


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
    settled: bool = False,
) -> Tensor:
    """As `dense.qkv_rope_append`."""
    _, kv_heads, size, head_dim = keys.shape
    qkv = dense.project(linear, x, norm, weight, bias, tile, active, write)
    if not _fits(x, head_dim) or head_dim < 2 * WIDTH:
        return dense.rope_append(
            qkv, q_norm, k_norm, norm.eps, rope, keys, values, slots, heads=heads, tile=tile, write=write
        )
    rows = x.shape[0]
    q = torch.empty((rows, heads, head_dim), dtype=x.dtype, device=x.device)
    page, offset = slots.page.contiguous(), slots.offset.contiguous()
    page = page if write is None else torch.where(write, page, -1)
    cos, sin = (None, None) if rope is None else (rope.cos.contiguous(), rope.sin.contiguous())
    small_ops.rope_append(
        qkv.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        norm.eps,
        0 if cos is None else cos.data_ptr(),
        0 if sin is None else sin.data_ptr(),
        page.data_ptr(),
        offset.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
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
    ahead: Matrix | None = None,
) -> Tensor:
    """As `dense.attend`; what a row sees of a tree is its own path, so that its sums are those of a chain."""
    rows, heads, head_dim = q.shape
    if not isinstance(index, AttentionIndex) or not _fits(q, head_dim):
        return dense.attend(q, keys, values, index, scale=scale, window=window, slopes=slopes, active=active)
    q, sequence = q.contiguous(), index.sequence if active is None else torch.where(active, index.sequence, -1)
    out = torch.empty((rows, heads * head_dim), dtype=q.dtype, device=q.device)
    table, tree, half = index.block_table, index.tree, _HALF[q.dtype]
    tiles = half and head_dim % attention.BLOCK == 0 and matrix_unit.permitted()
    attention.attend(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        sequence.data_ptr(),
        index.position.data_ptr(),
        table.data_ptr(),
        table.shape[1],
        0 if tree is None else tree.length.data_ptr(),
        0 if tree is None else tree.slot.data_ptr(),
        0 if tree is None else tree.slot.shape[1],
        0 if slopes is None else slopes.data_ptr(),
        rows,
        heads,
        keys.shape[1],
        head_dim,
        keys.shape[2],
        window or 0,
        scale,
        half,
        tiles,
        torch.get_num_threads(),
        openmp.team(),
        (attention_tiles if tiles else attention).attend_some.address,
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
    """As `reference.routes.fill_kv`."""
    reference_routes.fill_layers(
        qkv_rope_append, x, rows, norm, weight, bias, k_norm, rope, rotated, keys, values, slots, heads, tile
    )


def logits(x: Tensor, norm: Norm, weight: Matrix, *, tile: int | None, active: Tensor | None = None) -> Tensor:
    """norm(x)·Wᵀ: x [R, H], W [V, H] → [R, V]; rows that are not `active` bool [R] are undefined."""
    return linear(x, weight, tile=tile, norm=norm, active=active)


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
    """As `dense.head`."""
    scores = linear(x, weight, tile=tile, norm=norm, active=active)
    rows, width = scores.shape
    if top_k is not None or not _fits(scores, width):
        return dense.predict(scores, top_k, ids)
    half, device = _HALF[scores.dtype], scores.device
    token = torch.empty((rows,), dtype=torch.int64, device=device)
    log_sum_exp = torch.empty((rows,), dtype=torch.float32, device=device)
    small_ops.choose(
        scores.data_ptr(),
        token.data_ptr(),
        log_sum_exp.data_ptr(),
        rows,
        width,
        half,
        torch.get_num_threads(),
        openmp.team(),
        small_ops.choose_some.address,
    )
    place = token.clamp(min=0)
    value = scores.gather(1, place[:, None])[:, 0]
    return Prediction(token if ids is None else torch.where(token < 0, -1, ids[place]), value, log_sum_exp)


def sample(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    stream: int = 0,
    count: int | None = None,
) -> Tensor:
    """As `reference.verify.sample`."""
    rows, width = scores.shape
    if not _fits(scores, width):
        return reference_verify.sample(
            scores, temperature, top_k, top_p, min_p, seed, position, stream=stream, count=count
        )
    scores = scores.contiguous()
    temperature, top_k, top_p = temperature.contiguous(), top_k.contiguous(), top_p.contiguous()
    min_p, seed, position = min_p.contiguous(), seed.contiguous(), position.contiguous()
    token = torch.empty((rows, count or 1), dtype=torch.int64, device=scores.device)
    cpu_sample.sample(
        scores.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        seed.data_ptr(),
        position.data_ptr(),
        token.data_ptr(),
        rows,
        width,
        count or 1,
        stream,
        _HALF[scores.dtype],
        torch.get_num_threads(),
        openmp.team(),
        cpu_sample.sample_some.address,
    )
    return token[:, 0] if count is None else token


def rounds_alike(weights: list[Matrix], heads: Heads, dtype: torch.dtype, tile: int) -> bool:
    """Whether random rows come out of `tile` as out of the full one, bit for bit."""
    return tiles.alike_by(normalise, attend, weights, heads, dtype, tile)


def _describe(dtype: torch.dtype) -> str:
    if dtype not in _HALF:
        return f"{products(dtype)}, plain small operations"
    unit = " by the matrix unit" if dtype == torch.bfloat16 and matrix_unit.permitted() else ""
    return f"products in panels{unit}, compiled small operations{'' if openmp.team() else ', all on one thread'}"


def _pads(dtype: torch.dtype) -> bool:
    return dtype not in _HALF


def _fits(x: Tensor, width: int) -> bool:
    return x.dtype in _HALF and width % WIDTH == 0


def _fuses(weight: Matrix, norm: Norm | None, activation: str | None, x: Tensor) -> bool:
    """Whether a product in panels has the norm before it and the activation after it."""
    normed = norm is None or (norm.weight.dtype == x.dtype and weight.columns % WIDTH == 0)
    return normed and (activation != "silu_gate" or weight.gated)


def _activate(y: Tensor, activation: str) -> Tensor:
    rows, width = y.shape
    if not _fits(y, width // 2 if activation == "silu_gate" else width):
        return dense.activate(y, activation)
    if activation == "silu_gate":
        out = torch.empty((rows, width // 2), dtype=y.dtype, device=y.device)
        small_ops.silu_gate(y.data_ptr(), out.data_ptr(), rows, width // 2, _HALF[y.dtype])
    else:
        out = torch.empty_like(y)
        small_ops.gelu_tanh(y.data_ptr(), out.data_ptr(), y.numel(), _HALF[y.dtype])
    return out


_AROUND = dense.Around(normalise, _activate)
COMPILED: Ops = replace(
    TORCH,
    describe=_describe,
    pads=_pads,
    prepare=prepare,
    prepare_gated=prepare_gated,
    prepare_stack=prepare_stack,
    prepare_split=prepare_split,
    quantise=quantise,
    rounds_alike=rounds_alike,
    normalise=normalise,
    linear=linear,
    qkv_rope_append=qkv_rope_append,
    attend=attend,
    fill_kv=fill_kv,
    join=joined.join,
    enter=enter.enter,
    logits=logits,
    head=head,
    sample=sample,
    verify_rejection=rejection.verify_rejection,
)
