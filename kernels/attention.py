"""Masked-layer attention over the paged cache: decode, verify, draft trees and prefill in one kernel.

A program takes up to GROUP_ROWS consecutive rows of one sequence with all query heads that share a key head, so that
keys and values are read once for them. It walks logical positions in blocks of one page; blocks are folded by online
softmax into splits, splits into the result, both in order. Where a split begins depends on nothing but position, and
a block no key of which a row sees changes nothing in that row, bit for bit: a row's result is the same alone, among
other rows, and as a node of a draft tree. Products and sums are never contracted by the compiler, so that all variants
of the kernel round alike.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_rules, launch
from .attention_index import Index, TritonIndex
from .primitives import dot, is_last, prefetch, prefetch_first, wait_for_producers
from .row_groups import row_groups, rows_of_group
from .splits import (
    FAR_FACTOR,
    blocks_of,
    fold_split,
    merge,
    merge_apart,
    nothing_seen,
    pages_of,
    split_length,
    split_of,
    store_mean,
)
from .values import Matrix

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
CACHE_LINE: tl.constexpr = tl.constexpr(launch.CACHE_LINE)


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

    q [R, heads, D]; keys, values [pages, kv_heads, P, D] of equal strides; slopes float32 [heads] for ALiBi; `window`:
    a row sees itself and the window − 1 positions before it. Returns [R, heads·D], undefined for rows of no sequence
    and rows that are not `active` bool [R]. Raises TypeError for an index of another backend. The kernel launched just
    before must have written neither the index nor `active`: with rows of equal `width` both are read before it
    ends, and the L2 cache is asked for `ahead`, the weight of the kernel after this one.
    """
    if not isinstance(index, TritonIndex):
        raise TypeError(f"index: expected TritonIndex, got {type(index).__name__}")
    rows, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    out = torch.empty(rows, heads * head_dim, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    assert active is None or index.width is None or active.is_contiguous(), "a copy would be written just before"
    active = None if active is None else active.contiguous()
    arch = launch.architecture()
    tile = launch.tile_of(rows, index.tile)
    sequences, width = index.block_table.shape[0], index.width
    rule = attention_rules.attention_rule(head_dim, group, kv_heads, tile, q.element_size(), arch, width, sequences)
    assert index.page_size <= rule.split, "a split is whole pages"
    groups = row_groups(index, rule.rows) if width is None else None
    bound = groups.bound if groups else sequences * triton.cdiv(width or 1, rule.rows)
    splits = attention_rules.attention_splits(index.capacity, rule.split)
    tiles, scratch_bytes = bound * kv_heads, 4 * splits * q.numel()
    in_order = attention_rules.attention_in_order(tiles, scratch_bytes)
    apart = not in_order and rule.apart
    programs, partial, state, arrivals = 1, None, None, None
    if not in_order:
        programs = attention_rules.attention_programs(tiles, splits, rule.at_once)
        # Nobody counts arrivals where a launch of its own merges.
        partial, state, arrivals = index.scratch(0 if apart else tiles, splits, heads, head_dim)
    tree = index.tree
    asked = None if groups or not launch.asks(arch) else ahead
    _attend_kernel[(bound, kv_heads, programs)](
        q,
        keys,
        values,
        out,
        groups.first if groups else None,
        groups.count if groups else None,
        index.sequence,
        index.position,
        index.block_table,
        None if tree is None else tree.length,
        None if tree is None else tree.slot,
        slopes,
        active,
        partial,
        state,
        None if apart else arrivals,
        None if asked is None else asked.data,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        index.block_table.stride(0),
        0 if tree is None else tree.slot.stride(0),
        rows,
        width or 0,
        scale * LOG2_E.value,
        window,
        0 if asked is None else launch.ahead_bytes(asked.data.nbytes),
        HEADS=heads,
        GROUP=group,
        D=head_dim,
        D_PADDED=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=index.page_size,
        SPLIT=rule.split,
        GROUP_ROWS=rule.rows,
        GROUP_PADDED=rule.heads,
        IN_ORDER=in_order,
        EVEN=index.tile is None,
        **launch.options(rule.warps, rule.stages, launch.PRODUCT_REGISTERS) | {"enable_fp_fusion": False},
    )
    if apart:
        merge_apart(index, groups, partial, state, out, active, rule, bound=bound, group=group, window=window)
    return out


@triton.jit(
    do_not_specialize=["stride_table", "stride_node", "rows", "width", "window", "ahead"],
    do_not_specialize_on_alignment=["active_ptr"],
)
def _attend_kernel(  # noqa: PLR0915
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    first_ptr,
    count_ptr,
    sequence_ptr,
    position_ptr,
    table_ptr,
    length_ptr,
    slot_ptr,
    slopes_ptr,
    active_ptr,
    partial_ptr,
    state_ptr,
    arrivals_ptr,
    ahead_ptr,
    stride_q_row,
    stride_q_head,
    stride_page,
    stride_head,
    stride_slot,
    stride_table,
    stride_node,
    rows,
    width,
    scale,
    window,
    ahead,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    IN_ORDER: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[r, h] = Σₚ softmaxₚ(scale·q[r, h]·k[p] + slope[h]·(p − position[r]))·v[p], scores in units of log 2.

    q [rows, HEADS, D]; k, v [pages, HEADS / GROUP, BLOCK, D]; partial float32 [splits, rows, HEADS, D]; state float32
    [splits, rows, HEADS, 2], maximum and sum; arrivals int32 [row groups, HEADS / GROUP], zero before and after: the
    last to arrive merges the splits, or a kernel of its own where it is None (`merge_apart`).
    Row groups are given by first and count int32, or every sequence has `width` rows.
    """
    M: tl.constexpr = GROUP_ROWS * GROUP_PADDED
    pid_group, pid_kv, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_d = tl.arange(0, D_PADDED)
    offs_row = tl.arange(0, M) // GROUP_PADDED
    offs_head = pid_kv * GROUP + tl.arange(0, M) % GROUP_PADDED
    mask_m = tl.arange(0, M) % GROUP_PADDED < GROUP
    first, count, owner, position, mask_m, last, oldest = rows_of_group(
        pid_group, first_ptr, count_ptr, sequence_ptr, position_ptr, active_ptr, offs_row, mask_m, width, window,
        GROUP_ROWS, PDL,
    )  # fmt: skip
    length = split_length(last, SPLIT, EVEN)
    first_split = split_of(oldest, length, EVEN)
    splits = split_of(last, length, EVEN) + 1 - first_split
    # Rows of no sequence have no pages, and what stands before the table is no page's number.
    table_ptr += tl.maximum(tl.max(owner, axis=0), 0) * stride_table
    keys_ptr += pid_kv.to(tl.int64) * stride_head
    values_ptr += pid_kv.to(tl.int64) * stride_head
    pages = pages_of(table_ptr, first_split + pid_split, length, oldest, last, BLOCK, SPLIT, EVEN)
    if first_ptr is None:
        # Where rows stand was known before the kernel that is waited for: that wrote queries and the newest keys.
        if PDL:
            _prefetch_blocks(
                keys_ptr, values_ptr, pages, first_split + pid_split, length, oldest, last, stride_page, stride_slot,
                BLOCK, SPLIT, D, EVEN,
            )  # fmt: skip
            if ahead_ptr is not None:
                prefetch_first(ahead_ptr, tl.where(last < 0, 0, ahead))
        wait_for_producers(PDL)
    if last < 0 or pid_split >= splits:
        return

    mask = mask_m[:, None] & (offs_d < D)[None, :]
    q_ptr += first * stride_q_row
    q = tl.load(q_ptr + (offs_row * stride_q_row + offs_head * stride_q_head)[:, None] + offs_d[None, :], mask, 0.0)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + offs_head, mask=mask_m, other=0.0) * LOG2_E
    shared = last // BLOCK + 1
    if slot_ptr is not None:
        length_ptr += first
        slot_ptr += first * stride_node
        shared = tl.min(tl.load(length_ptr + offs_row, mask=mask_m, other=2147483647), axis=0).to(tl.int32) // BLOCK
        # A tree has rows for the largest there may be: those past the last that is one have no path.
        members = tl.max(tl.where(mask_m, offs_row + 1, 0), axis=0)

    offs_state = 2 * (offs_row * HEADS + offs_head)
    offs_out = (offs_row * HEADS + offs_head)[:, None] * D + offs_d[None, :]
    stride_split = rows.to(tl.int64) * HEADS
    peak, total, acc = nothing_seen(M, D_PADDED)
    for split in tl.range(first_split + pid_split, first_split + splits, tl.num_programs(2), disable_licm=True):
        begin, end = blocks_of(split, length, oldest, last, BLOCK, EVEN)
        offs_page = begin + tl.arange(0, FAR_FACTOR * SPLIT // BLOCK)
        split_peak, split_total, split_acc = nothing_seen(M, D_PADDED)
        for block in range(begin, tl.minimum(end, shared)):
            page = tl.sum(tl.where(offs_page == block, pages, 0), axis=0) * stride_page
            split_peak, split_total, split_acc = _fold_block(
                q, keys_ptr + page, values_ptr + page, tl.arange(0, BLOCK) * stride_slot, block, position, oldest, last,
                slope, scale, window, split_peak, split_total, split_acc, BLOCK, D,
            )  # fmt: skip
        if slot_ptr is not None:
            split_peak, split_total, split_acc = _fold_paths(
                q, keys_ptr, values_ptr, table_ptr, length_ptr, slot_ptr, stride_page, stride_slot, stride_node,
                tl.maximum(begin, shared), end, members, offs_row, position, oldest,
                slope, scale, window, split_peak, split_total, split_acc, BLOCK, D,
            )  # fmt: skip
        if IN_ORDER:
            peak, total, acc = fold_split(peak, total, acc, split_peak, split_total, split_acc)
        elif splits == 1:
            store_mean(out_ptr + first * (HEADS * D), offs_out, split_total, split_acc, mask_m, mask)
        else:
            base = split * stride_split + first * HEADS
            tl.store(partial_ptr + base * D + offs_out, split_acc, mask=mask)
            tl.store(state_ptr + 2 * base + offs_state, split_peak, mask=mask_m)
            tl.store(state_ptr + 2 * base + offs_state + 1, split_total, mask=mask_m)
        pages = pages_of(table_ptr, split + tl.num_programs(2), length, oldest, last, BLOCK, SPLIT, EVEN)

    if IN_ORDER:
        store_mean(out_ptr + first * (HEADS * D), offs_out, total, acc, mask_m, mask)
    elif arrivals_ptr is not None:
        if splits == 1:
            return
        arrivals_ptr += pid_group * tl.num_programs(1) + pid_kv
        if not is_last(arrivals_ptr, tl.minimum(splits, tl.num_programs(2))):
            return
        tl.store(arrivals_ptr, 0)
        merge(
            0, partial_ptr + first * (HEADS * D), state_ptr + first * (2 * HEADS), out_ptr + first * (HEADS * D),
            first_split, first_split + splits, stride_split, pid_kv, count, HEADS, GROUP, D, D_PADDED,
            GROUP_ROWS * triton.next_power_of_2(GROUP),
        )  # fmt: skip


@triton.jit
def _prefetch_blocks(
    keys_ptr,
    values_ptr,
    pages,
    split,
    length,
    oldest,
    last,
    stride_page,
    stride_slot,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Ask for the first blocks of a split, as many as the shortest has, before anything waits; none for no rows."""
    LINE: tl.constexpr = CACHE_LINE // (keys_ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2((D + LINE - 1) // LINE)
    begin, end = blocks_of(split, length, oldest, last, BLOCK, EVEN)
    offs_page = begin + tl.arange(0, FAR_FACTOR * SPLIT // BLOCK)
    offs = tl.arange(0, BLOCK)[:, None] * stride_slot + tl.minimum(tl.arange(0, LINES) * LINE, D - 1)[None, :]
    if last >= 0:
        for block in tl.static_range(SPLIT // BLOCK):
            # No branch: one that is not there is the last one once more.
            page = tl.sum(tl.where(offs_page == tl.minimum(begin + block, end - 1), pages, 0), axis=0) * stride_page
            prefetch(keys_ptr + page + offs)
            prefetch(values_ptr + page + offs)


@triton.jit
def _fold_paths(
    q,
    keys_ptr,
    values_ptr,
    table_ptr,
    length_ptr,
    slot_ptr,
    stride_page,
    stride_slot,
    stride_node,
    begin,
    end,
    members,
    offs_row,
    position,
    oldest,
    slope,
    scale,
    window,
    peak,
    total,
    acc,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """`_fold_block` for blocks begin to end of a tree: each row's own, along its path, other rows seeing nothing."""
    for block in range(begin, end):
        offs_n = block * BLOCK + tl.arange(0, BLOCK)
        for member in range(0, members):
            own = tl.where(offs_row == member, position, -1)
            node = tl.max(own, axis=0)
            mask_n = (offs_n >= oldest) & (offs_n <= node)
            depth = offs_n - tl.load(length_ptr + member).to(tl.int32)
            slot = tl.load(slot_ptr + member * stride_node + depth, mask=mask_n & (depth >= 0), other=0)
            slot = tl.where(depth >= 0, slot, offs_n)
            page = tl.load(table_ptr + slot // BLOCK, mask=mask_n, other=0)
            peak, total, acc = _fold_block(
                q, keys_ptr, values_ptr, page * stride_page + slot % BLOCK * stride_slot, block, own, oldest, node,
                slope, scale, window, peak, total, acc, BLOCK, D,
            )  # fmt: skip
    return peak, total, acc


@triton.jit
def _fold_block(
    q,
    keys_ptr,
    values_ptr,
    offs_kv,
    block,
    position,
    oldest,
    last,
    slope,
    scale,
    window,
    peak,
    total,
    acc,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """Online softmax: maximum, sum of weights and weighted sum of values with one block's keys added.

    Keys of the block lie at offs_kv [BLOCK]; those before oldest or after last are not read.
    """
    D_PADDED: tl.constexpr = q.shape[1]
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    mask_n = (offs_n >= oldest) & (offs_n <= last)
    offs_d = tl.arange(0, D_PADDED)
    mask_kv = mask_n[:, None]
    if D != D_PADDED:
        mask_kv = mask_kv & (offs_d < D)[None, :]
    k = tl.load(keys_ptr + (offs_kv[:, None] + offs_d[None, :]), mask=mask_kv, other=0.0)
    v = tl.load(values_ptr + (offs_kv[:, None] + offs_d[None, :]), mask=mask_kv, other=0.0)
    distance = offs_n[None, :] - position[:, None]
    seen = (distance <= 0) & mask_n[None, :]
    if window is not None:
        seen = seen & (distance > -window)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK), tl.float32)) * scale
    if slope is not None:
        scores = tl.fma(distance.to(tl.float32), slope[:, None], scores)
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    rescale = tl.exp2(peak - higher)
    p = tl.exp2(scores - higher[:, None])
    total = tl.fma(total, rescale, tl.sum(p, axis=1))
    acc = dot(p.to(v.dtype), v, acc * rescale[:, None])
    return higher, total, acc
