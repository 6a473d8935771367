"""Norm, QKV projection, rotation and the write to the cache in one kernel.

A program holds weight rows of one head in pairs half a head apart, so that the rotation stays inside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, product_rules
from .primitives import finite, flags, ordered_sum, wait_for_producers
from .products import halves, row_product, statistics_first, weighed, weight_scale, weight_tile
from .values import Matrix, Norm, Rope, Slots, Split


@triton.jit
def pair_rows(
    pair,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Dimensions pair + i above pair + i + D/2, i < PAIRS, and which of them the head has: [2·PAIRS] each."""
    offs = tl.arange(0, 2 * PAIRS)
    offs_pair = pair + offs % PAIRS
    return offs_pair + offs // PAIRS * (D // 2), offs_pair < D // 2


@triton.jit
def turns(
    cos_ptr,
    sin_ptr,
    stride_rope,
    pair,
    offs_r,
    mask_r,
    rotated,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """cos and sin [·, D] of pairs pair + i, i < PAIRS, at rows offs_r int64 [ROWS], where `rotated`: [PAIRS, ROWS]."""
    offs_pair = pair + tl.arange(0, PAIRS)
    offs = offs_r[None, :] * stride_rope + offs_pair[:, None]
    mask = mask_r[None, :] & (offs_pair < tl.where(rotated, D // 2, 0))[:, None]
    return tl.load(cos_ptr + offs, mask=mask, other=0.0), tl.load(sin_ptr + offs + D // 2, mask=mask, other=0.0)


@triton.jit
def head_halves(
    acc,
    bias,
    norm,
    normed,
    eps,
    cos,
    sin,
    rotated,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rotate(RMSNorm(acc + bias)) of acc [2·PAIRS, ROWS] at `pair_rows` → its halves, float32 [PAIRS, ROWS] each.

    bias, norm float32 [2·PAIRS]; cos, sin of `turns`; None leaves a step out. `normed` and `rotated` turn the norm and
    the rotation off for a head. All of it is asked for before the product.
    """
    if bias is not None:
        acc += bias[:, None]
    if norm is not None and normed:
        acc *= tl.rsqrt(ordered_sum(tl.fma(acc, acc, 0.0)) / D + eps)[None, :] * norm[:, None]
    lower, upper = halves(acc, PAIRS, ROWS)
    if cos is not None:
        first, second = tl.fma(lower, cos, -(upper * sin)), tl.fma(upper, cos, lower * sin)
        lower, upper = tl.where(rotated, first, lower), tl.where(rotated, second, upper)
    return lower, upper


@triton.jit
def store_halves(
    out_ptr,
    offs_out,
    mask_r,
    lower,
    upper,
    pair,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """lower and upper [PAIRS, ROWS] to dimensions pair + i and pair + i + D/2 of the heads at offs_out int64 [ROWS].

    What overflows is made `finite`.
    """
    offs_pair = pair + tl.arange(0, PAIRS)
    ptrs = out_ptr + offs_out[None, :] + offs_pair[:, None]
    mask = mask_r[None, :] & (offs_pair < D // 2)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(ptrs, finite(lower, dtype).to(dtype), mask=mask)
    tl.store(ptrs + D // 2, finite(upper, dtype).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["active_ptr", "write_ptr"])
def _qkv_rope_append_kernel(  # noqa: PLR0915
    x_ptr,
    norm_ptr,
    norm_bias_ptr,
    inverse_rms_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    page_ptr,
    offset_ptr,
    active_ptr,
    write_ptr,
    stride_x,
    stride_rope,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    stride_value_page,
    stride_value_head,
    stride_value_slot,
    rows,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SETTLED: tl.constexpr,
    PDL: tl.constexpr,
):
    """q, k, v = norm(x)·Wᵀ + bias; RMSNorm of q and k over D; rotation; q [rows, HEADS, D], k, v to their slots.

    inverse_rms float32 [rows], of x that is `weighed`.
    """
    BLOCKS: tl.constexpr = (D // 2 + PAIRS - 1) // PAIRS
    pid_block = tl.program_id(1)
    head = pid_block // BLOCKS
    pair = pid_block % BLOCKS * PAIRS
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    offs_d, mask_w = pair_rows(pair, D, PAIRS)
    offs_w = (head * D + offs_d).to(tl.int64) * K_PADDED
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < rows
    mask_out = mask_r
    GATED: tl.constexpr = active_ptr is not None or write_ptr is not None
    mask_first = mask_w
    if SETTLED:
        # By a mask: where programs end here, registers are spilled on sm_100.
        mask_first = mask_w & (tl.max(flags(active_ptr, offs_r, mask_r).to(tl.int32), axis=0) != 0)
    if SETTLED or not GATED:
        first = weight_tile(w_ptr, offs_w, mask_first, K_PADDED, BLOCK_K, PARTS, CHUNK)
    wait_for_producers(PDL)
    if is_query:
        if active_ptr is not None:
            mask_out = mask_r & (tl.load(active_ptr + offs_r, mask=mask_r, other=0) != 0)
    elif write_ptr is not None:
        mask_out = mask_r & (tl.load(write_ptr + offs_r, mask=mask_r, other=0) != 0)
    if GATED:  # noqa: SIM102 - this is decided by the compiler, what follows by the program
        if tl.max(mask_out.to(tl.int32), axis=0) == 0:
            return
    if GATED and not SETTLED:
        first = weight_tile(w_ptr, offs_w, mask_w, K_PADDED, BLOCK_K, PARTS, CHUNK)
    rotated = is_query | is_key
    w_scale = weight_scale(w_scale_ptr, head * D + offs_d, mask_w)
    bias = None
    norm = None
    cos = None
    sin = None
    inverse_rms = None
    if inverse_rms_ptr is not None:
        inverse_rms = tl.load(inverse_rms_ptr + offs_r, mask=mask_r, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head * D + offs_d, mask=mask_w, other=0.0).to(tl.float32)
    if q_norm_ptr is not None:
        q_norm = tl.load(q_norm_ptr + offs_d, mask=mask_w, other=0.0)
        k_norm = tl.load(k_norm_ptr + offs_d, mask=mask_w, other=0.0)
        norm = tl.where(is_query, q_norm, k_norm).to(tl.float32)
    if cos_ptr is not None:
        cos, sin = turns(cos_ptr, sin_ptr, stride_rope, pair, offs_r, mask_r, rotated, D, PAIRS)
    page = tl.load(page_ptr + offs_r, mask=mask_out, other=0)
    offset = tl.load(offset_ptr + offs_r, mask=mask_out, other=0)
    acc = row_product(
        x_ptr,
        offs_r * stride_x,
        mask_r,
        w_ptr,
        offs_w,
        mask_w,
        first,
        w_scale,
        norm_ptr,
        norm_bias_ptr,
        inverse_rms,
        eps,
        K,
        K_PADDED,
        2 * PAIRS,
        BLOCK_K,
        PARTS,
        CHUNK,
        ROWS,
        REDUCED=q_norm_ptr is not None,
    )
    lower, upper = head_halves(acc, bias, norm, rotated, eps, cos, sin, rotated, D, PAIRS, ROWS)
    if is_query:
        store_halves(q_ptr, (offs_r * HEADS + head) * D, mask_out, lower, upper, pair, D, PAIRS)
    elif is_key:
        place = page * stride_key_page + offset * stride_key_slot + (head - HEADS) * stride_key_head
        store_halves(keys_ptr, place, mask_out, lower, upper, pair, D, PAIRS)
    else:
        place = page * stride_value_page + offset * stride_value_slot
        place += (head - HEADS - KV_HEADS) * stride_value_head
        store_halves(values_ptr, place, mask_out, lower, upper, pair, D, PAIRS)


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
    write nothing: FlexiDepth keeps the keys and values of rows it computes no query for. `settled`: both are one
    tensor, and the kernel launched just before has not written it, so that it and the weights can be read before that
    one ends. Raises TypeError for a split weight: heads that no row needs are not read anyway.
    """
    assert not settled or write is active
    if isinstance(weight, Split):
        raise TypeError("weight: expected one matrix of this table's prepare_split, got a split one")
    rows, columns = x.shape
    _, kv_heads, _, head_dim = keys.shape
    normed = q_norm is not None and k_norm is not None
    arch = launch.architecture()
    short = statistics_first(norm, x.dtype)
    rule = product_rules.projection_rule(
        head_dim, normed, weight.rows, columns, rows, tile, x.element_size(), arch, short=short
    )
    if weight.scale is not None:
        rule = rule.light(weight.columns, x.element_size())
    pairs = rule.block_n // 2
    q = torch.empty(rows, heads, head_dim, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(head_dim // 2, pairs)
    grid = (triton.cdiv(rows, rule.rows), (heads + 2 * kv_heads) * blocks)
    x, inside, inverse_rms = weighed(x, norm, rule)
    _qkv_rope_append_kernel[grid](
        x,
        None if inside is None else inside.weight,
        None if inside is None else inside.bias,
        inverse_rms,
        weight.data,
        weight.scale,
        bias,
        q_norm if normed else None,
        k_norm if normed else None,
        None if rope is None else rope.cos,
        None if rope is None else rope.sin,
        q,
        keys,
        values,
        slots.page.contiguous(),
        slots.offset.contiguous(),
        None if active is None else active.contiguous(),
        None if write is None else write.contiguous(),
        x.stride(0),
        0 if rope is None else rope.cos.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        rows,
        norm.eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        K=columns,
        K_PADDED=launch.padded(columns),
        PAIRS=pairs,
        BLOCK_K=rule.block_k,
        PARTS=rule.parts,
        CHUNK=rule.chunk,
        ROWS=rule.rows,
        SETTLED=settled and active is not None and active.is_contiguous() and launch.dependent(arch),
        **launch.options(rule.warps, rule.stages, rule.registers),
    )
    return q
