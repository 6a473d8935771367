"""Triton functions that draw tokens: uniform noise, an accurate logarithm, and the warping of a row of scores.

The highest score of every segment of a row says which segments hold what is looked for: of 64 ids each they are few
where few ids are likely, and all of them where they must be. What a row adds up follows from the row alone.
"""

import triton
import triton.language as tl

from .ranking import ordered, value_of_key

PIVOTS: tl.constexpr = tl.constexpr(8)
COARSE: tl.constexpr = tl.constexpr(16)


@triton.jit
def log(x):
    """ln x of normal positive float32 within 1 ulp, near 1 too, where the GPU's own has an absolute error of 2⁻²²."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    square = f * f
    return (f + (p * f * square - e * 2.12194440e-4 - 0.5 * square)) + e * 0.693359375


@triton.jit
def uniform(
    seed,
    position,
    start,
    BLOCK: tl.constexpr,
    stream,
):
    """`noise.uniform` of ids start to start + BLOCK, start a multiple of four: float32 [BLOCK]."""
    block = start // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros((BLOCK // 4,), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, block, zero + position.to(tl.int32), zero, zero + stream)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def lowest_of_best(best, ids):
    """The lowest of the ids [BLOCK] whose value in best [BLOCK] is the highest."""
    return tl.min(tl.where(best == tl.max(best, axis=0), ids, 2147483647), axis=0)


@triton.jit
def known(x):
    """Scores as float32, NaN as −∞."""
    x = x.to(tl.float32)
    return tl.where(x > float("-inf"), x, float("-inf"))


@triton.jit
def threshold_of(
    row_ptr,
    segment_ptr,
    list_ptr,
    highest,
    temperature,
    top_k,
    top_p,
    min_p,
    V: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The lowest score of a row [V] that min-p, then top-k, then top-p leave; −∞ where the first two are off.

    min-p: highest + temperature·ln(min_p); top-k: the k-th highest score; top-p: the lowest score of the smallest set
    of most likely ids, among those left, whose probability reaches top_p (alone: `nucleus_of`). segment float32
    [SEGMENTS]: the highest scores of SEGMENT ids each; list int32: room for the number of every segment, and those up
    to a power of two.
    """
    threshold = tl.full((), float("-inf"), tl.float32)
    if limits(top_k, top_p, min_p, V):
        peaks = segment_peaks(segment_ptr, SEGMENTS)
        if min_p > 0.0:
            threshold = highest + temperature * log(min_p)
        if (top_k > 0) & (top_k < V):
            goal = top_k.to(tl.float32)
            bottom = _highest_peak_reaching(peaks, highest, threshold, goal)
            count = listed(peaks >= bottom, list_ptr, 0)
            score = highest_reaching(
                row_ptr, list_ptr, count, highest, temperature, threshold, bottom, goal, True, V, SEGMENT, TILE
            )
            threshold = tl.maximum(threshold, score)
        if (top_p < 1.0) & (threshold > float("-inf")):
            count = listed(peaks >= threshold, list_ptr, 0)
            goal = top_p * mass_of(row_ptr, list_ptr, count, highest, temperature, threshold, V, SEGMENT, TILE)
            score = highest_reaching(
                row_ptr, list_ptr, count, highest, temperature, threshold, threshold, goal, False, V, SEGMENT, TILE
            )
            threshold = tl.maximum(threshold, score)
    return threshold


@triton.jit
def limits(top_k, top_p, min_p, V: tl.constexpr):
    """Whether any of the three limits what a row can give."""
    return (min_p > 0.0) | ((top_k > 0) & (top_k < V)) | (top_p < 1.0)


@triton.jit
def surely_left(
    row_ptr,
    segment_ptr,
    list_ptr,
    total,
    highest,
    temperature,
    top_k,
    top_p,
    min_p,
    score,
    V: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Whether one look at the scores above it shows that `score` is not below what `threshold_of` would find.

    Where top-p comes after another limit, the mass of what that leaves is at least that of `score` and those above it.
    """
    left = (min_p <= 0.0) | (score >= highest + temperature * log(min_p))
    count = listed(segment_peaks(segment_ptr, SEGMENTS) > score, list_ptr, 0)
    few = (top_k > 0) & (top_k < V)
    # Every segment listed has a higher score.
    left = left & ((count < top_k) | (few == 0))
    count = tl.where(left, count, 0)
    higher = tl.zeros((TILE // SEGMENT, SEGMENT), tl.int32)
    acc = tl.zeros((TILE // SEGMENT, SEGMENT), tl.float32)
    x = scores_of(row_ptr, list_ptr, 0, count, V, SEGMENT, TILE)
    for start in range(0, count, TILE // SEGMENT):
        following = scores_of(row_ptr, list_ptr, start + TILE // SEGMENT, count, V, SEGMENT, TILE)
        higher += (x > score).to(tl.int32)
        acc += tl.where(x > score, tl.exp((x - highest) / temperature), 0.0)
        x = following
    if few:
        left = left & (tl.sum(tl.sum(higher, axis=1), axis=0) < top_k)
    if top_p < 1.0:
        above = tl.sum(tl.sum(acc, axis=1), axis=0)
        if few | (min_p > 0.0):
            total = above + tl.exp((score - highest) / temperature)
        left = left & (above < top_p * total)
    return left


@triton.jit
def segment_peaks(segment_ptr, SEGMENTS: tl.constexpr):
    """The highest scores of a row's segments, −∞ up to a power of two."""
    PADDED: tl.constexpr = triton.next_power_of_2(SEGMENTS)
    offs = tl.arange(0, PADDED)
    return tl.load(segment_ptr + offs, mask=offs < SEGMENTS, other=float("-inf"))


@triton.jit
def mass(
    row_ptr,
    segment_ptr,
    list_ptr,
    highest,
    temperature,
    threshold,
    V: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σ exp((x − highest)/temperature) over the scores x ≥ threshold of a row [V]; the rest as in `threshold_of`."""
    count = listed(segment_peaks(segment_ptr, SEGMENTS) >= threshold, list_ptr, 0)
    return mass_of(row_ptr, list_ptr, count, highest, temperature, threshold, V, SEGMENT, TILE)


@triton.jit
def mass_of(
    row_ptr,
    list_ptr,
    count,
    highest,
    temperature,
    threshold,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """`mass` of the `count` segments of the list."""
    acc = tl.zeros((TILE // SEGMENT, SEGMENT), tl.float32)
    x = scores_of(row_ptr, list_ptr, 0, count, V, SEGMENT, TILE)
    for start in range(0, count, TILE // SEGMENT):
        following = scores_of(row_ptr, list_ptr, start + TILE // SEGMENT, count, V, SEGMENT, TILE)
        acc += weight_of(x, highest, temperature, threshold, False)
        x = following
    return tl.sum(tl.sum(acc, axis=1), axis=0)


@triton.jit
def _highest_peak_reaching(peaks, highest, threshold, goal):
    """A score from `threshold` to `highest` from which on there are `goal` peaks; threshold if none is found.

    What the peaks reach, the row reaches: what is looked for is not below, and a segment with a lower peak holds
    nothing that is above. Only the highest 16 bits are looked at.
    """
    key = ordered(peaks) >> COARSE
    bottom = ordered(threshold)
    first = ordered(tl.min(tl.where(peaks > float("-inf"), peaks, float("inf")), axis=0))
    first = tl.maximum(bottom, first) >> COARSE
    low = tl.minimum(first, ordered(highest) >> COARSE)
    high = (ordered(highest) >> COARSE) + 1
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = low + tl.arange(0, PIVOTS) * step
        sums = tl.sum(tl.where(key[None, :] >= pivots[:, None], 1.0, 0.0), axis=1)
        low = tl.minimum(low + step * _reached(sums, goal), high - 1)
        high = tl.minimum(high, low + step)
    return value_of_key(tl.where(low > first, tl.maximum(bottom, low << COARSE), bottom))


@triton.jit
def highest_reaching(
    row_ptr,
    list_ptr,
    count,
    highest,
    temperature,
    threshold,
    bottom,
    goal,
    COUNT: tl.constexpr,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The highest score t, from `bottom` to `highest`, for which Σ w(x) over x ≥ t of a row [V] reaches goal.

    COUNT: w = 1; else w = exp((x − highest)/temperature) where x ≥ threshold, 0 elsewhere. The list holds the segments
    whose peaks are at least `bottom`. Found by eight pivots at a time among the order-preserving integers of float32,
    of which float16 and bfloat16 do not use the lowest bits.
    """
    UNUSED: tl.constexpr = unused_bits(row_ptr.dtype.element_ty)
    high = (ordered(highest) >> UNUSED).to(tl.int64) + 1
    low = tl.minimum((ordered(bottom) >> UNUSED).to(tl.int64), high - 1)
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = (low + tl.arange(0, PIVOTS) * step).to(tl.int32)
        acc = tl.zeros((PIVOTS, TILE), tl.float32)
        x = scores_of(row_ptr, list_ptr, 0, count, V, SEGMENT, TILE)
        for start in range(0, count, TILE // SEGMENT):
            following = scores_of(row_ptr, list_ptr, start + TILE // SEGMENT, count, V, SEGMENT, TILE)
            flat = tl.reshape(x, (TILE,))
            weight = weight_of(flat, highest, temperature, threshold, COUNT)
            acc += tl.where((ordered(flat) >> UNUSED)[None, :] >= pivots[:, None], weight[None, :], 0.0)
            x = following
        low = tl.minimum(low + step * _reached(tl.sum(acc, axis=1), goal), high - 1)
        high = tl.minimum(high, low + step)
    return score_of(low.to(tl.int32), UNUSED)


@triton.constexpr_function
def unused_bits(dtype):
    """How many of the lowest bits of float32 scores of that type do not use."""
    return {tl.bfloat16: 16, tl.float16: 13}.get(dtype, 0)


@triton.jit
def score_of(key, UNUSED: tl.constexpr):
    """The score whose `ordered` begins with the bits of key, without UNUSED ones."""
    key = key << UNUSED
    if UNUSED > 0:
        key = tl.where(key < 0, key | ((1 << UNUSED) - 1), key)
    return value_of_key(key)


@triton.jit
def weight_of(x, highest, temperature, threshold, COUNT: tl.constexpr):
    if COUNT:
        weight = tl.full(x.shape, 1.0, tl.float32)
    else:
        weight = tl.where(x >= threshold, tl.exp((x - highest) / temperature), 0.0)
    return weight


@triton.jit
def _reached(sums, goal):
    """How many of the pivots after the first, which is known to, reach goal."""
    return tl.sum(((sums >= goal) & (tl.arange(0, PIVOTS) > 0)).to(tl.int32), axis=0)


@triton.jit
def listed(active, list_ptr, first):
    """Write first + i to list, in order, where active [i] holds; returns how often. Every thread may read it then."""
    one = active.to(tl.int32)
    place = tl.cumsum(one, axis=0) - one
    tl.debug_barrier()
    tl.store(list_ptr + place, first + tl.arange(0, active.shape[0]), mask=active)
    tl.debug_barrier()
    return tl.sum(one, axis=0)


@triton.jit
def scores_of(
    row_ptr,
    list_ptr,
    start,
    count,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The scores of the listed segments from number `start`, −∞ past the last: float32 [TILE / SEGMENT, SEGMENT]."""
    offs_s = start + tl.arange(0, TILE // SEGMENT)
    segment = tl.load(list_ptr + offs_s, mask=offs_s < count, other=0)
    ids = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    return known(tl.load(row_ptr + ids, mask=(offs_s < count)[:, None] & (ids < V), other=float("-inf")))
