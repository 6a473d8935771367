"""Triton functions that find the nucleus of a row of scores: the smallest set of most likely ids that reaches top-p.

Every block of a row tells its mass above edges whole temperatures apart, the same ones for all blocks. Their sums say
between which two of them the nucleus ends; only the scores there are looked at again, and they are few.
"""

import triton
import triton.language as tl

from .ranking import ordered
from .warping import (
    PIVOTS,
    highest_reaching,
    listed,
    mass_of,
    score_of,
    scores_of,
    segment_peaks,
    unused_bits,
    weight_of,
)

EDGES: tl.constexpr = tl.constexpr(16)
# Multiples of the temperature up to here are told apart.
FAR: tl.constexpr = tl.constexpr(4194304.0)


@triton.jit
def limited_by_nucleus(top_k, top_p, min_p, V: tl.constexpr):
    """Whether top-p alone limits what a row can give."""
    return (top_p < 1.0) & (min_p <= 0.0) & ((top_k <= 0) | (top_k >= V))


@triton.jit
def first_edge(highest, temperature):
    """The lowest multiple of the temperature above the highest score of a block or row, in temperatures."""
    return tl.floor(tl.div_rn(highest, temperature)) + 1.0


@triton.jit
def mass_above_edges(x, weight, peak, temperature):
    """Σ weight over the scores x [BLOCK] of a block at or above each of EDGES edges, from its first one down."""
    edges = (first_edge(peak, temperature) - tl.arange(0, EDGES).to(tl.float32)) * temperature
    return tl.sum(tl.where(x[None, :] >= edges[:, None], weight[None, :], 0.0), axis=1)


@triton.jit
def bracket_of(edge_ptr, peaks, highest, temperature, goal):
    """Scores low < high between which Σ w over all x ≥ t reaches goal, and Σ w over x ≥ high; low −∞ if not known.

    w = exp((x − highest)/temperature); edge float32 [blocks, EDGES]: `mass_above_edges` of a row's blocks; peaks: their
    highest scores, −∞ up to a power of two.
    """
    offs_b = tl.arange(0, peaks.shape[0])
    offs_e = tl.arange(0, EDGES)
    top = first_edge(highest, temperature)
    behind = tl.where(peaks > float("-inf"), top - first_edge(peaks, temperature), FAR)
    place = offs_e[None, :].to(tl.float32) - behind[:, None]
    # Above its own first edge a block has nothing.
    mask = place >= 0.0
    ptrs = edge_ptr + offs_b[:, None] * EDGES + tl.where(mask, place, 0.0).to(tl.int32)
    scale = tl.where(peaks > float("-inf"), tl.exp((peaks - highest) / temperature), 0.0)
    sums = tl.sum(tl.load(ptrs, mask=mask, other=0.0) * scale[:, None], axis=0)
    found = tl.min(tl.where((sums >= goal) & (sums > 0.0), offs_e, EDGES), axis=0)
    known = (found < EDGES) & (tl.abs(top) < FAR)
    low = tl.where(known, (top - found.to(tl.float32)) * temperature, float("-inf"))
    inner = known & (found > 0)
    high = tl.where(inner, (top - (found - 1).to(tl.float32)) * temperature, float("inf"))
    above = tl.where(inner, tl.sum(tl.where(offs_e == found - 1, sums, 0.0), axis=0), 0.0)
    return low, high, above


@triton.jit
def gathered(
    row_ptr,
    list_ptr,
    count,
    low,
    high,
    kept_ptr,
    ROOM: tl.constexpr,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many scores of the listed segments are in [low, high); the first ROOM of them are written to kept, in order.

    Every thread may read them after it.
    """
    STEP: tl.constexpr = TILE // SEGMENT
    number = tl.zeros((), tl.int32)
    x = scores_of(row_ptr, list_ptr, 0, count, V, SEGMENT, TILE)
    for start in range(0, count, STEP):
        following = scores_of(row_ptr, list_ptr, start + STEP, count, V, SEGMENT, TILE)
        flat = tl.reshape(x, (TILE,))
        inside = (flat >= low) & (flat < high)
        one = inside.to(tl.int32)
        place = number + tl.cumsum(one, axis=0) - one
        tl.store(kept_ptr + place, flat.to(kept_ptr.dtype.element_ty), mask=inside & (place < ROOM))
        number += tl.sum(one, axis=0)
        x = following
    tl.debug_barrier()
    return number


@triton.jit
def nucleus_of_kept(
    kept_ptr,
    counts,
    low,
    high,
    above,
    goal,
    highest,
    temperature,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """The lowest score of the nucleus, and its mass, from the scores in [low, high) that `gathered` has kept.

    kept [parts, ROOM], of which the first counts [parts] of each are written; `above`: the mass of scores ≥ high.
    """
    UNUSED: tl.constexpr = unused_bits(kept_ptr.dtype.element_ty)
    PARTS: tl.constexpr = counts.shape[0]
    SHARE: tl.constexpr = TILE // PARTS
    most = tl.max(counts, axis=0)
    end = (ordered(tl.minimum(highest, high)) >> UNUSED).to(tl.int64) + 1
    begin = tl.minimum((ordered(low) >> UNUSED).to(tl.int64), end - 1)
    while end - begin > 1:
        step = (end - begin + PIVOTS - 1) // PIVOTS
        pivots = (begin + tl.arange(0, PIVOTS) * step).to(tl.int32)
        acc = tl.zeros((PIVOTS, TILE), tl.float32)
        for start in range(0, most, SHARE):
            x = _kept(kept_ptr, counts, start, ROOM, TILE)
            weight = weight_of(x, highest, temperature, low, False)
            acc += tl.where((ordered(x) >> UNUSED)[None, :] >= pivots[:, None], weight[None, :], 0.0)
        reached = (above + tl.sum(acc, axis=1) >= goal) & (tl.arange(0, PIVOTS) > 0)
        begin = tl.minimum(begin + step * tl.sum(reached.to(tl.int32), axis=0), end - 1)
        end = tl.minimum(end, begin + step)
    threshold = tl.maximum(score_of(begin.to(tl.int32), UNUSED), low)
    acc = tl.zeros((TILE,), tl.float32)
    for start in range(0, most, SHARE):
        x = _kept(kept_ptr, counts, start, ROOM, TILE)
        acc += weight_of(x, highest, temperature, threshold, False)
    return threshold, above + tl.sum(acc, axis=0)


@triton.jit
def _kept(kept_ptr, counts, start, ROOM: tl.constexpr, TILE: tl.constexpr):
    """The kept scores of every part from number `start`, −∞ past its last: float32 [TILE]."""
    PARTS: tl.constexpr = counts.shape[0]
    offs = start + tl.arange(0, TILE // PARTS)
    ptrs = kept_ptr + tl.arange(0, PARTS)[:, None] * ROOM + offs[None, :]
    # Other programs may have written them.
    x = tl.load(ptrs, mask=offs[None, :] < counts[:, None], other=float("-inf"), cache_modifier=".cg")
    return tl.reshape(x.to(tl.float32), (TILE,))


@triton.jit
def nucleus_of_segments(
    row_ptr,
    list_ptr,
    peaks,
    low,
    goal,
    highest,
    temperature,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same from all segments with scores of `low` and above, whose highest scores are peaks [segments]."""
    count = listed(peaks >= low, list_ptr, 0)
    none = tl.full((), float("-inf"), tl.float32)
    threshold = highest_reaching(
        row_ptr, list_ptr, count, highest, temperature, none, low, goal, False, V, SEGMENT, TILE
    )
    threshold = tl.maximum(threshold, low)
    return threshold, mass_of(row_ptr, list_ptr, count, highest, temperature, threshold, V, SEGMENT, TILE)


@triton.jit
def nucleus_of(
    row_ptr,
    segment_ptr,
    edge_ptr,
    list_ptr,
    kept_ptr,
    block_peaks,
    total,
    highest,
    temperature,
    top_p,
    ROOM: tl.constexpr,
    V: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The lowest score of a row's nucleus, found by one program; kept: room for ROOM scores."""
    goal = top_p * total
    peaks = segment_peaks(segment_ptr, SEGMENTS)
    low, high, above = bracket_of(edge_ptr, block_peaks, highest, temperature, goal)
    count = tl.zeros((), tl.int32) + ROOM + 1
    if low > float("-inf"):
        among = listed(peaks >= low, list_ptr, 0)
        count = gathered(row_ptr, list_ptr, among, low, high, kept_ptr, ROOM, V, SEGMENT, TILE)
    if count <= ROOM:
        counts = tl.zeros((1,), tl.int32) + count
        threshold, _ = nucleus_of_kept(kept_ptr, counts, low, high, above, goal, highest, temperature, ROOM, TILE)
    else:
        threshold, _ = nucleus_of_segments(row_ptr, list_ptr, peaks, low, goal, highest, temperature, V, SEGMENT, TILE)
    return threshold
