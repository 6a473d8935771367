"""Products of a CPU: rows of activations with the panels of a weight, forty-eight of its rows (`panels.pack`).

An element is one chain of sums over the columns from the first to the last; which rows are computed together, by which
thread and how many there are does not enter it. Eight rows share one reading of the weight.

A chain adds products of float32, or pairs of products of bfloat16 by the processor's instruction for them where it has
one, or thirty-two by its matrix unit: its bits are those of the processor's kind.
"""

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from . import matrix_unit
from .cpu_kernels import gelu_tanh, layer_norm, rms_norm, silu_gate
from .instructions import FLOATS, INTS, LINE, LONG, MANY_REGISTERS, WIDTH, ask, fused, load, paired, splatted
from .lanes import LANES, kernel, part, read, write
from .matrix_unit import ROWS
from .team import dealt, taken, worker

VECTORS = 3
PANEL = VECTORS * WIDTH
_BYTES = 4 * PANEL
# Sums of that many rows fit into the registers.
MOST = 8 if MANY_REGISTERS else 2
# What is done with the sums of a row.
NONE, SILU_GATE, GELU = range(3)
# How far ahead memory is asked for, in bytes: more than the processor does, which stops where a page of 4 KiB ends.
_AHEAD = 6144


@intrinsic(prefer_literal=True)
def _none(context, rows):
    """The sums of `rows` rows before the first column."""
    kind = types.UniTuple(LANES, VECTORS * rows.literal_value)

    def build(context, builder, signature, given):
        return ir.Constant(context.get_value_type(kind), None)

    return kind(rows), build


def _step(kind, added):
    """An intrinsic that goes on with sums by the column, or pair of them, at the addresses of a panel and of x."""

    @intrinsic
    def step(context, sums, panel, x, stride):
        def build(context, builder, signature, given):
            sums, panel, x, stride = given
            found = sums
            weights = [load(builder, panel, 4 * WIDTH * i, kind) for i in range(VECTORS)]
            for start in range(_AHEAD, _AHEAD + _BYTES, LINE):
                ask(builder, builder.add(panel, ir.Constant(LONG, start)), nearness=2)
            for row in range(signature.args[0].count // VECTORS):
                at = builder.add(x, builder.mul(stride, ir.Constant(LONG, row)))
                value = splatted(builder, load(builder, at, 0, kind.element), kind)
                for i, weight in enumerate(weights):
                    place = VECTORS * row + i
                    total = added(builder, weight, value, builder.extract_value(sums, place))
                    found = builder.insert_value(found, total, place)
            return found

        return sums(sums, types.int64, types.int64, types.int64), build

    return step


_with_column, _with_pair = _step(FLOATS, fused), _step(INTS, paired)


@intrinsic
def _put(context, sums, address):
    """Sums to memory, vector after vector."""

    def build(context, builder, signature, given):
        sums, address = given
        for i in range(signature.args[0].count):
            at = builder.add(address, ir.Constant(LONG, 4 * WIDTH * i))
            builder.store(builder.extract_value(sums, i), builder.inttoptr(at, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(sums, types.int64), build


@part
def _rows(sums, rows, x, panel, bias, residual, out, start, width, columns, half, scratch):
    """out = x·panelᵀ + bias + residual of `rows` rows, from column `start` of out on; sums: `_none` of them."""
    if half:
        for k in range(columns // 2):
            sums = _with_pair(sums, panel + _BYTES * k, x + 4 * k, columns * 2)
    else:
        for k in range(columns):
            sums = _with_column(sums, panel + _BYTES * k, x + 4 * k, columns * 4)
    _put(sums, scratch)
    _finish(rows, bias, residual, out, start, width, half, scratch)


@part
def _finish(rows, bias, residual, out, start, width, half, scratch):
    """out = the sums of `rows` rows at `scratch` + bias + residual."""
    size = 2 if half else 4
    for row in range(rows):
        for i in range(0, min(PANEL, width - start), WIDTH):
            y = read(scratch + 4 * PANEL * row, i, False)
            if bias:
                y = y + read(bias, start + i, half)
            if residual:
                y = y + read(residual + row * width * size, start + i, half)
            write(out + row * width * size, start + i, y, half)


def _by_count(most):
    """`_rows` of 1 to `most` rows."""
    if most == 1:

        @part
        def some(count, x, panel, bias, residual, out, start, width, columns, half, scratch):
            _rows(_none(1), 1, x, panel, bias, residual, out, start, width, columns, half, scratch)

        return some
    fewer = _by_count(most - 1)

    @part
    def some(count, x, panel, bias, residual, out, start, width, columns, half, scratch):
        if count == most:
            _rows(_none(most), most, x, panel, bias, residual, out, start, width, columns, half, scratch)
        else:
            fewer(count, x, panel, bias, residual, out, start, width, columns, half, scratch)

    return some


_some = _by_count(MOST)


@part
def _by_rows(rows, x, panel, bias, residual, out, start, width, columns, half, scratch, shape):
    """out = x·panelᵀ + bias + residual, from column `start` of out on, of as many rows at once as registers hold."""
    size, row = 2 if half else 4, 0
    while row < rows:
        source, target, some = x + row * columns * size, out + row * width * size, min(rows - row, MOST)
        added = residual + row * width * size if residual else 0
        _some(some, source, panel, bias, added, target, start, width, columns, half, scratch)
        row += some


@part
def _tiled(blocks, new, x, panel, columns, scratch):
    """The sums of one or two tiles of rows with a panel; while it is new, weights are asked for ahead."""
    matrix_unit.clear(blocks)
    for k in range(0, columns, matrix_unit.COLUMNS):
        if new:
            matrix_unit.add(blocks, x + 2 * k, 2 * columns, panel + _BYTES // 2 * k, _BYTES, _AHEAD)
        else:
            matrix_unit.add(blocks, x + 2 * k, 2 * columns, panel + _BYTES // 2 * k, _BYTES, 0)
    matrix_unit.put(blocks, scratch, _BYTES)


@part
def _by_tiles(rows, x, panel, bias, residual, out, start, width, columns, half, scratch, shape):
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
        _finish(some, bias, added, out + 2 * row * width, start, width, True, scratch)
        row += some
    matrix_unit.leave()


# What a processor does not have is not to be compiled for it.
_by_tiles = _by_tiles if matrix_unit.EXISTS else _by_rows


@part
def _gate(number, sums, out, rows, width, arrived, half):
    """What of out = silu(gate)·up [rows, width] could not be computed before panel `number` of the sums was there."""
    begin, end = number * PANEL, min((number + 1) * PANEL, 2 * width)
    if begin < width:
        _gate_columns(number, sums, out, rows, width, arrived, half)
    for chunk in range(max(begin - width, 0) // PANEL, (end - width + PANEL - 1) // PANEL):
        if chunk != number:
            _gate_columns(chunk, sums, out, rows, width, arrived, half)


@part
def _gate_columns(chunk, sums, out, rows, width, arrived, half):
    """A panel for a chunk of 48 columns has come: compute it if that was the last."""
    first, end = chunk * PANEL, min((chunk + 1) * PANEL, width)
    others = (width + end - 1) // PANEL - max((width + first) // PANEL, chunk + 1) + 1
    if taken(arrived + 8 * chunk) == others:
        silu_gate(sums, out, rows, width, first, end, half)


@worker
def share(block):
    """What one thread does of `product`: a run of panels, in a straight line through memory, then what others left."""
    x, panels, bias, residual, out, rows, width, columns, half, threads = (
        block[1], block[2], block[3], block[4], block[5], block[6], block[7], block[8], block[9] != 0, block[10],
    )  # fmt: skip
    size, count, tiles, activation = 2 if half else 4, (width + PANEL - 1) // PANEL, block[12] != 0, block[13]
    memory, shape = np.empty(max(MOST, 2 * ROWS) * PANEL, np.float32), np.zeros(LINE, np.uint8)
    scratch, told, own, next_panels = memory.ctypes.data, shape.ctypes.data, taken(block[11]), block[11] + LINE
    for turn in range(threads):
        run = (own + turn) % threads
        first, end = count * run // threads, count * (run + 1) // threads
        number = first + taken(next_panels + LINE * run)
        while number < end:
            panel, start = panels + number * PANEL * columns * size, number * PANEL
            if tiles:
                _by_tiles(rows, x, panel, bias, residual, out, start, width, columns, half, scratch, told)
            else:
                _by_rows(rows, x, panel, bias, residual, out, start, width, columns, half, scratch, told)
            if activation == SILU_GATE:
                _gate(number, out, block[14], rows, width // 2, block[15], half)
            elif activation == GELU:
                for row in range(rows):
                    some = out + (row * width + start) * size
                    gelu_tanh(some, some, min(PANEL, width - start), half)
            number = first + taken(next_panels + LINE * run)
    # Memory whose address alone is in use is let go of.
    memory[0] = shape[0] = 0


@kernel(
    "void(int64, int64, int64, float64, int64, int64, int64, int64, int64, int64, int64, int64,"
    " boolean, boolean, int64, int64, int64)"
)
def product(
    x, norm, shift, eps, panels, bias, activation, residual, out, rows, width, columns, half, unit,
    threads, entry, share,
):  # fmt: skip
    """out = activation(x·Wᵀ + bias + residual): x [rows, columns]; W of `width` rows in panels; bias [width].

    norm [columns]: x is normalised before, by RMSNorm or, with shift [columns], LayerNorm. activation: `NONE`, `GELU`,
    or `SILU_GATE`, which leaves width / 2 columns. `unit`: bfloat16 by the matrix unit, if the columns are a multiple
    of its own. On `threads` of the team at `entry`, which run `share`; where there is none, on this one.
    """
    size = 2 if half else 4
    if not entry:
        threads = 1
    normed = np.empty(1 + (rows * columns * size if norm else 0), np.uint8)
    if norm:
        if shift:
            layer_norm(x, norm, shift, normed.ctypes.data, rows, columns, eps, half)
        else:
            rms_norm(x, norm, normed.ctypes.data, rows, columns, eps, half)
        x = normed.ctypes.data
    gated = activation == SILU_GATE
    sums, arrived = (
        np.empty(1 + (rows * width * size if gated else 0), np.uint8),
        np.zeros(width // PANEL + 1, np.int64),
    )
    # A line each for how many threads have come and, of each run of panels, how many were taken.
    block, counters = np.empty(16, np.int64), np.zeros((threads + 1, LINE // 8), np.int64)
    block[1], block[2], block[3], block[4] = x, panels, bias, residual
    block[5], block[14] = sums.ctypes.data if gated else out, out
    block[6], block[7], block[8], block[9], block[10] = rows, width, columns, half, threads
    block[11], block[12] = counters.ctypes.data, half and unit and columns % matrix_unit.COLUMNS == 0
    block[13], block[15] = activation, arrived.ctypes.data
    dealt(entry, share, block.ctypes.data, threads)
    # Memory whose address alone is in use is let go of.
    block[0] = counters[0, 0] = arrived[0] = normed[0] = sums[0] = 0
