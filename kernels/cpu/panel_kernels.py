"""Products of a CPU: rows of activations with the panels of a weight, forty-eight of its rows (`panels.pack`).

An element is one chain of sums over the columns from the first to the last; which rows are computed together, by which
thread and how many there are does not enter it. Nine rows share one reading of the weight.

A chain adds products of float32, or pairs of products of bfloat16 by the processor's instruction for them where it has
one, or thirty-two by its matrix unit: its bits are those of the processor's kind. Weights of eight bits are widened to
float32 as they are read, and a row's sum is multiplied by that row's `scale`, whose address says that they are such.
"""

import numpy as np

from . import matrix_unit
from .instructions import LINE, WIDTH
from .lanes import kernel, part, read, splat, write
from .matrix_unit import ROWS
from .panel_steps import (
    LIGHT,
    MOST,
    MOST_OF_A_VECTOR,
    PANEL,
    STEP_BYTES,
    column_and_more,
    next_digits,
    none,
    none_of_a_vector,
    pair_and_more,
    put,
    put_vectors,
    take_vectors,
    vector_and_more,
    with_column,
    with_light,
    with_pair,
    with_vector,
)
from .small_ops import gelu_tanh, layer_norm, rms_norm, silu_row
from .team import dealt, taken, worker

# What is done with the sums of a row.
NONE, SILU_GATE, GELU = range(3)
# How far ahead memory is asked for, in bytes: more than the processor does, which stops where a page of 4 KiB ends.
_AHEAD = 6144
# Pairs of columns of a panel that stay in the cache while its vectors are gone through one by one.
_STRETCH = 64
# How many turns over a panel ask for the next one, at most: more of them take longer for it than they gain.
_SHARES = 8


@part
def _rows(sums, rows, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, ahead, pace):
    """out = scale·x·panelᵀ + bias + residual of `rows` rows and `many` columns; sums: `none` of them.

    Memory is asked for from `ahead` on, `pace` bytes a column or pair of them; with `pace` 0 `_AHEAD` bytes after what
    is read, by rows that are many enough: a distance that instructions hold is faster than another address.
    """
    if scale:
        if pace == 0:
            ahead, pace = panel + _AHEAD, STEP_BYTES
        for k in range(columns // LIGHT):
            sums = with_light(sums, panel + STEP_BYTES * k, x + 4 * LIGHT * k, columns * 4, ahead + pace * k)
    elif pace == 0:
        if half:
            for k in range(columns // 2):
                sums = with_pair(sums, panel + STEP_BYTES * k, x + 4 * k, columns * 2, panel + STEP_BYTES * k + _AHEAD)
        else:
            for k in range(columns):
                sums = with_column(
                    sums, panel + STEP_BYTES * k, x + 4 * k, columns * 4, panel + STEP_BYTES * k + _AHEAD
                )
    elif half:
        for k in range(columns // 2):
            sums = pair_and_more(sums, panel + STEP_BYTES * k, x + 4 * k, columns * 2, ahead + pace * k)
    else:
        for k in range(columns):
            sums = column_and_more(sums, panel + STEP_BYTES * k, x + 4 * k, columns * 4, ahead + pace * k)
    put(sums, scratch)
    _finish(rows, scale, bias, residual, out, many, width, half, scratch)


@part
def _by_vector(sums, rows, x, panel, scale, bias, residual, out, many, width, columns, scratch, ahead, pace):
    """`_rows` of bfloat16 where registers are few: a stretch of columns vector by vector; sums: `none_of_a_vector`."""
    if pace == 0:
        ahead, pace = panel + _AHEAD, STEP_BYTES
    pairs = columns // 2
    for first in range(0, pairs, _STRETCH):
        last = min(first + _STRETCH, pairs)
        for start in range(0, STEP_BYTES, 4 * WIDTH):
            so_far = take_vectors(sums, scratch + start) if first else sums
            if start == 0:
                for k in range(first, last):
                    so_far = vector_and_more(so_far, panel + STEP_BYTES * k, x + 4 * k, columns * 2, ahead + pace * k)
            else:
                for k in range(first, last):
                    so_far = with_vector(so_far, panel + STEP_BYTES * k + start, x + 4 * k, columns * 2, 0)
            put_vectors(so_far, scratch + start)
    _finish(rows, scale, bias, residual, out, many, width, True, scratch)


@part
def _finish(rows, scale, bias, residual, out, many, width, half, scratch):
    """out = scale·the sums of `rows` rows at `scratch` + bias + residual, `many` columns, its rows `width` apart."""
    size = 2 if half else 4
    for row in range(rows):
        for i in range(0, many, WIDTH):
            y = read(scratch + 4 * PANEL * row, i, False)
            if scale:
                y = y * read(scale, i, False)
            if bias:
                y = y + read(bias, i, half)
            if residual:
                y = y + read(residual + row * width * size, i, half)
            write(out + row * width * size, i, y, half)


def _by_count(most):
    """`_rows` of 1 to `most` rows, `_by_vector` of more than `MOST`."""
    if most == 0:

        @part
        def some(count, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, ahead, pace):
            pass

        return some
    fewer = _by_count(most - 1)

    @part
    def by_column(count, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, ahead, pace):
        if count == most:
            _rows(
                none(most), most, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, ahead,
                pace,
            )  # fmt: skip
        else:
            fewer(count, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, ahead, pace)

    @part
    def by_vector(count, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, ahead, pace):
        if count == most:
            sums = none_of_a_vector(most)
            _by_vector(sums, most, x, panel, scale, bias, residual, out, many, width, columns, scratch, ahead, pace)
        else:
            fewer(count, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, ahead, pace)

    return by_column if most <= MOST else by_vector


_some = _by_count(max(MOST, MOST_OF_A_VECTOR))


@part
def _by_rows(rows, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, shape, asked, more):
    """out = scale·x·panelᵀ + bias + residual, `many` columns, of as many rows at once as registers hold.

    Where that takes several turns the last of them ask for a share of the next panel each, if there is `more`, so that
    memory is read meanwhile; the first asks for this one, unless it was `asked` for.
    """
    most = max(MOST, MOST_OF_A_VECTOR) if half and not scale else MOST
    size, row, turns = 2 if half else 4, 0, (rows + most - 1) // most
    length, shares = (
        columns * (1 if scale else size) * PANEL,
        min(turns if asked else turns - 1, _SHARES) if more and turns > 1 else 0,
    )
    for turn in range(turns):
        source, some = x + row * columns * (4 if scale else size), (rows - row) // (turns - turn)
        target = out + row * width * size
        added = residual + row * width * size if residual else 0
        share = turn - turns + shares
        ahead, pace = 0, 0
        if share >= 0:
            ahead, pace = panel + length + length * share // shares, STEP_BYTES // shares
        _some(some, source, panel, scale, bias, added, target, many, width, columns, half, scratch, ahead, pace)
        row += some


@part
def _tiled(blocks, new, x, panel, columns, scratch):
    """The sums of one or two tiles of rows with a panel; while it is new, weights are asked for ahead."""
    matrix_unit.clear(blocks)
    for k in range(0, columns, matrix_unit.COLUMNS):
        if new:
            matrix_unit.add(blocks, x + 2 * k, 2 * columns, panel + STEP_BYTES // 2 * k, STEP_BYTES, _AHEAD)
        else:
            matrix_unit.add(blocks, x + 2 * k, 2 * columns, panel + STEP_BYTES // 2 * k, STEP_BYTES, 0)
    matrix_unit.put(blocks, scratch, STEP_BYTES)


@part
def _by_tiles(rows, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, shape, asked, more):
    """`_by_rows` of bfloat16, by the matrix unit; shape: 64 zeroed bytes."""
    row = 0
    while row < rows:
        source, some = x + 2 * row * columns, min(rows - row, ROWS)
        matrix_unit.shape(shape, some)
        if rows - row >= 2 * ROWS:
            some = 2 * ROWS
            _tiled(2, row == 0, source, panel, columns, scratch)
        else:
            _tiled(1, row == 0, source, panel, columns, scratch)
        added = residual + 2 * row * width if residual else 0
        _finish(some, scale, bias, added, out + 2 * row * width, many, width, True, scratch)
        row += some
    matrix_unit.leave()


# What a processor does not have is not to be compiled for it.
_by_tiles = _by_tiles if matrix_unit.EXISTS else _by_rows


@part
def _panel(number, what, x, panels, scale, bias, residual, out, many, width, scratch, shape, asked, more):
    """A panel's columns of a product; `what`: rows, columns, whether of bfloat16 and by the matrix unit.

    `asked`: the panel before it was this thread's too; `more`: the next will be.
    """
    rows, columns, half, tiles = what
    panel = panels + number * PANEL * columns * (1 if scale else 2 if half else 4)
    if tiles:
        _by_tiles(rows, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, shape, asked, more)
    else:
        _by_rows(rows, x, panel, scale, bias, residual, out, many, width, columns, half, scratch, shape, asked, more)


@part
def _join(number, what, x, panels, scale, bias, out, side, pair, scratch, shape, asked, more):
    """silu(gate)·up of a panel of gates and one of what they gate, before they leave the cache: `pair` is for both."""
    rows, _, half, _ = what
    size, column = 2 if half else 4, PANEL * number
    many = min(PANEL, side - column)
    for i in range(2):
        added, target = bias + (i * side + column) * size if bias else 0, pair + i * PANEL * size
        factor = scale + (i * side + column) * 4 if scale else 0
        _panel(
            2 * number + i, what, x, panels, factor, added, 0, target, many, 2 * PANEL, scratch, shape,
            asked or i == 1, more or i == 0,
        )  # fmt: skip
    for row in range(rows):
        gate = pair + row * 2 * PANEL * size
        silu_row(gate, gate + PANEL * size, out + (row * side + column) * size, many, half)


@worker
def share(block):
    """What one thread does of `product`: a run of panels, in a straight line through memory, then what others left."""
    x, panels, bias, residual, out, width, threads, scale = (
        block[1], block[2], block[3], block[4], block[5], block[6], block[7], block[15],
    )  # fmt: skip
    rows, half, gated, activation = block[8], block[10] != 0, block[12] != 0, block[13]
    what, size, joined = (rows, block[9], half, block[11] != 0), 2 if half else 4, activation == SILU_GATE
    side = width // 2 if gated else width
    count = (side + PANEL - 1) // PANEL * (2 if gated and not joined else 1)
    memory, shape = np.empty(max(MOST, 2 * ROWS) * PANEL, np.float32), np.zeros(LINE, np.uint8)
    both = np.empty(1 + (2 * PANEL * rows * size if joined else 0), np.uint8)
    scratch, told, pair = memory.ctypes.data, shape.ctypes.data, both.ctypes.data
    own, next_panels = taken(block[14]), block[14] + LINE
    for turn in range(threads):
        run = (own + turn) % threads
        first, end = count * run // threads, count * (run + 1) // threads
        number, before = first + taken(next_panels + LINE * run), -2
        while number < end:
            asked, more = number == before + 1, number + 1 < end
            if joined:
                _join(number, what, x, panels, scale, bias, out, side, pair, scratch, told, asked, more)
            else:
                column = PANEL * (number // 2 if gated else number)
                many, place = min(PANEL, side - column), column + (number % 2 * side if gated else 0)
                start, factor = place * size, scale + place * 4 if scale else 0
                added, kept = bias + start if bias else 0, residual + start if residual else 0
                _panel(
                    number, what, x, panels, factor, added, kept, out + start, many, width, scratch, told, asked, more
                )
                for row in range(rows if activation == GELU else 0):
                    some = out + start + row * width * size
                    gelu_tanh(some, some, many, half)
            number, before = first + taken(next_panels + LINE * run), number
    # Memory whose address alone is in use is let go of.
    memory[0] = shape[0] = both[0] = 0


@part
def spread(x, out, count, half):
    """x as `with_light` wants it, float32: (x - the next column's ÷ 256) ÷ 2²⁴."""
    for i in range(0, count, WIDTH):
        lanes = read(x, i, half)
        write(out, i, (lanes - next_digits(lanes) * splat(2.0**-8)) * splat(2.0**-24), False)


@kernel(
    "void(int64, int64, int64, float64, int64, int64, boolean, int64, int64, int64, int64, int64, int64, int64,"
    " boolean, boolean, int64, int64, int64)"
)
def product(
    x, norm, shift, eps, panels, scale, gated, bias, activation, residual, out, rows, width, columns, half, unit,
    threads, team, share,
):  # fmt: skip
    """out = activation(x·Wᵀ + bias + residual): x [rows, columns]; W of `width` rows in panels; bias [width].

    With scale float32 [width], W is scale·the panels, which are of eight bits, and the columns a multiple of the lanes.

    `gated`: panels of the first and the second half of W in turn, as `SILU_GATE` wants them, which has no residual.
    norm [columns]: x is normalised before, by RMSNorm or, with shift [columns], LayerNorm. activation: `NONE`, `GELU`,
    or `SILU_GATE`, which leaves width / 2 columns. `unit`: bfloat16 by the matrix unit, if the columns are a multiple
    of its own. On `threads` of `team`, which run `share`; where there is none, on this one.
    """
    size = 2 if half else 4
    if not team:
        threads = 1
    normed = np.empty(1 + (rows * columns * size if norm else 0), np.uint8)
    if norm:
        if shift:
            layer_norm(x, norm, shift, normed.ctypes.data, rows, columns, eps, half)
        else:
            rms_norm(x, norm, normed.ctypes.data, rows, columns, eps, half)
        x = normed.ctypes.data
    wide = np.empty(1 + (rows * columns if scale else 0), np.float32)
    if scale:
        spread(x, wide.ctypes.data, rows * columns, half)
        x = wide.ctypes.data
    # A line each for how many threads have come and, of each run of panels, how many were taken.
    block, counters = np.empty(16, np.int64), np.zeros((threads + 1, LINE // 8), np.int64)
    block[1], block[2], block[3], block[4], block[5] = x, panels, bias, residual, out
    block[6], block[7], block[8], block[9], block[10] = width, threads, rows, columns, half
    block[11], block[12] = half and unit and columns % matrix_unit.COLUMNS == 0 and scale == 0, gated
    block[13], block[14], block[15] = activation, counters.ctypes.data, scale
    dealt(team, share, block.ctypes.data, threads)
    # Memory whose address alone is in use is let go of.
    block[0] = counters[0, 0] = normed[0] = wide[0] = 0
