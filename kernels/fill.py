"""Sparse fill of the key-value cache: keys and values of (row, layer) pairs whose attention was skipped."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch, product_rules
from .primitives import wait_for_producers
from .products import row_product, statistics_first, weight_tile
from .qkv import head_halves, pair_rows, store_halves, turns
from .values import Norm, Rope, RowMap, Slots, Stack


@triton.jit(do_not_specialize=["stride_row"])
def _fill_kv_kernel(
    x_ptr,
    row_ptr,
    count_ptr,
    norm_ptr,
    norm_bias_ptr,
    w_ptr,
    bias_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    rotated_ptr,
    keys_ptr,
    values_ptr,
    page_ptr,
    offset_ptr,
    stride_x,
    stride_row,
    stride_norm,
    stride_norm_bias,
    stride_w,
    stride_bias,
    stride_k_norm,
    stride_rope,
    stride_key_layer,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    stride_value_layer,
    stride_value_page,
    stride_value_head,
    stride_value_slot,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """k, v = norm(x[row])·Wᵀ + bias; RMSNorm of k over D; rotation; to the slots of row [L, count] in every layer."""
    BLOCKS: tl.constexpr = (D // 2 + PAIRS - 1) // PAIRS
    pid_block = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    head = pid_block // BLOCKS
    pair = pid_block % BLOCKS * PAIRS
    is_key = head < KV_HEADS
    offs_d, mask_w = pair_rows(pair, D, PAIRS)
    offs_w = layer * stride_w + ((HEADS + head) * D + offs_d).to(tl.int64) * K_PADDED
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)

    wait_for_producers(PDL)
    count = tl.load(count_ptr + layer)
    if tl.program_id(0) * ROWS >= count:
        return
    mask_r = offs_m < count
    offs_r = tl.load(row_ptr + layer * stride_row + offs_m, mask=mask_r, other=0).to(tl.int64)
    bias = None
    norm = None
    rotated = is_key
    cos = None
    sin = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + layer * stride_bias + (HEADS + head) * D + offs_d, mask=mask_w, other=0.0)
        bias = bias.to(tl.float32)
    if k_norm_ptr is not None:
        norm = tl.load(k_norm_ptr + layer * stride_k_norm + offs_d, mask=mask_w, other=0.0).to(tl.float32)
    if rotated_ptr is not None:
        rotated = is_key & (tl.load(rotated_ptr + layer) != 0)
    if cos_ptr is not None:
        cos, sin = turns(cos_ptr, sin_ptr, stride_rope, pair, offs_r, mask_r, rotated, D, PAIRS)
    page = tl.load(page_ptr + offs_r, mask=mask_r, other=0)
    offset = tl.load(offset_ptr + offs_r, mask=mask_r, other=0)
    if norm_bias_ptr is not None:
        norm_bias_ptr += layer * stride_norm_bias
    norm_ptr += layer * stride_norm
    acc = row_product(
        x_ptr,
        offs_r * stride_x,
        mask_r,
        w_ptr,
        offs_w,
        mask_w,
        weight_tile(w_ptr, offs_w, mask_w, K_PADDED, BLOCK_K, PARTS, BLOCK_K),
        None,
        norm_ptr,
        norm_bias_ptr,
        None,
        eps,
        K,
        K_PADDED,
        2 * PAIRS,
        BLOCK_K,
        PARTS,
        BLOCK_K,
        ROWS,
        REDUCED=k_norm_ptr is not None,
    )
    lower, upper = head_halves(acc, bias, norm, is_key, eps, cos, sin, rotated, D, PAIRS, ROWS)
    if is_key:
        place = layer * stride_key_layer + page * stride_key_page + offset * stride_key_slot + head * stride_key_head
        store_halves(keys_ptr, place, mask_r, lower, upper, pair, D, PAIRS)
    else:
        place = layer * stride_value_layer + page * stride_value_page + offset * stride_value_slot
        place += (head - KV_HEADS) * stride_value_head
        store_halves(values_ptr, place, mask_r, lower, upper, pair, D, PAIRS)


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
    """k, v of the rows of each layer's map, written to the rows' slots in that layer's cache.

    The same k and v as those of `qkv_rope_append`, bit for bit. x [R, H]; norm.weight, norm.bias [L, H]; weight
    [L, (heads + 2·kv_heads)·D, H], of which the first heads·D rows are not used; bias [L, N]; k_norm [L, D]; `rotated`
    bool [L]: layers that rotate, all where it is None; keys, values [L, pages, kv_heads, P, D].
    """
    if weight.data is None:
        raise TypeError("weight: expected a stack whose layers lie in one tensor")
    columns = x.shape[1]
    layers, mapped = rows.row.shape
    _, _, kv_heads, _, head_dim = keys.shape
    arch = launch.architecture()
    short, itemsize = statistics_first(norm, x.dtype), x.element_size()
    rule = product_rules.projection_rule(
        head_dim,
        k_norm is not None,
        weight[0].rows,
        columns,
        # Each layer has a norm of its own, which stays in the product.
        min(mapped, product_rules.whole_steps(columns)),
        tile,
        itemsize,
        arch,
        short=short,
    )
    pairs = rule.block_n // 2
    grid = (triton.cdiv(mapped, rule.rows), 2 * kv_heads * triton.cdiv(head_dim // 2, pairs), layers)
    _fill_kv_kernel[grid](
        x,
        rows.row,
        rows.count.contiguous(),
        norm.weight,
        norm.bias,
        weight.data,
        bias,
        k_norm,
        None if rope is None else rope.cos,
        None if rope is None else rope.sin,
        None if rope is None or rotated is None else rotated.contiguous(),
        keys,
        values,
        slots.page.contiguous(),
        slots.offset.contiguous(),
        x.stride(0),
        rows.row.stride(0),
        norm.weight.stride(0),
        0 if norm.bias is None else norm.bias.stride(0),
        weight.data.stride(0),
        0 if bias is None else bias.stride(0),
        0 if k_norm is None else k_norm.stride(0),
        0 if rope is None else rope.cos.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        keys.stride(3),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        values.stride(3),
        norm.eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        K=columns,
        K_PADDED=launch.padded(columns),
        PAIRS=pairs,
        BLOCK_K=rule.block_k,
        PARTS=rule.parts,
        ROWS=rule.rows,
        **launch.options(rule.warps, rule.stages, rule.registers),
    )
