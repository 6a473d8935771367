"""Triton functions that draw tokens: uniform noise, an accurate logarithm, and the warping of a row of scores.

A row is walked in blocks of BLOCK ids in order from id 0, so that its sums do not depend on other rows.
"""

import triton
import triton.language as tl


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
def peak(
    row_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest score of a row [V] and its id, the lowest on ties."""
    offs = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = offs
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
        ids = tl.where(x > best, start + offs, ids)
        best = tl.maximum(best, x)
    return tl.max(best, axis=0), lowest_of_best(best, ids)


@triton.jit
def mass(
    row_ptr,
    highest,
    temperature,
    threshold,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ exp((x − highest)/temperature) over the scores x ≥ threshold of a row [V]."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
        acc += tl.where(x >= threshold, tl.exp((x - highest) / temperature), 0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def threshold_of(
    row_ptr,
    highest,
    temperature,
    top_k,
    top_p,
    min_p,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest score of a row [V] that min-p, then top-k, then top-p leave; −∞ where all three are off.

    min-p: highest + temperature·ln(min_p); top-k: the k-th highest score; top-p: the lowest score of the smallest set
    of most likely ids, among those left, whose probability reaches top_p.
    """
    threshold = tl.full((), float("-inf"), tl.float32)
    if min_p > 0.0:
        threshold = highest + temperature * log(min_p)
    if (top_k > 0) & (top_k < V):
        score = _highest_reaching(row_ptr, highest, temperature, threshold, top_k.to(tl.float32), True, V, BLOCK)
        threshold = tl.maximum(threshold, score)
    if top_p < 1.0:
        goal = top_p * mass(row_ptr, highest, temperature, threshold, V, BLOCK)
        score = _highest_reaching(row_ptr, highest, temperature, threshold, goal, False, V, BLOCK)
        threshold = tl.maximum(threshold, score)
    return threshold


@triton.jit
def _highest_reaching(
    row_ptr,
    highest,
    temperature,
    threshold,
    goal,
    COUNT: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest score t, at most `highest`, for which Σ w(x) over x ≥ t of a row [V] reaches goal.

    COUNT: w = 1; else w = exp((x − highest)/temperature) where x ≥ threshold, 0 elsewhere. Found two bits at a time in
    the order-preserving integers of float32; those of float16 and bfloat16 do not use all of them.
    """
    LOWEST: tl.constexpr = (
        16 if row_ptr.dtype.element_ty == tl.bfloat16 else 12 if row_ptr.dtype.element_ty == tl.float16 else 0
    )
    offs = tl.arange(0, BLOCK)
    key = tl.full((), -2147483648, tl.int32)
    for shift in range(30, LOWEST - 1, -2):
        unit = tl.full((), 1, tl.int32) << shift
        first = key + unit
        second = first + unit
        third = second + unit
        acc_1 = tl.zeros((BLOCK,), tl.float32)
        acc_2 = tl.zeros((BLOCK,), tl.float32)
        acc_3 = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            mask = start + offs < V
            x = tl.load(row_ptr + start + offs, mask=mask, other=float("-inf")).to(tl.float32)
            if COUNT:
                weight = tl.where(mask, 1.0, 0.0)
            else:
                weight = tl.where(x >= threshold, tl.exp((x - highest) / temperature), 0.0)
            x_key = _key(x)
            acc_1 += tl.where(x_key >= first, weight, 0.0)
            acc_2 += tl.where(x_key >= second, weight, 0.0)
            acc_3 += tl.where(x_key >= third, weight, 0.0)
        digit = (tl.sum(acc_1, axis=0) >= goal).to(tl.int32)
        digit += (tl.sum(acc_2, axis=0) >= goal).to(tl.int32)
        digit += (tl.sum(acc_3, axis=0) >= goal).to(tl.int32)
        key += digit << shift
    if LOWEST > 0:
        key = tl.where(key < 0, key | ((1 << LOWEST) - 1), key)
    key = tl.minimum(key, _key(highest))
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(x):
    """int32 in the order of float32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
