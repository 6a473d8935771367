"""Where the last tokens of a text stand before, the longest matches first."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .lookup_rule import lookup_rule
from .primitives import wait_for_producers
from .reference import lookup as reference_lookup

# Between texts and past the end of one, and before its first: no token.
GAP: tl.constexpr = tl.constexpr(reference_lookup.GAP)
BEFORE: tl.constexpr = tl.constexpr(-2)


@triton.jit(
    do_not_specialize=["capacity", "size", "max_ngram", "blocks"],
    do_not_specialize_on_alignment=["length_ptr"],
)
def _matches_kernel(
    text_ptr,
    length_ptr,
    memory_ptr,
    counts_ptr,
    longer_ptr,
    places_ptr,
    capacity,
    size,
    max_ngram,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """places before length where text[length] stands, in one block of positions, longest match first, newest first.

    text int32 [S, capacity], length int64 [S]; with memory int32 [size] the places are there, anywhere. Blocks are
    numbered from the last one: places int32 [S, BLOCKS, KEPT], the first KEPT of each; counts int32 [S, max_ngram,
    BLOCKS], how many match max_ngram − i tokens; longer as counts, how many match more.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    pid_b = tl.program_id(1)
    offs = (blocks - pid_b) * BLOCK - 1 - tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    length = tl.load(length_ptr + pid_s).to(tl.int32)
    text_ptr += pid_s * capacity
    source_ptr = text_ptr
    going = offs < length
    if memory_ptr is not None:
        source_ptr = memory_ptr
        going = offs < size
    last = tl.load(text_ptr + length)
    going = going & (tl.load(source_ptr + offs, mask=going, other=GAP) == last)
    matched = going.to(tl.int32)
    for n in range(1, max_ngram):
        going = going & (offs >= n)
        token = tl.where(length < n, BEFORE, tl.load(text_ptr + tl.maximum(length - n, 0)))
        going = going & (tl.load(source_ptr + offs - n, mask=going, other=GAP) == token)
        matched += going.to(tl.int32)
    counts_ptr += pid_s * max_ngram * BLOCKS + pid_b
    longer_ptr += pid_s * max_ngram * BLOCKS + pid_b
    places_ptr += (pid_s * BLOCKS + pid_b) * KEPT
    longer = 0
    for i in range(0, max_ngram):
        same = (matched == max_ngram - i).to(tl.int32)
        rank = longer + tl.cumsum(same, axis=0) - 1
        count = tl.sum(same, axis=0)
        tl.store(places_ptr + rank, offs, mask=(same != 0) & (rank < KEPT))
        tl.store(counts_ptr + i * BLOCKS, count)
        tl.store(longer_ptr + i * BLOCKS, longer)
        longer += count


@triton.jit
def ranked(
    counts_ptr, longer_ptr, places_ptr, order, pid_s, max_ngram, blocks, BLOCKS: tl.constexpr, KEPT: tl.constexpr
):
    """The places of all blocks in order, how many tokens match at each, 0 for none, and how many places there are."""
    offs_block = tl.arange(0, BLOCKS)
    counts_ptr += pid_s * max_ngram * BLOCKS
    longer_ptr += pid_s * max_ngram * BLOCKS
    places_ptr += pid_s * BLOCKS * KEPT
    place = tl.zeros_like(order)
    matched = tl.zeros_like(order)
    found = 0
    for i in range(0, max_ngram):
        count = tl.load(counts_ptr + i * BLOCKS + offs_block, mask=offs_block < blocks, other=0)
        ends = found + tl.cumsum(count, axis=0)
        passed = ends[:, None] <= order[None, :]
        block = tl.sum(passed.to(tl.int32), axis=0)
        start = found + tl.sum(tl.where(passed, count[:, None], 0), axis=0)
        total = found + tl.sum(count, axis=0)
        mine = (order >= found) & (order < total)
        rank = tl.load(longer_ptr + i * BLOCKS + block, mask=mine, other=0) + order - start
        place += tl.load(places_ptr + block * KEPT + rank, mask=mine, other=0)
        matched += tl.where(mine, max_ngram - i, 0)
        found = total
    return place, matched, found


class Matches(NamedTuple):
    """What `_matches_kernel` leaves, and of how many blocks."""

    counts: Tensor
    longer: Tensor
    places: Tensor
    blocks: int


def matches(text: Tensor, length: Tensor, memory: Tensor | None, max_ngram: int, votes: int | None) -> Matches:
    """Where the last tokens of every text stand before, or anywhere in `memory`."""
    sequences, capacity = text.shape
    size = capacity if memory is None else len(memory)
    rule = lookup_rule(size, votes)
    sizes = {"dtype": torch.int32, "device": text.device}
    counts, longer = (torch.empty((sequences, max_ngram, rule.blocks), **sizes) for _ in range(2))
    places, blocks = torch.empty((sequences, rule.blocks, rule.kept), **sizes), -(-size // rule.block)
    _matches_kernel[(sequences, blocks)](
        text,
        length,
        memory,
        counts,
        longer,
        places,
        capacity,
        size,
        max_ngram,
        blocks,
        BLOCK=rule.block,
        BLOCKS=rule.blocks,
        KEPT=rule.kept,
        **launch.options(4, 1),
    )
    return Matches(counts, longer, places, blocks)
