"""Attention over pages, for a CPU: a few queries that see the same keys, of several rows or heads, together.

A vector of a key is read once for all of them, and one of a query once for a few keys. A score is a sum of its own over
the columns and an output one over the positions, in order: which queries are together, on which thread, changes none.
Values of bfloat16 are weighed in pairs, an even position and the next, by weights rounded to bfloat16.
"""

import numpy as np
from numba import carray

from . import matrix_unit
from .attention_sums import (
    AHEAD,
    FEW,
    get_sums,
    listed,
    no_products,
    put_sums,
    put_totals,
    with_few_pairs,
    with_floats,
    with_pairs,
    with_value,
    with_values,
)
from .instructions import WIDTH
from .lanes import below, counted, exp, greater, greatest, kernel, number, part, read, splat, total, whole, write
from .team import dealt, taken, worker

_WORTH_A_TEAM = 2048
# Positions are counted from a multiple of so many: the matrix unit takes them together, and that many queries at most.
BLOCK, TOGETHER = matrix_unit.COLUMNS, matrix_unit.ROWS


@part
def _score(queries, scores, keys, places, first, end, width, half):
    """Query·key of each query and the positions from `first` to `end` - 1, and of some after them anything."""
    for i in range(first, end, FEW):
        sums = no_products(queries)
        if half:
            for j in range(0, width - WIDTH, 2 * WIDTH):
                sums = with_pairs(sums, queries, keys, places + 8 * i, 2 * j)
            if width % (2 * WIDTH):
                sums = with_few_pairs(sums, queries, keys, places + 8 * i, 2 * (width - WIDTH))
        else:
            for j in range(0, width, WIDTH):
                sums = with_floats(sums, queries, keys, places + 8 * i, 4 * j)
        put_totals(sums, scores, 4 * i)


@part
def _mix(weights, mixed, values, places, first, end, width, half):
    """mixed + Σ weight·value of each query and the positions from `first` to `end` - 1, in order."""
    j = 0
    while j + FEW * WIDTH <= width:
        sums = get_sums(FEW, mixed, 4 * j)
        put_sums(_mixed(sums, weights, values, places, first, end, j, half), mixed, 4 * j)
        j += FEW * WIDTH
    while j < width:
        sums = get_sums(1, mixed, 4 * j)
        put_sums(_mixed(sums, weights, values, places, first, end, j, half), mixed, 4 * j)
        j += WIDTH


@part
def _mixed(sums, weights, values, places, first, end, column, half):
    if half:
        values += 2 * column
        for i in range(first // 2 * 2, end, 2):
            left, right = whole(places + 8 * max(i, first)), whole(places + 8 * min(i + 1, end - 1))
            ahead = whole(places + 8 * (i + AHEAD))
            sums = with_values(sums, weights, 2 * i, values + left, values + right, values + ahead)
    else:
        values += 4 * column
        for i in range(first, end):
            value, ahead = values + whole(places + 8 * i), values + whole(places + 8 * (i + AHEAD))
            sums = with_value(sums, weights, 4 * i, value, value, ahead)
    return sums


def _over(step):
    """A step over what each query sees: positions before `low` by itself, to `high` - 1 with the others, then its own.

    Of each query there are addresses in `source`, `target` and `places`.
    """

    @part
    def walk(source, target, base, places, firsts, ends, low, high, width, half):
        source, target = source.ctypes.data, target.ctypes.data
        for n in range(len(ends)):
            left, right, end = listed(1, source + 8 * n), listed(1, target + 8 * n), min(low, ends[n])
            step(left, right, base, places[n], firsts[n], end, width, half)
        if low < high:
            left, right = listed(FEW, source), listed(FEW, target)
            step(left, right, base, places[0], low, high, width, half)
        for n in range(len(ends)):
            left, right = listed(1, source + 8 * n), listed(1, target + 8 * n)
            step(left, right, base, places[n], high, ends[n], width, half)

    return walk


_score_all, _mix_all = _over(_score), _over(_mix)


@part
def softmax(scores, weights, count, scale, slope, half):
    """exp(x − the greatest x), x = scale·score + slope·distance, of `count` scores; the inverse of their sum.

    They are written to `weights`, which may be where the scores are or before, with zeros on both sides.
    """
    none, last, peaks, factor = splat(0.0), (count - 1) // WIDTH * WIDTH, splat(-np.inf), splat(scale)
    if slope:
        for i in range(0, count, WIDTH):
            write(scores, i, read(scores, i, False) * factor + splat(slope) * counted(i + 1 - count), False)
        factor = splat(1.0)
    write(scores, last, below(count - last, read(scores, last, False), peaks), False)
    for i in range(0, count, WIDTH):
        peaks = greater(read(scores, i, False), peaks)
    peak, mass = splat(greatest(peaks)) * factor, none
    write(weights, -WIDTH, none, half)
    for i in range(0, last, WIDTH):
        weight = exp(read(scores, i, False) * factor - peak)
        mass = mass + weight
        write(weights, i, weight, half)
    weight = below(count - last, exp(read(scores, last, False) * factor - peak), none)
    write(weights, last, weight, half)
    write(weights, last + WIDTH, none, half)
    return np.float32(1.0) / total(mass + weight)


@part
def keep(arrays):
    """numba frees an array after its last use by name, even if its address is used later."""
    return len(arrays)


@worker
def attend_some(address):
    """Runs of queries as long as some are left; block[0] counts those taken, and `attend` says what the rest is."""
    block = carray(address, 16)
    q, keys, values, out, slopes = block[1], block[2], block[3], block[4], block[5]
    heads, group, width, slots, half = block[6], block[7], block[8], block[9], block[10] != 0
    longest, rows, runs, count, scale = block[11], block[12], block[13], block[14], block[15:].view(np.float64)[0]
    size, scores = 2 if half else 4, np.empty((FEW, longest + 3 * WIDTH), np.float32)
    mixed, shares = np.empty((FEW, width), np.float32), np.empty(FEW, np.float32)
    seen, at = np.empty((4, FEW), np.int64), np.empty((3, FEW), np.int64)
    task = taken(block.ctypes.data)
    while task < count:
        start, skipped, many, own = listed(4, runs + 32 * task)
        places, firsts, ends, queries = seen[0, :many], seen[1, :many], seen[2, :many], seen[3, :many]
        low, high = 0, longest
        for n in range(many):
            row = start + (skipped + n) // group
            places[n], firsts[n], ends[n], alike = listed(4, rows + 32 * row)
            low, high = max(low, firsts[n] + firsts[n] % 2), min(high, alike - alike % 2)
            queries[n] = row * heads + own * group + (skipped + n) % group
            at[0, n], at[1, n] = q + queries[n] * width * size, scores[n, WIDTH:].ctypes.data
            at[2, n] = mixed[n].ctypes.data
            mixed[n] = 0
        if many == 1 or high <= low:
            low = high = longest
        own *= slots * width * size
        _score_all(at[0], at[1], keys + own, places, firsts, ends, low, high, width, half)
        for n in range(many):
            slope = number(slopes + 4 * (queries[n] % heads)) if slopes else np.float32(0.0)
            weights = at[1, n] + size * firsts[n]
            shares[n] = softmax(at[1, n] + 4 * firsts[n], weights, ends[n] - firsts[n], scale, slope, half)
        _mix_all(at[1], at[2], values + own, places, firsts, ends, low, high, width, half)
        for n in range(many):
            for i in range(0, width, WIDTH):
                write(out + queries[n] * width * size, i, read(at[2, n], i, False) * splat(shares[n]), half)
        task = taken(block.ctypes.data)
    keep((scores, mixed))


@part
def _find(places, first, end, origin, row, owner, table, pages, length, slot, depth, kv_heads, slots, size):
    """Where the keys of positions from `first` to `end` - 1 lie in [pages, kv_heads, slots, `size` bytes].

    places[0] is for position `origin`; those before the first are as the first, those after the last as the last.
    """
    for page in range(first // slots, (end - 1) // slots + 1):
        start = page * slots
        base = whole(table + 8 * (owner * pages + page)) * kv_heads * slots - start
        for position in range(max(first, start), min(end, start + slots)):
            places[position - origin] = (base + position) * size
    if length:
        root = whole(length + 8 * row)
        for position in range(max(first, root), end):
            at = whole(slot + 8 * (row * depth + position - root))
            base = whole(table + 8 * (owner * pages + at // slots)) * kv_heads * slots
            places[position - origin] = (base + at % slots) * size
    places[: first - origin] = places[first - origin]
    places[end - origin :] = places[end - 1 - origin]


@part
def lay_out(
    sequence, position, table, pages, length, slot, depth,
    rows, heads, kv_heads, width, slots, window, half, tiles, threads,
):  # fmt: skip
    """What rows see and which queries are taken together, for `attend_as`: the same in all layers with this window."""
    group, size, work = heads // kv_heads, 2 if half else 4, 0
    first, end, origin, last = np.zeros(rows, np.int64), np.zeros(rows, np.int64), 1 << 62, 0
    for row in range(rows):
        if whole(sequence + 8 * row) >= 0:
            end[row] = whole(position + 8 * row) + 1
            first[row] = max(end[row] - window, 0) if window else 0
            origin, last = min(origin, first[row] // BLOCK * BLOCK), max(last, end[row])
            work += (end[row] - first[row]) * heads
    longest = max(last - origin + BLOCK - 1, 0) // BLOCK * BLOCK
    # Of a row its places, the first and the end of what it sees, and the end of what others of its sequence see alike.
    seen, places = np.empty((rows, 4), np.int64), np.empty((rows, longest + FEW + AHEAD), np.int64)
    runs, count, start = np.empty((rows * heads, 4), np.int64), 0, 0
    # Queries are taken together where that leaves every thread some of them.
    most = TOGETHER if tiles else FEW if rows * heads >= 2 * FEW * threads else 1
    while start < rows:
        owner, stop = whole(sequence + 8 * start), start + 1
        while stop < rows and whole(sequence + 8 * stop) == owner:
            stop += 1
        low, high = first[start:stop].min(), end[start:stop].max()
        for row in range(start, stop if owner >= 0 else start):
            found, alike = places[start], end[row]
            if length:
                found, alike, high = places[row], min(alike, whole(length + 8 * row)), end[row]
            if length or row == start:
                # Of a tree from where any row of it sees on: they may be looked at together.
                _find(
                    found, low, high, origin, row, owner, table, pages, length, slot, depth, kv_heads, slots,
                    width * size,
                )  # fmt: skip
            seen[row, 0], seen[row, 1] = found.ctypes.data, first[row] - origin
            seen[row, 2], seen[row, 3] = end[row] - origin, alike - origin
        left = (stop - start) * group if owner >= 0 else 0
        while left:
            # Of one size by the matrix unit, so that threads have as much to do.
            many = -(-left // -(-left // most)) if tiles else most if left >= most else 1
            # Another head's keys each time: threads that read the same ones wait for the same memory.
            for own in range(kv_heads):
                runs[count, 0], runs[count, 1] = start, (stop - start) * group - left
                runs[count, 2], runs[count, 3] = many, own
                count += 1
            left -= many
        start = stop
    return seen, places, runs, count, longest, work


@part
def attend_as(
    layout, q, keys, values, out, sequence, slopes, rows, heads, kv_heads, width, slots, tree, scale, half,
    threads, team, some,
):  # fmt: skip
    """`attend` of rows that were laid out."""
    seen, places, runs, count, longest, work = layout
    for row in range(rows):
        if whole(sequence + 8 * row) < 0:
            for i in range(0, heads * width, WIDTH):
                write(out + row * heads * width * (2 if half else 4), i, splat(0.0), half)
    block = np.empty(17, np.int64)
    block[0], block[1], block[2], block[3], block[4], block[5] = 0, q, keys, values, out, slopes
    block[6], block[7], block[8], block[9], block[10] = heads, heads // kv_heads, width, slots, half
    block[11], block[12], block[13] = longest, seen.ctypes.data, runs.ctypes.data
    block[14], block[16] = count, tree
    block[15:].view(np.float64)[0] = scale
    dealt(team, some, block.ctypes.data, threads if work >= _WORTH_A_TEAM else 1)
    keep((seen, places, runs, block))


@kernel(
    "void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64,"
    " int64, int64, int64, int64, int64, int64, float64, boolean, boolean, int64, int64, int64)"
)
def attend(
    q, keys, values, out, sequence, position, table, pages, length, slot, depth, slopes,
    rows, heads, kv_heads, width, slots, window, scale, half, tiles, threads, team, some,
):  # fmt: skip
    """softmax(scale·q·kᵀ + slope·(key position − position))·v over the positions a row sees, in order.

    q [rows, heads, width] → out [rows, heads·width], zeros for rows of no sequence; keys, values [pages, kv_heads,
    slots, width]; sequence, position [rows]; table [sequences, pages]; of a tree length [rows], slot [rows, depth];
    slopes float32 [heads]; window 0 for none. With a `team` (`openmp.team`) that many threads run `some`, the
    address of `attend_some` or, with `tiles`, of `attention_tiles.attend_some`, where there is enough for them to do.
    """
    layout = lay_out(
        sequence, position, table, pages, length, slot, depth,
        rows, heads, kv_heads, width, slots, window, half, tiles, threads,
    )  # fmt: skip
    attend_as(
        layout, q, keys, values, out, sequence, slopes, rows, heads, kv_heads, width, slots, length != 0, scale, half,
        threads, team, some,
    )  # fmt: skip
