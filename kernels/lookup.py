"""Drafts from the text itself: what followed its last tokens where they stood before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .lookup_rule import lookup_rule
from .primitives import wait_for_producers
from .values import Found


@triton.jit(
    do_not_specialize=["capacity", "max_ngram", "blocks"],
    do_not_specialize_on_alignment=["length_ptr"],
)
def _matches_kernel(
    text_ptr,
    length_ptr,
    counts_ptr,
    longer_ptr,
    places_ptr,
    capacity,
    max_ngram,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """places before length where text[length] stands, in one block of positions, longest match first, newest first.

    text int32 [S, capacity], length int64 [S]. Blocks are numbered from the last one: places int32 [S, BLOCKS, KEPT],
    the first KEPT of each; counts int32 [S, max_ngram, BLOCKS], how many match max_ngram − i tokens; longer as counts,
    how many match more.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    pid_b = tl.program_id(1)
    offs = (blocks - pid_b) * BLOCK - 1 - tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    length = tl.load(length_ptr + pid_s).to(tl.int32)
    text_ptr += pid_s * capacity
    last = tl.load(text_ptr + length)
    going = offs < length
    going = going & (tl.load(text_ptr + offs, mask=going, other=-1) == last)
    matched = going.to(tl.int32)
    for n in range(1, max_ngram):
        going = going & (offs >= n)
        token = tl.load(text_ptr + tl.maximum(length - n, 0))
        going = going & (tl.load(text_ptr + offs - n, mask=going, other=-1) == token)
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


@triton.jit(
    do_not_specialize=["capacity", "max_ngram", "blocks", "votes", "k"],
    do_not_specialize_on_alignment=["length_ptr", "room_ptr"],
)
def _continuation_kernel(
    text_ptr,
    length_ptr,
    room_ptr,
    counts_ptr,
    longer_ptr,
    places_ptr,
    draft_ptr,
    drafted_ptr,
    capacity,
    max_ngram,
    blocks,
    votes,
    k,
    BLOCKS: tl.constexpr,
    KEPT: tl.constexpr,
    NODES: tl.constexpr,
    VOTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """draft[i] = text[p + 1 + i mod (length − p)] of the first place p, or what most of the first `votes` places say.

    Inputs as `_matches_kernel` leaves them; room int64 [S]; draft int64 [S, k], of which drafted int64 [S] are real.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    order = tl.arange(0, KEPT)
    offs_block = tl.arange(0, BLOCKS)
    wait_for_producers(PDL)
    length = tl.load(length_ptr + pid_s).to(tl.int32)
    most = tl.maximum(tl.minimum(tl.load(room_ptr + pid_s), k), 0).to(tl.int32)
    text_ptr += pid_s * capacity
    counts_ptr += pid_s * max_ngram * BLOCKS
    longer_ptr += pid_s * max_ngram * BLOCKS
    places_ptr += pid_s * BLOCKS * KEPT
    draft_ptr += pid_s * k
    place = tl.zeros_like(order)
    weight = tl.zeros_like(order).to(tl.int64)
    found = 0
    for i in range(0, max_ngram):
        count = tl.load(counts_ptr + i * BLOCKS + offs_block, mask=offs_block < blocks, other=0)
        ends = found + tl.cumsum(count, axis=0)
        passed = ends[None, :] <= order[:, None]
        block = tl.sum(passed.to(tl.int32), axis=1)
        start = found + tl.sum(tl.where(passed, count[None, :], 0), axis=1)
        total = found + tl.sum(count, axis=0)
        mine = (order >= found) & (order < total)
        rank = tl.load(longer_ptr + i * BLOCKS + block, mask=mine, other=0) + order - start
        place += tl.load(places_ptr + block * KEPT + rank, mask=mine, other=0)
        weight += mine.to(tl.int64) << (2 * (max_ngram - 1 - i))
        found = total
    if VOTE:
        going = (order < votes) & (weight > 0)
        drafted = 0
        for step in range(0, k):
            going = going & (place + step < length)
            token = tl.load(text_ptr + place + step + 1, mask=going, other=-1)
            worth = tl.where(going, weight, 0)
            sums = tl.sum(tl.where(token[:, None] == token[None, :], worth[None, :], 0), axis=1)
            heaviest = tl.max(tl.where(going, sums, 0), axis=0)
            chosen = tl.min(tl.where(going & (sums == heaviest), token, 2147483647), axis=0)
            more = (heaviest > 0) & (step < most)
            tl.store(draft_ptr + step, tl.where(more, chosen, 0))
            drafted += more.to(tl.int32)
            going = going & (token == chosen)
    else:
        drafted = tl.where(found > 0, most, 0)
        first = tl.sum(tl.where(order == 0, place, 0), axis=0) + 1
        offs = tl.arange(0, NODES)
        mask = offs < drafted
        token = tl.load(text_ptr + first + offs % tl.maximum(length + 1 - first, 1), mask=mask, other=0)
        tl.store(draft_ptr + offs, token, mask=offs < k)
    tl.store(drafted_ptr + pid_s, drafted)


def lookup(
    text: Tensor, length: Tensor, room: Tensor, *, max_ngram: int, num_draft_tokens: int, votes: int | None
) -> Found:
    """A draft for every sequence from what followed its last tokens where they stood before (prompt lookup decoding).

    text int32 [S, capacity], of which the last token is at `length` int64 [S]; at most `room` int64 [S] and
    `num_draft_tokens` tokens are drafted. Places where the last token stands before are ranked by the number of tokens
    up to there that match, at most `max_ngram`, then the newest first. Without `votes` the draft is what followed the
    first of them; where the text runs out it is taken to repeat from the match on. Otherwise the first `votes` places
    vote on every token, one of n tokens with weight 4ⁿ⁻¹, until none that voted for the draft so far has a next token;
    ties go to the lowest id. Entries past a draft are 0.
    """
    sequences, capacity = text.shape
    rule = lookup_rule(capacity, votes)
    sizes = {"dtype": torch.int32, "device": text.device}
    counts, longer = (torch.empty((sequences, max_ngram, rule.blocks), **sizes) for _ in range(2))
    places = torch.empty((sequences, rule.blocks, rule.kept), **sizes)
    draft = torch.empty((sequences, num_draft_tokens), dtype=torch.int64, device=text.device)
    drafted = torch.empty((sequences,), dtype=torch.int64, device=text.device)
    blocks = -(-capacity // rule.block)
    pdl = launch.dependent(launch.architecture())
    _matches_kernel[(sequences, blocks)](
        text,
        length,
        counts,
        longer,
        places,
        capacity,
        max_ngram,
        blocks,
        BLOCK=rule.block,
        BLOCKS=rule.blocks,
        KEPT=rule.kept,
        PDL=pdl,
        **launch.options(4, 1),
    )
    _continuation_kernel[(sequences,)](
        text,
        length,
        room,
        counts,
        longer,
        places,
        draft,
        drafted,
        capacity,
        max_ngram,
        blocks,
        votes or 1,
        num_draft_tokens,
        BLOCKS=rule.blocks,
        KEPT=rule.kept,
        NODES=max(16, 1 << num_draft_tokens.bit_length()),
        VOTE=votes is not None,
        PDL=pdl,
        **launch.options(rule.warps, 1),
    )
    return Found(draft, drafted)
