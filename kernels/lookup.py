"""Drafts from the text itself: what followed its last tokens where they stood before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .lookup_rule import lookup_rule
from .matches import GAP, matches, ranked
from .primitives import wait_for_producers
from .reference import lookup as reference_lookup
from .values import Found

OWN: tl.constexpr = tl.constexpr(reference_lookup.OWN)
# Above all tokens and rows.
HIGHEST: tl.constexpr = tl.constexpr(2147483647)
# Votes a program counts for, and those whose shares a warp can hold, which needs no barrier to compare them.
MINE = 16
VOTES_PER_WARP = 256


@triton.jit(
    do_not_specialize=["capacity", "max_ngram", "blocks", "k"],
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
    k,
    BLOCKS: tl.constexpr,
    KEPT: tl.constexpr,
    NODES: tl.constexpr,
    PDL: tl.constexpr,
):
    """draft[i] = text[p + 1 + i mod (length − p)] of the first place p.

    Inputs as `_matches_kernel` leaves them; room int64 [S]; draft int64 [S, k], of which drafted int64 [S] are real.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    order = tl.arange(0, KEPT)
    offs = tl.arange(0, NODES)
    wait_for_producers(PDL)
    length = tl.load(length_ptr + pid_s).to(tl.int32)
    most = tl.maximum(tl.minimum(tl.load(room_ptr + pid_s), k), 0).to(tl.int32)
    place, _, found = ranked(counts_ptr, longer_ptr, places_ptr, order, pid_s, max_ngram, blocks, BLOCKS, KEPT)
    drafted = tl.where(found > 0, most, 0)
    first = tl.sum(tl.where(order == 0, place, 0), axis=0) + 1
    at = first + offs % tl.maximum(length + 1 - first, 1)
    token = tl.load(text_ptr + pid_s * capacity + at, mask=offs < drafted, other=0)
    tl.store(draft_ptr + pid_s * k + offs, token, mask=offs < k)
    tl.store(drafted_ptr + pid_s, drafted)


@triton.jit
def _worth(matched, order, votes):
    """4 to the number of tokens that match, less one; 0 for none and past the first `votes` of an order."""
    one = tl.full(matched.shape, 1, tl.int64)
    return tl.where((order < votes) & (matched > 0), one << (2 * tl.maximum(matched - 1, 0)), 0)


@triton.jit
def _clear(row_ptr, first, k, NODES: tl.constexpr):
    """Zeros from the entry `first` to the end of a row [k]."""
    offs = tl.arange(0, NODES)
    tl.store(row_ptr + offs, 0, mask=(offs >= first) & (offs < k))


@triton.jit
def _following(text_ptr, memory_ptr, place, own, going, length, size):
    """What stands after each place, GAP past the end of memory; and where something does: nothing past a text's end."""
    there = going & ((own == 0) | (place < length))
    token = tl.load(text_ptr + place + 1, mask=there & own, other=GAP)
    if memory_ptr is not None:
        beyond = tl.load(memory_ptr + place + 1, mask=there & (own == 0) & (place + 1 < size), other=GAP)
        token = tl.where(own, token, beyond)
    return token, there


@triton.jit
def _likeliest(left, share, row, token):
    """Those of what is left with the highest share and lowest row; that share and row, and their lowest token."""
    best = tl.max(tl.where(left, share, -1.0), axis=0)
    chosen = left & (share == best)
    lowest = tl.min(tl.where(chosen, row, HIGHEST), axis=0)
    chosen = chosen & (row == lowest)
    return chosen, best, lowest, tl.min(tl.where(chosen, token, HIGHEST), axis=0)


@triton.jit(
    do_not_specialize=["capacity", "size", "max_ngram", "blocks", "memory_blocks", "votes", "k"],
    do_not_specialize_on_alignment=["length_ptr", "room_ptr"],
)
def _shares_kernel(
    text_ptr,
    length_ptr,
    room_ptr,
    counts_ptr,
    longer_ptr,
    places_ptr,
    memory_ptr,
    memory_counts_ptr,
    memory_longer_ptr,
    memory_places_ptr,
    shares_ptr,
    tokens_ptr,
    capacity,
    size,
    max_ngram,
    blocks,
    memory_blocks,
    votes,
    k,
    BLOCKS: tl.constexpr,
    KEPT: tl.constexpr,
    MINE: tl.constexpr,
    PDL: tl.constexpr,
):
    """shares[d] = shares[d − 1] · (those whose d + 1 next tokens are a vote's ÷ those with its d, + OWN), by weight.

    Inputs as `_matches_kernel` leaves them for the text and for memory, if there is one, of which the first `votes`
    vote; one whose text has ended counts no longer. MINE votes a program: shares float64 [S, k, votes], -1 where a
    vote's text has ended, and the tokens int32 beside them, up to room int64 [S] or to where all of a program's have.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * MINE + tl.arange(0, MINE)
    stride = tl.num_programs(1) * MINE
    order = tl.arange(0, KEPT)
    wait_for_producers(PDL)
    length = tl.load(length_ptr + pid_s).to(tl.int32)
    most = tl.maximum(tl.minimum(tl.load(room_ptr + pid_s), k), 0).to(tl.int32)
    text_ptr += pid_s * capacity
    place, matched, _ = ranked(counts_ptr, longer_ptr, places_ptr, order, pid_s, max_ngram, blocks, BLOCKS, KEPT)
    weight = OWN * _worth(matched, order, votes)
    own = tl.full((KEPT,), True, tl.int1)
    vote = order
    if memory_ptr is not None:
        far, matched, _ = ranked(
            memory_counts_ptr,
            memory_longer_ptr,
            memory_places_ptr,
            order,
            pid_s,
            max_ngram,
            memory_blocks,
            BLOCKS,
            KEPT,
        )
        place = tl.reshape(tl.join(place, far), (2 * KEPT,))
        weight = tl.reshape(tl.join(weight, _worth(matched, order, votes)), (2 * KEPT,))
        own = tl.reshape(tl.join(own, tl.full((KEPT,), False, tl.int1)), (2 * KEPT,))
        vote = tl.arange(0, 2 * KEPT)

    # Votes lie along the first axis: their sums are a thread's own but for the last few.
    itself = vote[:, None] == mine[None, :]
    my_place = tl.sum(tl.where(itself, place[:, None], 0), axis=0)
    my_own = tl.sum((itself & own[:, None]).to(tl.int32), axis=0) > 0
    my_going = tl.sum(tl.where(itself, weight[:, None], 0), axis=0) > 0
    going = tl.full(itself.shape, True, tl.int1)
    share = tl.full((MINE,), 1.0, tl.float64)
    shares_ptr += pid_s * k * stride + mine
    tokens_ptr += pid_s * k * stride + mine
    depth = 0
    while depth < most:
        token, there = _following(text_ptr, memory_ptr, place, own, weight > 0, length, size)
        my_token, my_going = _following(text_ptr, memory_ptr, my_place, my_own, my_going, length, size)
        # Those without weight vote for nothing; the others go on together until they differ or end.
        going = going & there[:, None]
        total = tl.sum(tl.where(going, weight[:, None], 0), axis=0).to(tl.float64) + OWN
        going = going & (token[:, None] == my_token[None, :])
        share *= tl.sum(tl.where(going, weight[:, None], 0), axis=0).to(tl.float64) / total
        tl.store(shares_ptr + depth * stride, tl.where(my_going, share, -1.0))
        tl.store(tokens_ptr + depth * stride, my_token)
        place += 1
        my_place += 1
        depth += 1
        my_going = my_going & (my_token != GAP)
        most = tl.where(tl.max(my_going.to(tl.int32), axis=0) > 0, most, 0)


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=["room_ptr"])
def _vote_kernel(
    room_ptr,
    shares_ptr,
    tokens_ptr,
    draft_ptr,
    drafted_ptr,
    parent_ptr,
    k,
    VOTES: tl.constexpr,
    NODES: tl.constexpr,
    PDL: tl.constexpr,
):
    """draft[i] is the token of the highest share that is left: of those that go on with the draft, or of a whole tree.

    Inputs as `_shares_kernel` leaves them, of VOTES votes; room int64 [S]; draft int64 [S, k], of which drafted int64
    [S] are real; parent int64 [S, k] of a tree.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    vote = tl.arange(0, VOTES)
    wait_for_producers(PDL)
    until = tl.maximum(tl.minimum(tl.load(room_ptr + pid_s), k), 0).to(tl.int32)
    shares_ptr += pid_s * k * VOTES
    tokens_ptr += pid_s * k * VOTES
    going = tl.full((VOTES,), True, tl.int1)
    left = tl.full((VOTES,), False, tl.int1)
    share = tl.full((VOTES,), -1.0, tl.float64)
    depth, row, token = tl.zeros_like(vote), tl.zeros_like(vote), tl.zeros_like(vote)
    node, drafted = 0, 0
    while node < until:
        # Those that voted for the newest node vote on its children.
        at = depth * VOTES + vote
        share = tl.where(going, tl.load(shares_ptr + at, mask=going, other=-1.0), share)
        token = tl.where(going, tl.load(tokens_ptr + at, mask=going, other=GAP), token)
        row = tl.where(going, node, row)
        left = going & (share >= 0) if parent_ptr is None else (left | going) & (share >= 0) & (token != GAP)
        chosen, best, lowest, newest = _likeliest(left, share, row, token)
        more = (best >= 0.0) & (newest != GAP)
        tl.store(draft_ptr + pid_s * k + node, newest, mask=more)
        if parent_ptr is not None:
            tl.store(parent_ptr + pid_s * k + node, lowest, mask=more)
        # None where the draft ends: no token is that high.
        going = chosen & (token == tl.where(more, newest, HIGHEST))
        left = left & (going == 0)
        depth += going.to(tl.int32)
        drafted += more.to(tl.int32)
        until = tl.where(more, until, 0)
        node += 1
    _clear(draft_ptr + pid_s * k, drafted, k, NODES)
    if parent_ptr is not None:
        _clear(parent_ptr + pid_s * k, drafted, k, NODES)
    tl.store(drafted_ptr + pid_s, drafted)


@triton.jit(do_not_specialize=["k"])
def _lineage_kernel(parent_ptr, depth_ptr, path_ptr, k, NODES: tl.constexpr, PDL: tl.constexpr):
    """depth [k + 1] and path [k + 1, k + 1] of the rows of one tree by its parents [k]; all int64."""
    pid_s = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, NODES).to(tl.int64)
    mask = offs <= k
    wait_for_producers(PDL)
    parent_ptr += pid_s * k
    path_ptr += pid_s * (k + 1) * (k + 1)
    depth = tl.zeros_like(offs)
    above = offs
    for _ in range(0, k):
        depth += (above > 0).to(tl.int64)
        above = tl.load(parent_ptr + above - 1, mask=mask & (above > 0), other=0)
    tl.store(depth_ptr + pid_s * (k + 1) + offs, depth, mask=mask)
    above = offs
    for i in range(0, k + 1):
        inside = i <= depth
        tl.store(path_ptr + offs * (k + 1) + tl.where(inside, depth - i, i), tl.where(inside, above, offs), mask=mask)
        above = tl.load(parent_ptr + above - 1, mask=mask & (above > 0), other=0)


def lookup(
    text: Tensor,
    length: Tensor,
    room: Tensor,
    *,
    max_ngram: int,
    num_draft_tokens: int,
    votes: int | None,
    memory: Tensor | None = None,
    tree: bool = False,
) -> Found:
    """A draft for every sequence from what followed its last tokens where they stood before (prompt lookup decoding).

    text int32 [S, capacity], of which the last token is at `length` int64 [S]; at most `room` int64 [S] and
    k = `num_draft_tokens` tokens are drafted. Places where the last token stands before are ranked by the number of
    tokens up to there that match, at most `max_ngram`, then the newest first. Without `votes` the draft is what
    followed the first of them; where the text runs out it is taken to repeat from the match on. Otherwise the first
    `votes` places vote on every token, one of n tokens with weight 10·4ⁿ⁻¹, and as many in `memory` int32 [M] with
    4ⁿ⁻¹: other texts, the newest last, with -1 between them; its end counts as -1. Those that voted for the draft so
    far choose its next token; ties go to the lowest id, and where -1 is chosen the draft ends. In a `tree` a child has
    its parent's chance times its share of the weight of those, to which 10 is added for what was never seen, and the
    likeliest node that is left comes next, of equally likely ones that of the lowest parent. Entries past a draft are
    0.
    """
    sequences, device = text.shape[0], text.device
    found = Found(
        torch.empty((sequences, num_draft_tokens), dtype=torch.int64, device=device),
        torch.empty((sequences,), dtype=torch.int64, device=device),
    )
    own = matches(text, length, None, max_ngram, votes)
    rule = lookup_rule(text.shape[1], votes)
    sizes = {"BLOCKS": rule.blocks, "KEPT": rule.kept}
    nodes = max(16, 1 << num_draft_tokens.bit_length())
    if votes is None:
        _continuation_kernel[(sequences,)](
            text,
            length,
            room,
            *own[:3],
            *found[:2],
            text.shape[1],
            max_ngram,
            own.blocks,
            num_draft_tokens,
            NODES=nodes,
            **sizes,
            **launch.options(rule.warps, 1),
        )
        return found
    others = None if memory is None else matches(text, length, memory, max_ngram, votes)
    if tree:
        rows = num_draft_tokens + 1
        found = found._replace(
            parent=torch.empty_like(found.tokens),
            depth=torch.empty((sequences, rows), dtype=torch.int64, device=device),
            path=torch.empty((sequences, rows, rows), dtype=torch.int64, device=device),
        )
    voters = rule.kept if memory is None else 2 * rule.kept
    shares = torch.empty((sequences, num_draft_tokens, voters), dtype=torch.float64, device=device)
    following = torch.empty(shares.shape, dtype=torch.int32, device=device)
    _shares_kernel[(sequences, voters // MINE)](
        text,
        length,
        room,
        *own[:3],
        memory,
        *(others[:3] if others else (None, None, None)),
        shares,
        following,
        text.shape[1],
        0 if memory is None else len(memory),
        max_ngram,
        own.blocks,
        others.blocks if others else 0,
        votes,
        num_draft_tokens,
        MINE=MINE,
        **sizes,
        **launch.options(rule.warps, 1, registers=launch.PRODUCT_REGISTERS),
    )
    _vote_kernel[(sequences,)](
        room,
        shares,
        following,
        *found[:3],
        num_draft_tokens,
        VOTES=voters,
        NODES=nodes,
        **launch.options(max(1, voters // VOTES_PER_WARP), 1, registers=launch.PRODUCT_REGISTERS),
    )
    if tree:
        _lineage_kernel[(sequences,)](*found[2:], num_draft_tokens, NODES=nodes, **launch.options(1, 1))
    return found
