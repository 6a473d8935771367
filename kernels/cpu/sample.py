"""Sampling on a CPU: tokens for rows of scores, one row after the other, each by itself.

A draw is the highest of warped log-probability + noise. What wins among all ids wins among those that min-p, top-k and
top-p leave, if it is one of them: likely, and cheaper to see than where they end. Only if it is not is that looked for.
"""

import math

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from ..noise import MULTIPLIERS, ROUNDS, WEYL
from .instructions import FLOATS, INT, INTS, LONG, WIDTH, constant, splatted, zipped
from .lanes import (
    LANES,
    exp,
    greater,
    greatest,
    kernel,
    least,
    lesser,
    log,
    number,
    over,
    part,
    put_number,
    put_whole,
    read,
    splat,
    total,
    whole,
    write,
)
from .small_ops import NEVER, first_of
from .team import dealt, taken, worker

# Ids whose noise is made at once: a block of the generator gives four.
IDS = 4 * WIDTH
LOWEST = np.finfo(np.float32).min


@intrinsic
def uniforms(context, seed, position, stream, start):
    """`noise.uniform` of IDS ids from `start`, a multiple of four, in vectors of sixteen."""
    kind = types.UniTuple(LANES, IDS // WIDTH)

    def build(context, builder, signature, given):
        seed, position, stream, start = given
        wide = ir.VectorType(LONG, WIDTH)

        def word(value):
            return splatted(builder, builder.trunc(value, INT), INTS)

        block = builder.add(word(builder.lshr(start, ir.Constant(LONG, 2))), ir.Constant(INTS, list(range(WIDTH))))
        counter = [block, word(position), constant(0), word(stream)]
        keys = [word(seed), word(builder.lshr(seed, ir.Constant(LONG, 32)))]
        for _ in range(ROUNDS):
            products = [
                builder.mul(builder.zext(value, wide), ir.Constant(wide, [factor] * WIDTH))
                for value, factor in zip(counter[::2], MULTIPLIERS, strict=True)
            ]
            high = [builder.trunc(builder.lshr(x, ir.Constant(wide, [32] * WIDTH)), INTS) for x in products]
            low = [builder.trunc(x, INTS) for x in products]
            mixed = [builder.xor(builder.xor(high[1 - i], counter[2 * i + 1]), keys[i]) for i in (0, 1)]
            counter = [mixed[0], low[1], mixed[1], low[0]]
            keys = [builder.add(key, constant(weyl)) for key, weyl in zip(keys, WEYL, strict=True)]
        found = [_fraction(builder, bits) for bits in _in_order(builder, counter)]
        return context.make_tuple(builder, kind, found)

    return kind(types.int64, types.int64, types.int64, types.int64), build


def _in_order(builder, words):
    """The words 0 to 3 of sixteen blocks, block after block."""
    first, second = (zipped(builder, words[i], words[i + 1]) for i in (0, 2))
    return [half for pair in zip(first, second, strict=True) for half in zipped(builder, *pair, 2)]


def _fraction(builder, bits):
    """The middle of the interval of (0, 1) that the highest 23 bits stand for."""
    x = builder.sitofp(builder.lshr(bits, constant(9)), FLOATS)
    return builder.fmul(builder.fadd(x, ir.Constant(FLOATS, [0.5] * WIDTH)), ir.Constant(FLOATS, [2.0**-23] * WIDTH))


@part
def _raced(z, sums, i, u):
    """sums = z + Gumbel noise, of sixteen ids from i on."""
    write(sums, i, read(z, i, False) - log(splat(0.0) - log(u)), False)


@part
def _race(z, sums, width, seed, position, stream):
    for i in range(0, width, IDS):
        u = uniforms(seed, position, stream, i)
        _raced(z, sums, i, u[0])
        _raced(z, sums, i + WIDTH, u[1])
        _raced(z, sums, i + 2 * WIDTH, u[2])
        _raced(z, sums, i + 3 * WIDTH, u[3])


@part
def _pick(sums, width, token, values, count):
    """The places of the `count` highest sums, in order, to `token`, and those sums to `values`; −∞ is left there.

    Where only −∞ is left the first place is repeated, −1 if there is none.
    """
    for n in range(count):
        peaks = splat(NEVER)
        for i in range(0, width, WIDTH):
            peaks = greater(read(sums, i, False), peaks)
        peak = greatest(peaks)
        place = -1 if n == 0 else whole(token)
        if peak > NEVER:
            place = first_of(sums, peak, width, False)
        values[n] = peak
        put_whole(token + 8 * n, place)
        if place >= 0:
            put_number(sums + 4 * place, NEVER)


@part
def _look(z, e, width, bound, counting):
    """How many z are at least `bound` or, not counting, the sum of their e; the least of them; the greatest other."""
    sums, high, low = splat(0.0), splat(np.inf), splat(NEVER)
    for i in range(0, width, WIDTH):
        x = read(z, i, False)
        weight = splat(1.0) if counting else read(e, i, False)
        sums = sums + over(splat(bound), x, splat(0.0), weight)
        high = lesser(over(splat(bound), x, splat(np.inf), x), high)
        low = greater(over(splat(bound), x, x, splat(NEVER)), low)
    return total(sums), least(high), greatest(low)


@part
def _above(z, e, width, bound, counting):
    """How many z are above `bound` or, not counting, the sum of their e."""
    sums = splat(0.0)
    for i in range(0, width, WIDTH):
        sums = sums + over(read(z, i, False), splat(bound), splat(1.0) if counting else read(e, i, False), splat(0.0))
    return total(sums)


@part
def _threshold(z, e, width, bottom, goal, counting):
    """The greatest z from which on there are `goal` of them or, not counting, as much of e; the least from `bottom`.

    The highest z is 0. Both ends of the interval that is halved are z, so that it ends where none lies between them.
    """
    _, low, _ = _look(z, e, width, max(bottom, LOWEST), counting)
    top = np.float32(0.0)
    while low < top:
        middle = np.float32(low + (top - low) * np.float32(0.5))
        if middle <= low:
            middle = top
        reached, at_least, under = _look(z, e, width, middle, counting)
        if reached >= goal:
            low = at_least
        else:
            top = under
    return low


@part
def limited(z, e, width, top_k, top_p, min_p, lowest):
    """The least z that min-p, then top-k, then top-p leave; −∞ where none of them takes `lowest` away."""
    bound = np.float32(math.log(min_p)) if min_p > 0 else NEVER
    out = lowest < bound
    if 0 < top_k < width and (top_p < 1 or _above(z, e, width, lowest, True) >= top_k):
        bound = max(bound, _threshold(z, e, width, LOWEST, np.float32(top_k), True))
        out = out or lowest < bound
    if top_p < 1:
        goal = np.float32(top_p * _look(z, e, width, bound, False)[0])
        if out or _above(z, e, width, lowest, False) >= goal:
            bound = max(bound, _threshold(z, e, width, bound, goal, False))
            out = True
    return bound if out else NEVER


@part
def _draw(scores, half, rule, seed, position, stream, token, count, width, z, e, sums, values):
    """The tokens of one row; rule: temperature, top_k, top_p, min_p. z, e and sums have room for IDS more numbers."""
    temperature, top_k, top_p, min_p = rule
    peaks = splat(NEVER)
    for i in range(0, width, WIDTH):
        peaks = greater(read(scores, i, half), peaks)
    peak, scale = splat(greatest(peaks)), splat(temperature)
    if temperature <= 0:
        for i in range(0, width, WIDTH):
            write(sums, i, read(scores, i, half), False)
        _pick(sums, width, token, values, count)
        return
    for i in range(0, width, WIDTH):
        x = (greater(read(scores, i, half), splat(NEVER)) - peak) / scale
        write(z, i, x, False)
        if top_p < 1:
            write(e, i, exp(x), False)
    _race(z, sums, width, seed, position, stream)
    _pick(sums, width, token, values, count)
    if whole(token) < 0:
        return
    if min_p > 0 or 0 < top_k < width or top_p < 1:
        lowest = np.float32(0.0)
        for n in range(count):
            lowest = min(lowest, number(z + 4 * whole(token + 8 * n)))
        bound = limited(z, e, width, top_k, top_p, min_p, lowest)
        if bound > NEVER:
            for n in range(count - 1, -1, -1):
                put_number(sums + 4 * whole(token + 8 * n), values[n])
            for i in range(0, width, WIDTH):
                write(sums, i, over(splat(bound), read(z, i, False), splat(NEVER), read(sums, i, False)), False)
            _pick(sums, width, token, values, count)


@worker
def sample_some(address):
    """Rows as long as some are left; block[0] counts those taken, and `sample` says what the rest is."""
    block = carray(address, 16)
    scores, temperature, top_k, top_p, min_p, seed = block[1], block[2], block[3], block[4], block[5], block[6]
    position, token, rows, width, count, stream = block[7], block[8], block[9], block[10], block[11], block[12]
    half = block[13] != 0
    memory, values = np.empty((3, width + IDS), np.float32), np.empty(count, np.float32)
    row = taken(block.ctypes.data)
    while row < rows:
        rule = (
            number(temperature + 4 * row), whole(top_k + 8 * row), number(top_p + 4 * row), number(min_p + 4 * row),
        )  # fmt: skip
        _draw(
            scores + row * width * (2 if half else 4), half, rule, whole(seed + 8 * row), whole(position + 8 * row),
            stream, token + 8 * count * row, count, width,
            memory[0].ctypes.data, memory[1].ctypes.data, memory[2].ctypes.data, values,
        )  # fmt: skip
        row = taken(block.ctypes.data)
    # Memory whose address alone is in use is let go of.
    memory[0, 0] = 0


@kernel(
    "void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, boolean,"
    " int64, int64, int64)"
)
def sample(
    scores, temperature, top_k, top_p, min_p, seed, position, token, rows, width, count, stream, half,
    threads, team, some,
):  # fmt: skip
    """token int64 [rows, count] as `reference.verify.sample` draws them: scores [rows, width], the others [rows].

    NaN counts as −∞. Masses are added up in float32, so that an id at the very end of a nucleus may be taken
    that the reference, which adds in float64, leaves, or the other way round.

    With a `team` (`openmp.team`) that many threads run `some`, the address of `sample_some`.
    """
    block = np.empty(16, np.int64)
    block[0], block[1], block[2], block[3], block[4], block[5] = 0, scores, temperature, top_k, top_p, min_p
    block[6], block[7], block[8], block[9], block[10], block[11] = seed, position, token, rows, width, count
    block[12], block[13] = stream, half
    dealt(team, some, block.ctypes.data, threads if rows > 1 else 1)
    block[0] = 0
