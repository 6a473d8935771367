"""Where attention divides positions: into splits that programs share, and blocks of one page in them."""

import triton
import triton.language as tl

from . import launch

NEAR_SPLITS: tl.constexpr = tl.constexpr(launch.NEAR_SPLITS)
FAR_FACTOR: tl.constexpr = tl.constexpr(launch.FAR_FACTOR)


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
    """The blocks of a split that hold positions from oldest to last: the first one, and the one after them."""
    begin = tl.maximum(split_begin(split, length, EVEN), oldest) // BLOCK
    return begin, tl.minimum(split_begin(split + 1, length, EVEN) // BLOCK, last // BLOCK + 1)


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
