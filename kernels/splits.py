"""Where attention divides positions: into splits that programs share, and blocks of one page in them; their merge."""

import triton
import triton.language as tl
from torch import Tensor

from . import attention_index, attention_rules, launch
from .attention_index import RowGroups, TritonIndex
from .primitives import wait_for_producers
from .row_groups import rows_of_group

NEAR_SPLITS: tl.constexpr = tl.constexpr(attention_rules.NEAR_SPLITS)
FAR_FACTOR: tl.constexpr = tl.constexpr(attention_rules.FAR_FACTOR)
UNSEEN: tl.constexpr = tl.constexpr(attention_index.UNSEEN)
# Rows × heads that are merged at once.
MERGED: tl.constexpr = tl.constexpr(attention_rules.PRODUCT_ROWS)


@triton.jit
def split_length(last, SPLIT: tl.constexpr, EVEN: tl.constexpr):
    """Positions of a near split; of every split where they are even: the fewest that make no more splits than uneven.

    n positions make n ÷ (2·SPLIT) splits of twice the length and NEAR_SPLITS + (n − near) ÷ (FAR_FACTOR·SPLIT) uneven.
    """
    NEAR: tl.constexpr = NEAR_SPLITS * SPLIT
    longer = tl.where(last < 3 * NEAR, 2 * SPLIT, FAR_FACTOR * SPLIT)
    return tl.where(last < NEAR, SPLIT, longer) if EVEN else SPLIT


@triton.jit
def split_begin(split, length, EVEN: tl.constexpr):
    """The first position of a split: NEAR_SPLITS of `length` positions, then longer ones unless they are even."""
    if EVEN:
        begin = split * length
    else:
        begin = (tl.minimum(split, NEAR_SPLITS) + tl.maximum(split - NEAR_SPLITS, 0) * FAR_FACTOR) * length
    return begin


@triton.jit
def blocks_of(split, length, oldest, last, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """The blocks of a split that hold positions from oldest to last: the first one, and the one after them.

    There are none where last is −1: integers are divided towards zero.
    """
    begin = tl.maximum(split_begin(split, length, EVEN), oldest) // BLOCK
    return begin, tl.minimum(split_begin(split + 1, length, EVEN) // BLOCK, (last + BLOCK) // BLOCK)


@triton.jit
def pages_of(table_ptr, split, length, oldest, last, BLOCK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr):
    """The pages that `blocks_of` lie on, as many as a split can have."""
    begin, end = blocks_of(split, length, oldest, last, BLOCK, EVEN)
    offs_page = begin + tl.arange(0, FAR_FACTOR * SPLIT // BLOCK)
    return tl.load(table_ptr + offs_page, mask=offs_page < end, other=0, cache_modifier=".cg")


@triton.jit
def split_of(position, length, EVEN: tl.constexpr):
    """The split a position lies in."""
    if EVEN:
        split = position // length
    else:
        near = NEAR_SPLITS * length
        split = tl.minimum(position, near) // length + tl.maximum(position - near, 0) // (FAR_FACTOR * length)
    return split


@triton.jit
def nothing_seen(M: tl.constexpr, D_PADDED: tl.constexpr):
    """Maximum, sum of weights and weighted sum of values before any key."""
    return tl.full((M,), UNSEEN, tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, D_PADDED), tl.float32)


@triton.jit
def fold_split(peak, total, acc, split_peak, split_total, split_acc):
    """Softmax sums over all splits so far with those of the next one added."""
    higher = tl.maximum(peak, split_peak)
    rescale = tl.exp2(peak - higher)
    weight = tl.exp2(split_peak - higher)
    total = tl.fma(total, rescale, split_total * weight)
    acc = tl.fma(acc, rescale[:, None], split_acc * weight[:, None])
    return higher, total, acc


@triton.jit
def store_mean(out_ptr, offs_out, total, acc, mask_m, mask):
    """The weighted mean of the values."""
    out = acc / tl.where(mask_m, total, 1.0)[:, None]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge(
    tile,
    partial_ptr,
    state_ptr,
    out_ptr,
    begin,
    end,
    stride_split,
    pid_kv,
    count,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    M: tl.constexpr,
):
    """The splits that programs left of the `tile`-th M rows × heads of `count` rows: `begin` to before `end`, in order.

    A load takes much longer than what is done with it, so that four are on their way at any time.
    """
    HEADS_PADDED: tl.constexpr = triton.next_power_of_2(GROUP)
    offs = tile * M + tl.arange(0, M)
    offs_row, offs_head = offs // HEADS_PADDED, offs % HEADS_PADDED
    offs_d = tl.arange(0, D_PADDED)
    mask_m = (offs_head < GROUP) & (offs_row < count)
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    offs_m = offs_row * HEADS + pid_kv * GROUP + offs_head
    offs = offs_m[:, None] * D + offs_d[None, :]
    peak, total, acc = nothing_seen(M, D_PADDED)
    one = _load_split(partial_ptr, state_ptr, begin, end, stride_split, offs_m, offs, mask_m, mask, D)
    two = _load_split(partial_ptr, state_ptr, begin + 1, end, stride_split, offs_m, offs, mask_m, mask, D)
    three = _load_split(partial_ptr, state_ptr, begin + 2, end, stride_split, offs_m, offs, mask_m, mask, D)
    four = _load_split(partial_ptr, state_ptr, begin + 3, end, stride_split, offs_m, offs, mask_m, mask, D)
    for at in range(begin + 4, end + 4, 4):
        peak, total, acc = fold_split(peak, total, acc, one[0], one[1], one[2])
        one = _load_split(partial_ptr, state_ptr, at, end, stride_split, offs_m, offs, mask_m, mask, D)
        peak, total, acc = fold_split(peak, total, acc, two[0], two[1], two[2])
        two = _load_split(partial_ptr, state_ptr, at + 1, end, stride_split, offs_m, offs, mask_m, mask, D)
        peak, total, acc = fold_split(peak, total, acc, three[0], three[1], three[2])
        three = _load_split(partial_ptr, state_ptr, at + 2, end, stride_split, offs_m, offs, mask_m, mask, D)
        peak, total, acc = fold_split(peak, total, acc, four[0], four[1], four[2])
        four = _load_split(partial_ptr, state_ptr, at + 3, end, stride_split, offs_m, offs, mask_m, mask, D)
    store_mean(out_ptr, offs, total, acc, mask_m, mask)


@triton.jit
def _load_split(
    partial_ptr,
    state_ptr,
    split,
    end,
    stride_split,
    offs_m,
    offs,
    mask_m,
    mask,
    D: tl.constexpr,
):
    """What another program left of a split, past the first-level cache; from `end` on what changes nothing."""
    base = split * stride_split
    state_ptr += 2 * base
    mask_m = mask_m & (split + tl.zeros(mask_m.shape, tl.int32) < end)
    mask = mask & mask_m[:, None]
    peak = tl.load(state_ptr + 2 * offs_m, mask=mask_m, other=UNSEEN, cache_modifier=".cg")
    total = tl.load(state_ptr + 2 * offs_m + 1, mask=mask_m, other=0.0, cache_modifier=".cg")
    acc = tl.load(partial_ptr + base * D + offs, mask=mask, other=0.0, cache_modifier=".cg")
    return peak, total, acc


@triton.jit(do_not_specialize=["rows", "width", "window"], do_not_specialize_on_alignment=["active_ptr"])
def _merge_splits_kernel(
    partial_ptr,
    state_ptr,
    out_ptr,
    first_ptr,
    count_ptr,
    sequence_ptr,
    position_ptr,
    active_ptr,
    rows,
    width,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """`merge` of MERGED rows × heads of a group of rows, whose splits `_attend_kernel` left."""
    pid_group, pid_kv, pid_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_row = tl.arange(0, GROUP_ROWS)
    first, count, _, _, _, last, oldest = rows_of_group(
        pid_group, first_ptr, count_ptr, sequence_ptr, position_ptr, active_ptr, offs_row, offs_row >= 0, width, window,
        GROUP_ROWS, PDL,
    )  # fmt: skip
    length = split_length(last, SPLIT, EVEN)
    begin, end = split_of(oldest, length, EVEN), split_of(last, length, EVEN) + 1
    if first_ptr is None:
        wait_for_producers(PDL)
    if last < 0 or end - begin == 1:
        return
    merge(
        pid_tile, partial_ptr + first * (HEADS * D), state_ptr + first * (2 * HEADS), out_ptr + first * (HEADS * D),
        begin, end, rows.to(tl.int64) * HEADS, pid_kv, count, HEADS, GROUP, D, D_PADDED, MERGED,
    )  # fmt: skip


def merge_apart(
    index: TritonIndex,
    groups: RowGroups | None,
    partial: Tensor,
    state: Tensor,
    out: Tensor,
    active: Tensor | None,
    rule: attention_rules.AttentionRule,
    *,
    bound: int,
    group: int,
    window: int | None,
) -> None:
    """The splits that attention left of `bound` groups of rows, merged by as many programs as they have tiles.

    partial float32 [splits, R, heads, D], state float32 [splits, R, heads, 2] → out [R, heads·D]. `active`, contiguous,
    is read before attention has ended.
    """
    _, rows, heads, head_dim = partial.shape
    tiles = triton.cdiv(rule.rows * triton.next_power_of_2(group), MERGED.value)
    _merge_splits_kernel[(bound, heads // group, tiles)](
        partial,
        state,
        out,
        groups.first if groups else None,
        groups.count if groups else None,
        index.sequence,
        index.position,
        active,
        rows,
        index.width or 0,
        window,
        HEADS=heads,
        GROUP=group,
        D=head_dim,
        D_PADDED=max(16, triton.next_power_of_2(head_dim)),
        SPLIT=rule.split,
        GROUP_ROWS=rule.rows,
        EVEN=index.tile is None,
        **launch.options(rule.warps, registers=launch.PRODUCT_REGISTERS) | {"enable_fp_fusion": False},
    )
