"""Triton functions that draw tokens: uniform noise, an accurate logarithm, and the warping of a row of scores.

The highest score of every segment of a row says which segments hold what is looked for: of 64 ids each they are few
where few ids are likely, and all of them where they must be. What a row adds up follows from the row alone.
"""

import triton
import triton.language as tl

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
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def threshold_of(
    row_ptr,
    segment_ptr,
    list_ptr,
    total,
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
    """The lowest score of a row [V] that min-p, then top-k, then top-p leave, −∞ where all three are off; their mass.

    min-p: highest + temperature·ln(min_p); top-k: the k-th highest score; top-p: the lowest score of the smallest set
    of most likely ids, among those left, whose probability reaches top_p. mass: Σ exp((x − highest)/temperature), of
    the whole row `total`, told where top-p needs it and by `mass` for the threshold itself. segment float32 [SEGMENTS]:
    the highest scores of SEGMENT ids each; list int32: room for one number a segment, padded to a power of two.
    """
    threshold = tl.full((), float("-inf"), tl.float32)
    if (min_p > 0.0) | ((top_k > 0) & (top_k < V)) | (top_p < 1.0):
        peaks = segment_peaks(segment_ptr, SEGMENTS)
        if min_p > 0.0:
            threshold = highest + temperature * log(min_p)
        if (top_k > 0) & (top_k < V):
            score = _highest_reaching(
                row_ptr, peaks, list_ptr, highest, temperature, threshold, top_k.to(tl.float32), True, V, SEGMENT, TILE
            )
            threshold = tl.maximum(threshold, score)
        if top_p < 1.0:
            if threshold > float("-inf"):
                total = mass(row_ptr, peaks, list_ptr, highest, temperature, threshold, V, SEGMENT, TILE)
            score = _highest_reaching(
                row_ptr, peaks, list_ptr, highest, temperature, threshold, top_p * total, False, V, SEGMENT, TILE
            )
            threshold = tl.maximum(threshold, score)
    return threshold


@triton.jit
def segment_peaks(segment_ptr, SEGMENTS: tl.constexpr):
    """The highest scores of a row's segments, −∞ up to a power of two."""
    PADDED: tl.constexpr = triton.next_power_of_2(SEGMENTS)
    offs = tl.arange(0, PADDED)
    return tl.load(segment_ptr + offs, mask=offs < SEGMENTS, other=float("-inf"))


@triton.jit
def mass(
    row_ptr,
    peaks,
    list_ptr,
    highest,
    temperature,
    threshold,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σ exp((x − highest)/temperature) over the scores x ≥ threshold of a row [V]."""
    count = _listed(peaks >= threshold, list_ptr)
    acc = tl.zeros((TILE // SEGMENT, SEGMENT), tl.float32)
    for start in range(0, count, TILE // SEGMENT):
        x = _scores_of(row_ptr, list_ptr, start, count, V, SEGMENT, TILE)
        acc += tl.where(x >= threshold, tl.exp((x - highest) / temperature), 0.0)
    return tl.sum(tl.sum(acc, axis=1), axis=0)


@triton.jit
def _highest_reaching(
    row_ptr,
    peaks,
    list_ptr,
    highest,
    temperature,
    threshold,
    goal,
    COUNT: tl.constexpr,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The highest score t, from `threshold` to `highest`, for which Σ w(x) over x ≥ t of a row [V] reaches goal.

    COUNT: w = 1; else w = exp((x − highest)/temperature) where x ≥ threshold, 0 elsewhere. Found by eight pivots at a
    time among the order-preserving integers of float32, of which float16 and bfloat16 do not use the lowest bits. The
    first search is one among the peaks: what they reach alone, the row reaches, so that t is not below, and segments
    with a lower peak need not be read.
    """
    UNUSED: tl.constexpr = (
        16 if row_ptr.dtype.element_ty == tl.bfloat16 else 13 if row_ptr.dtype.element_ty == tl.float16 else 0
    )
    offs_p = tl.arange(0, PIVOTS)
    top = _key(highest)
    bottom = tl.minimum(_key(threshold), top)

    near = _key(peaks) >> COARSE
    share = _weight(peaks, highest, temperature, threshold, COUNT)
    low = (bottom >> COARSE).to(tl.int64)
    high = (top >> COARSE).to(tl.int64) + 1
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = (low + offs_p * step).to(tl.int32)
        sums = tl.sum(tl.where(near[None, :] >= pivots[:, None], share[None, :], 0.0), axis=1)
        low += step * _reached(sums, goal)
        high = tl.minimum(high, low + step)
    count = _listed(near >= low.to(tl.int32), list_ptr)

    low = tl.maximum((bottom >> UNUSED).to(tl.int64), low << (COARSE - UNUSED))
    high = (top >> UNUSED).to(tl.int64) + 1
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = (low + offs_p * step).to(tl.int32)
        acc = tl.zeros((PIVOTS, TILE), tl.float32)
        for start in range(0, count, TILE // SEGMENT):
            x = tl.reshape(_scores_of(row_ptr, list_ptr, start, count, V, SEGMENT, TILE), (TILE,))
            key = _key(x) >> UNUSED
            weight = _weight(x, highest, temperature, threshold, COUNT)
            acc += tl.where(key[None, :] >= pivots[:, None], weight[None, :], 0.0)
        low += step * _reached(tl.sum(acc, axis=1), goal)
        high = tl.minimum(high, low + step)

    key = low.to(tl.int32) << UNUSED
    if UNUSED > 0:
        key = tl.where(key < 0, key | ((1 << UNUSED) - 1), key)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, highest, temperature, threshold, COUNT: tl.constexpr):
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
def _listed(active, list_ptr):
    """Write to list, in order, where active [N] holds; returns how often. Every thread may read the list after it."""
    one = active.to(tl.int32)
    place = tl.cumsum(one, axis=0) - one
    tl.debug_barrier()
    tl.store(list_ptr + place, tl.arange(0, active.shape[0]), mask=active)
    tl.debug_barrier()
    return tl.sum(one, axis=0)


@triton.jit
def _scores_of(
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


@triton.jit
def _key(x):
    """int32 in the order of float32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
