"""Attention of bfloat16 by a processor's matrix unit: up to sixteen queries of one head of keys together.

A score is a sum over the columns, thirty-two at a time, and an output one over the positions, thirty-two at a time from
a multiple of thirty-two on, each in the unit's order; what a query does not see has a weight of 0. Weights are rounded
to bfloat16. Which queries are together, on which thread, changes no bit.
"""

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from . import attention, matrix_unit
from .attention import BLOCK, TOGETHER, keep, softmax
from .attention_sums import AHEAD, listed
from .instructions import INTS, LINE, LONG, SHORT, WIDTH, ask, load, zipped
from .lanes import fma, number, part, put_whole, read, splat, total, whole, write
from .matrix_unit import ACTIVATIONS, WEIGHTS
from .team import taken, worker

_TILE = matrix_unit.ROWS * LINE
_FAR = 1 << 62


@intrinsic
def _keys_across(context, places, keys, out):
    """A tile of weights from sixteen keys, each at `keys` + its place: a row has two columns of all."""

    def build(context, builder, signature, given):
        places, keys, out = given
        found = []
        for i in range(WIDTH):
            found.append(load(builder, builder.add(keys, load(builder, places, 8 * i, LONG)), 0, INTS))
            ask(builder, builder.add(keys, load(builder, places, 8 * (i + AHEAD), LONG)))
        for _ in range(4):
            pairs = zip(found[: WIDTH // 2], found[WIDTH // 2 :], strict=True)
            found = [half for left, right in pairs for half in zipped(builder, left, right)]
        for i, row in enumerate(found):
            _put(builder, row, out, LINE * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def _values_across(context, places, values, out):
    """Two tiles of weights from thirty-two values: a row has two positions of sixteen columns."""

    def build(context, builder, signature, given):
        places, values, out = given
        kind = ir.VectorType(SHORT, BLOCK)
        for i in range(0, BLOCK, 2):
            left, right = (
                load(builder, builder.add(values, load(builder, places, 8 * at, LONG)), 0, kind) for at in (i, i + 1)
            )
            for tile, row in enumerate(zipped(builder, left, right)):
                _put(builder, row, out, _TILE * tile + LINE * (i // 2))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


def _put(builder, row, address, offset):
    at = builder.add(address, ir.Constant(LONG, offset))
    builder.store(row, builder.inttoptr(at, row.type.as_pointer()), align=4)


@part
def _score(queries, scores, apart, keys, places, first, end, width, tiles):
    """Query·key of the tile's queries and the positions from `first` to `end` - 1; rows of scores are `apart` bytes."""
    for i in range(first, end, TOGETHER):
        matrix_unit.clear(1)
        for j in range(0, width, BLOCK):
            _keys_across(places + 8 * i, keys + 2 * j, tiles)
            matrix_unit.fetch(ACTIVATIONS, queries + 2 * j, 2 * width)
            matrix_unit.fetch(WEIGHTS, tiles, LINE)
            matrix_unit.multiply(0)
        matrix_unit.store(0, scores + 4 * i, apart)


@part
def _mix(weights, apart, mixed, values, places, first, end, width, tiles):
    """mixed + Σ weight·value of the tile's queries and the positions from `first` to `end` - 1."""
    for j in range(0, width, BLOCK):
        left, right = mixed + 4 * j, mixed + 4 * j + LINE
        matrix_unit.fetch(0, left, 4 * width)
        matrix_unit.fetch(1, right, 4 * width)
        for i in range(first, end, BLOCK):
            _values_across(places + 8 * i, values + 2 * j, tiles)
            matrix_unit.fetch(ACTIVATIONS, weights + 2 * i, apart)
            matrix_unit.fetch(WEIGHTS, tiles, LINE)
            matrix_unit.multiply(0)
            matrix_unit.fetch(WEIGHTS, tiles + _TILE, LINE)
            matrix_unit.multiply(1)
        matrix_unit.store(0, left, 4 * width)
        matrix_unit.store(1, right, 4 * width)


@part
def _weigh(scores, first, end, low, high, scale, slope):
    """Weights of bfloat16 in the place of scores, of positions `first` to `end` - 1; others from `low` to `high` - 1 0.

    The inverse of their sum.
    """
    share = softmax(scores + 4 * first, scores + 2 * first, end - first, scale, slope, True)
    # It leaves zeros on both sides, sixteen at least.
    for i in range(low, first - WIDTH, WIDTH):
        write(scores, i, splat(0.0), True)
    for i in range(end, high, WIDTH):
        write(scores, i, splat(0.0), True)
    return share


@part
def _finite(values, places, first, end, width):
    """Whether values of the positions from `first` to `end` - 1 may have a weight of 0 and leave no trace."""
    check = splat(0.0)
    for i in range(first, end):
        for j in range(0, width, WIDTH):
            check = fma(read(values + whole(places + 8 * i), j, True), splat(0.0), check)
    return total(check) == 0


@part
def _seen_alone(places, begin, first, end, own):
    """Places of whole blocks from position `begin` on: of none but those from `first` to `end` - 1, which are seen."""
    for i in range(begin, first):
        put_whole(own + 8 * i, whole(places + 8 * first))
    for i in range(max(begin, first), end):
        put_whole(own + 8 * i, whole(places + 8 * i))
    for i in range(end, _up(end)):
        put_whole(own + 8 * i, whole(places + 8 * (end - 1)))


@part
def _up(end):
    return (end + BLOCK - 1) // BLOCK * BLOCK


@part
def _lay_out(run, rows, heads, group, width, q, queries, mixed, seen):
    """The queries of a run side by side and no sums yet; where each comes from and what it sees, to `seen`.

    From where one of them sees on, from where all do, to where all see the same, to where one still sees.
    """
    start, skipped, many, own = listed(4, run)
    low, near, far, high = _FAR, 0, _FAR, 0
    for n in range(many):
        row = start + (skipped + n) // group
        place, first, end, alike = listed(4, rows + 32 * row)
        low, near, far, high = min(low, first), max(near, first), min(far, alike), max(high, end)
        source = row * heads + own * group + (skipped + n) % group
        seen[0, n], seen[1, n], seen[2, n], seen[3, n] = place, first, end, source
        for i in range(0, 2 * width, 8):
            put_whole(queries + 2 * n * width + i, whole(q + 2 * source * width + i))
        for i in range(0, width, WIDTH):
            write(mixed + 4 * n * width, i, splat(0.0), False)
    return low, near, far, high


def _attend_some(address):
    """Runs of queries as long as some are left; block[0] counts those taken, and `attend` says what the rest is."""
    block = carray(address, 17)
    q, keys, values, out, slopes, heads, group, width, slots, longest, rows, runs, count, tree, scale = (
        block[1], block[2], block[3], block[4], block[5], block[6], block[7], block[8], block[9], block[11],
        block[12], block[13], block[14], block[16] != 0, block[15:].view(np.float64)[0],
    )  # fmt: skip
    # From whole lines on: sixteen numbers, a row of scores, and sixteen more.
    apart = 4 * (longest + 2 * WIDTH)
    memory = np.empty(TOGETHER * (apart + 6 * width) + 2 * _TILE + 2 * LINE, np.uint8)
    told = memory.ctypes.data + -memory.ctypes.data % LINE
    tiles, scores = told + LINE, told + LINE + 2 * _TILE + 4 * WIDTH
    mixed = scores - 4 * WIDTH + TOGETHER * apart
    queries = mixed + 4 * TOGETHER * width
    memory[: 2 * LINE] = 0
    seen, shares = np.empty((4, TOGETHER), np.int64), np.empty(TOGETHER, np.float32)
    own_places = np.empty((2, longest + AHEAD), np.int64)
    shared, alone = own_places[0].ctypes.data, own_places[1].ctypes.data
    places, firsts, ends, sources = seen[0], seen[1], seen[2], seen[3]
    task = taken(block.ctypes.data)
    while task < count:
        low, near, far, high = _lay_out(runs + 32 * task, rows, heads, group, width, q, queries, mixed, seen)
        many, own = whole(runs + 32 * task + 16), 2 * slots * width * whole(runs + 32 * task + 24)
        k, v = keys + own, values + own
        # What they see together, and of a chain what any of them sees; then, or else, each by itself.
        first, last = low // BLOCK * BLOCK, far // BLOCK * BLOCK if tree else _up(high)
        # Where they have nothing in common there may be positions between them that nobody has written.
        harmless = near < far and _finite(v, places[0], low, near, width)
        harmless = harmless and (tree or _finite(v, places[0], far, high, width))
        first, last = (first, last) if harmless else (0, 0)
        if first < last:
            _seen_alone(places[0], first, low, min(high, last), shared)
            matrix_unit.shape(told, many)
            _score(queries, scores, apart, k, shared, first, last, width, tiles)
        if last < high:
            matrix_unit.shape(told, 1)
        for n in range(many):
            at, begin, end = scores + n * apart, max(last, firsts[n] // BLOCK * BLOCK), _up(ends[n])
            if begin < end:
                _seen_alone(places[n], begin, firsts[n], ends[n], alone)
                _score(queries + 2 * n * width, at, apart, k, alone, begin, end, width, tiles)
            slope = number(slopes + 4 * (sources[n] % heads)) if slopes else np.float32(0.0)
            begin = first if first < last else begin
            shares[n] = _weigh(at, firsts[n], ends[n], begin, max(last, end), scale, slope)
        if first < last:
            matrix_unit.shape(told, many)
            _mix(scores, apart, mixed, v, shared, first, last, width, tiles)
        if last < high:
            matrix_unit.shape(told, 1)
        for n in range(many):
            at, begin, end = mixed + 4 * n * width, max(last, firsts[n] // BLOCK * BLOCK), _up(ends[n])
            if begin < end:
                _seen_alone(places[n], begin, firsts[n], ends[n], alone)
                _mix(scores + n * apart, apart, at, v, alone, begin, end, width, tiles)
            for i in range(0, width, WIDTH):
                write(out + 2 * sources[n] * width, i, read(at, i, False) * splat(shares[n]), True)
        matrix_unit.leave()
        task = taken(block.ctypes.data)
    keep((memory,))
    own_places[0, 0] = 0


# What a processor does not have is not to be compiled for it.
attend_some = worker(_attend_some) if matrix_unit.EXISTS else attention.attend_some
