"""The ops that every layer runs and the head, in PyTorch.

An op works through its rows in tiles of exactly `tile` rows, each tile padded to that size, so that the shape of every
product and reduction is the same for any number of rows. That is what makes row i of a verify pass equal, bit for bit,
the decode pass of that token. Without a tile (None) all rows of a call are computed together, as many as there are,
and a row's rounding may follow their number. Notation: R rows, H hidden size, D head dimension, P slots per page.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..attention_index import AttentionIndex, Block, Index
from ..elementwise import known, steady
from ..values import Matrix, Norm, Prediction, Rope, Slots, Split, Stack
from . import packed

_length = cast("Callable[..., Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def prepare(weight: Tensor) -> Matrix:
    """The physical layout of a weight [N, K] for `linear`, `qkv_rope_append`, `logits` and `head`."""
    return packed.pack(weight)


def prepare_stack(weight: Tensor) -> Stack:
    """`prepare` for one weight of every layer, [L, N, K]."""
    return Stack(tuple(prepare(layer) for layer in weight), None)


def prepare_split(weight: Tensor, rows: int) -> Matrix | Split:
    """`prepare` for a q/k/v weight [N, K] whose first `rows` rows, the queries, are often not needed."""
    return Split(prepare(weight[:rows]), prepare(weight[rows:]))


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm: w·x/√(mean x² + eps); LayerNorm: w·(x − mean)/√(var + eps) + b. [R, H] → [R, H]."""
    if norm.bias is not None:
        return functional.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
    # `functional.rms_norm` calls twice as many operators.
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    length = _length(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(_scalar(norm.eps, wide.dtype), length, length, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).mul_(norm.weight).to(x.dtype)


@cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


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
    """scale·activation(norm(x)·Wᵀ + bias), added in place to `residual` where that is given.

    x [R, K], W [N, K] → [R, N]; with activation "silu_gate" W holds gate rows above up rows and the result is
    silu(gate)·up, [R, N/2]; "gelu_tanh" is elementwise. `scale` float32 [R]. `active` bool [R]: rows that are False
    leave `residual` untouched (their result is undefined without one). Only active rows are computed. `settled` and
    `ahead`, the weight of the kernel after this one, change no result.
    """
    return linear_by(_AROUND, x, weight, tile, norm, bias, activation, residual, scale, active)


class Around(NamedTuple):
    """What a product is surrounded by: normalise(x, norm) → x; activate(y, activation) → [R, N or N/2]."""

    normalise: Callable[[Tensor, Norm], Tensor]
    activate: Callable[[Tensor, str], Tensor]


def linear_by(
    around: Around,
    x: Tensor,
    weight: Matrix,
    tile: int | None,
    norm: Norm | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    active: Tensor | None,
) -> Tensor:
    """`linear` with the norms and activations of a table."""
    if active is not None and not bool(active.all()):
        row = torch.nonzero(active).flatten()
        if not len(row):
            return x.new_empty(x.shape[0], _width(weight, activation)) if residual is None else residual
        added, factor = None if residual is None else residual[row], None if scale is None else scale[row]
        part = linear_by(around, x[row], weight, tile, norm, bias, activation, added, factor, None)
        whole = x.new_empty(x.shape[0], part.shape[1]) if residual is None else residual
        return whole.index_copy_(0, row, part)
    added = residual if scale is None and activation is None else None
    parts = [
        _linear_tile(
            around, part, weight, norm, bias, activation, None if added is None else _tile_of(added, start, tile)
        )
        for start, part in _tiles(x, tile)
    ]
    y, rows = parts[0] if len(parts) == 1 else torch.cat(parts), x.shape[0]
    y = y if y.shape[0] == rows else y[:rows]
    if scale is not None:
        y = y * scale[:, None]
    if residual is not None and added is None:
        y = y + residual
    y = y.to(x.dtype)
    return y if residual is None else residual.copy_(y)


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
    """q, k, v = norm(x)·Wᵀ + bias; RMSNorm of q and k over D; rotation; k and v written to their slots.

    x [R, H]; W [(heads + 2·kv_heads)·D, H]; keys, values [pages, kv_heads, P, D], one layer's cache; q_norm, k_norm
    [D]. Returns q [R, heads, D], undefined for rows that are not `active` bool [R]. Rows that are not `write` bool [R]
    write nothing: FlexiDepth keeps the keys and values of rows it computes no query for. Rows that are neither are not
    computed, and of a split weight only the part that a row needs is.

    All three are finite: what overflows is the dtype's greatest number, NaN is 0. Attention adds 0·v for the slots that
    a row does not see, so NaN among them, as of a draft token that was rejected, would be in the row's sum.
    """
    qkv = project(linear, x, norm, weight, bias, tile, active, write)
    return rope_append(qkv, q_norm, k_norm, norm.eps, rope, keys, values, slots, heads=heads, tile=tile, write=write)


def rope_append(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rope: Rope | None,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    *,
    heads: int,
    tile: int | None,
    write: Tensor | None,
) -> Tensor:
    """`qkv_rope_append` after the product: qkv [R, (heads + 2·kv_heads)·D] → q [R, heads, D]."""
    _, kv_heads, _, head_dim = keys.shape
    qkv = qkv.view(qkv.shape[0], -1, head_dim)
    qk, v = qkv.narrow(1, 0, heads + kv_heads), qkv.narrow(1, heads + kv_heads, kv_heads)
    if q_norm is not None and k_norm is not None:
        q = _head_norm(qk[:, :heads], q_norm, eps, tile)
        qk = torch.cat([q, _head_norm(qk[:, heads:], k_norm, eps, tile)], dim=1)
    if rope is not None:
        wide = qk if qk.dtype == torch.float64 else qk.float()
        qk = (wide * rope.cos).add_(torch.roll(wide, head_dim // 2, -1).mul_(rope.sin)).to(qkv.dtype)
    qk, v = qk.nan_to_num(), v.nan_to_num()
    q, k = qk.narrow(1, 0, heads), qk.narrow(1, heads, kv_heads)
    page, offset = slots
    if write is not None:
        page, offset, k, v = page[write], offset[write], k[write], v[write]
    keys.transpose(1, 2).index_put_((page, offset), k)
    values.transpose(1, 2).index_put_((page, offset), v)
    return q


def project(
    linear: Callable[..., Tensor],
    x: Tensor,
    norm: Norm,
    weight: Matrix | Split,
    bias: Tensor | None,
    tile: int | None,
    active: Tensor | None,
    write: Tensor | None,
) -> Tensor:
    """norm(x)·Wᵀ + bias [R, (heads + 2·kv_heads)·D], of each row what it needs, by the `linear` of a table."""
    if isinstance(weight, Split):
        above, below = (None, None) if bias is None else (bias[: weight.upper.rows], bias[weight.upper.rows :])
        q = linear(x, weight.upper, tile=tile, norm=norm, bias=above, active=active)
        return torch.cat([q, linear(x, weight.lower, tile=tile, norm=norm, bias=below, active=write)], dim=1)
    needed = None if active is None or write is None else active | write
    return linear(x, weight, tile=tile, norm=norm, bias=bias, active=needed)


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
    """softmax(scale·q·kᵀ + slope·(key position − position))·v over the keys at or before each row's position.

    q [R, heads, D]; keys, values [pages, kv_heads, P, D]; slopes float32 [heads] for ALiBi; `window`: a row sees itself
    and the window − 1 positions before it. Returns [R, heads·D], undefined for rows of no sequence and rows that are
    not `active` bool [R]. One page is one block of the reduction: blocks are merged in order from position 0 by their
    log-sum-exp, and a block no key of which is seen adds exactly nothing. A tree's rows take the pages before the tree
    together and those it lies in once for every leaf, gathered along its path. `ahead`, the weight of the kernel after
    this one, changes no result. Raises TypeError for an index of another backend.
    """
    if not isinstance(index, AttentionIndex):
        raise TypeError(f"index: expected AttentionIndex, got {type(index).__name__}")
    rows, heads, head_dim = q.shape
    kv_heads, tile = keys.shape[1], index.tile
    groups = index.groups(window, slopes, kv_heads, heads // kv_heads)
    if active is None and len(groups) == 1 and groups[0].start == 0 and rows == (tile or groups[0].count):
        by_row = _by_row(_over(groups[0].blocks, q, keys, values, scale), rows)
        if len(by_row) == 1:
            return by_row[0]
    out = q.new_zeros(rows, heads * head_dim)
    for start, count, blocks, branch in groups:
        if active is not None and not bool(active[start : start + count].any()):
            continue
        taken = tile or count
        rows_q = q[start : start + taken]
        if rows_q.shape[0] < taken:
            rows_q = functional.pad(rows_q, (0, 0, 0, 0, 0, taken - rows_q.shape[0]))
        by_row = _by_row(_over(blocks, rows_q, keys, values, scale), taken)
        out[start : start + count] = by_row[0, :count] if len(by_row) == 1 else by_row[branch, range(count)]
    return out if active is None else out.masked_fill_(~active[:, None], 0)


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
    """argmax, or the `top_k` highest, of norm(x)·Wᵀ with their logits and the log-sum-exp; ties go to the lowest id.

    ids int64 [V'], ascending: the tokens the rows of a reduced vocabulary's W [V', H] stand for. The results of rows
    that are not `active` bool [R] are undefined. A NaN counts as −∞, and where nothing is above that the token is −1.
    """
    return predict(linear(x, weight, tile=tile, norm=norm, active=active), top_k, ids)


def predict(scores: Tensor, top_k: int | None, ids: Tensor | None) -> Prediction:
    """`head` of logits [R, V]."""
    scores = known(scores)
    if top_k is None:
        value, token = scores.max(dim=-1)
    else:
        token = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        value = scores.gather(1, token)
    log_sum_exp = scores.float().logsumexp(dim=-1)
    return Prediction(torch.where(value > -torch.inf, token if ids is None else ids[token], -1), value, log_sum_exp)


def _width(weight: Matrix, activation: str | None) -> int:
    return weight.rows // 2 if activation == "silu_gate" else weight.rows


def _tiles(x: Tensor, tile: int | None) -> list[tuple[int, Tensor]]:
    if tile is None:
        return [(0, x)]
    rows = x.shape[0]
    if rows % tile:
        x = functional.pad(x, (0, 0, 0, -rows % tile))
    return [(start, _tile_of(x, start, tile)) for start in range(0, x.shape[0], tile)]


def _tile_of(x: Tensor, start: int, tile: int | None) -> Tensor:
    return x if tile is None or x.shape[0] <= tile else x[start : start + tile]


def _linear_tile(
    around: Around,
    x: Tensor,
    weight: Matrix,
    norm: Norm | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    if norm is not None:
        x = around.normalise(x, norm)
    if residual is not None and residual.shape[0] < x.shape[0]:
        residual = functional.pad(residual, (0, 0, 0, x.shape[0] - residual.shape[0]))
    y = packed.product(x, weight, bias, residual)
    return y if activation is None else around.activate(y, activation)


def activate(y: Tensor, activation: str) -> Tensor:
    """ "silu_gate": silu(gate)·up of gate before up, [R, 2·I] → [R, I]; "gelu_tanh": elementwise."""
    if activation == "silu_gate":
        gate, up = y.chunk(2, dim=-1)
        return steady(functional.silu, gate) * up
    return steady(_gelu_tanh, y)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


_AROUND = Around(normalise, activate)


def _head_norm(x: Tensor, weight: Tensor, eps: float, tile: int | None) -> Tensor:
    """RMSNorm over D of [R, heads, D], in tiles of rows."""
    flat = x.reshape(x.shape[0], -1)
    shape = (-1, x.shape[1], x.shape[2])
    parts = [normalise(part.view(shape), Norm(weight, None, eps)) for _, part in _tiles(flat, tile)]
    return torch.cat(parts)[: x.shape[0]]


def _over(blocks: list[Block], q: Tensor, keys: Tensor, values: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Attention of q [M, heads, D] over each block, once for every branch it has: output and log-sum-exp.

    Queries are packed by the key head they read: [1 or B, kv_heads, M·group, D] and [1 or B, kv_heads, M·group].
    """
    (rows, heads, head_dim), kv_heads = q.shape, keys.shape[1]
    q = q.view(rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
    partial: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        k, v = block.read(keys), block.read(values)
        # The call takes a float32 mask for every dtype but float64, whose masks it would misread.
        mask = block.mask.double() if q.dtype == torch.float64 else block.mask
        each = q.expand(k.shape[0], -1, -1, -1)
        partial.append(_attention(each, k, v, 0.0, False, attn_mask=mask, scale=scale))
    return partial


def _by_row(partial: list[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """The merged attention over blocks, back from packed queries to rows: [1 or B, rows, heads·D]."""
    merged = partial[0][0] if len(partial) == 1 else _merge(partial)
    branches, kv_heads = merged.shape[:2]
    return merged.view(branches, kv_heads, rows, -1).transpose(1, 2).reshape(branches, rows, -1)


def _merge(partial: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine attention over blocks, (output [1 or B, G, M, D], log-sum-exp [1 or B, G, M]) each, in order."""
    peak = partial[0][1]
    for _, lse in partial[1:]:
        peak = torch.maximum(peak, lse)
    weights = [steady(torch.exp, lse - peak)[..., None] for _, lse in partial]
    total, output = weights[0], partial[0][0] * weights[0]
    for weight, (block, _) in zip(weights[1:], partial[1:], strict=True):
        total, output = total + weight, output + block * weight
    return (output / total).to(partial[0][0].dtype)
