"""The small operations between the products of a pass, for a CPU: one row after the other, each by itself."""

import math

import numpy as np
from numba import carray

from .lanes import (
    WIDTH,
    exp,
    finite,
    fma,
    greater,
    greatest,
    kernel,
    lane,
    part,
    put_number,
    put_whole,
    read,
    splat,
    total,
    whole,
    write,
)
from .team import dealt, taken, worker

NEVER = np.float32(-np.inf)


@part
def _inverse_root(mean, eps):
    return np.float32(1.0) / np.float32(math.sqrt(mean + np.float32(eps)))


@part
def _inverse_rms(x, width, eps, half):
    squares = splat(0.0)
    for i in range(0, width, WIDTH):
        element = read(x, i, half)
        squares = fma(element, element, squares)
    return _inverse_root(total(squares) / np.float32(width), eps)


@kernel("void(int64, int64, int64, int64, int64, float64, boolean)")
def rms_norm(x, weight, out, rows, width, eps, half):
    """out = weight·x/√(mean x² + eps): x [rows, width] → [rows, width]."""
    size = 2 if half else 4
    for row in range(rows):
        source, target = x + row * width * size, out + row * width * size
        scale = splat(_inverse_rms(source, width, eps, half))
        for i in range(0, width, WIDTH):
            write(target, i, read(source, i, half) * scale * read(weight, i, half), half)


@kernel("void(int64, int64, int64, int64, int64, int64, float64, boolean)")
def layer_norm(x, weight, bias, out, rows, width, eps, half):
    """out = weight·(x − mean)/√(var + eps) + bias: x [rows, width] → [rows, width]."""
    size = 2 if half else 4
    for row in range(rows):
        source, target = x + row * width * size, out + row * width * size
        sums, squares = splat(0.0), splat(0.0)
        for i in range(0, width, WIDTH):
            sums = sums + read(source, i, half)
        mean = splat(total(sums) / np.float32(width))
        for i in range(0, width, WIDTH):
            distance = read(source, i, half) - mean
            squares = fma(distance, distance, squares)
        scale = splat(_inverse_root(total(squares) / np.float32(width), eps))
        for i in range(0, width, WIDTH):
            centred = (read(source, i, half) - mean) * scale
            write(target, i, fma(centred, read(weight, i, half), read(bias, i, half)), half)


@kernel("void(int64, int64, int64, boolean)")
def gelu_tanh(x, out, count, half):
    """out = x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))/2, `count` elements."""
    for i in range(0, count, WIDTH):
        y = read(x, i, half)
        inner = fma(y * y * y, splat(0.044715), y) * splat(math.sqrt(8 / math.pi))
        write(out, i, y / (splat(1.0) + exp(splat(0.0) - inner)), half)


@part
def silu_row(gate, up, out, width, half):
    """out = silu(gate)·up, `width` elements each."""
    for i in range(0, width, WIDTH):
        x = read(gate, i, half)
        x = x / (splat(1.0) + exp(splat(0.0) - x))
        write(out, i, x * read(up, i, half), half)


@kernel("void(int64, int64, int64, int64, boolean)")
def silu_gate(x, out, rows, width, half):
    """out = silu(gate)·up: x [rows, 2·width], gate before up → [rows, width]."""
    size = 2 if half else 4
    for row in range(rows):
        gate = x + row * 2 * width * size
        silu_row(gate, gate + width * size, out + row * width * size, width, half)


@part
def first_of(x, value, width, half):
    """The first place of the greatest of x [width] that are numbers, which is `value`; 0 where that is none."""
    first, i = width, 0
    while i < width and first == width:
        found = greater(read(x, i, half), splat(NEVER))
        if greatest(found) == value:
            for j in range(WIDTH - 1, -1, -1):
                first = i + j if lane(found, j) == value else first
        i += WIDTH
    return first % width


@worker
def choose_some(address):
    """Rows as long as some are left; block[0] counts those taken, and `choose` says what the rest is."""
    block = carray(address, 7)
    scores, token, log_sum_exp, rows, width, half = block[1], block[2], block[3], block[4], block[5], block[6] != 0
    row = taken(block.ctypes.data)
    while row < rows:
        source = scores + row * width * (2 if half else 4)
        peaks, masses = splat(NEVER), splat(0.0)
        for i in range(0, width, WIDTH):
            peaks = greater(read(source, i, half), peaks)
        peak = greatest(peaks)
        for i in range(0, width, WIDTH):
            masses = masses + exp(greater(read(source, i, half), splat(NEVER)) - splat(peak))
        put_whole(token + 8 * row, first_of(source, peak, width, half) if peak > NEVER else -1)
        put_number(log_sum_exp + 4 * row, np.float32(peak + np.float32(math.log(total(masses)))))
        row = taken(block.ctypes.data)


@kernel("void(int64, int64, int64, int64, int64, boolean, int64, int64, int64)")
def choose(scores, token, log_sum_exp, rows, width, half, threads, team, some):
    """The first greatest of each row of scores [rows, width], int64, −1 if none is above −∞, and log Σ exp, float32.

    On `threads` of `team`, which run `some`, the address of `choose_some`.
    """
    block = np.empty(7, np.int64)
    block[0], block[1], block[2], block[3], block[4] = 0, scores, token, log_sum_exp, rows
    block[5], block[6] = width, half
    dealt(team, some, block.ctypes.data, threads if rows > 1 else 1)
    # Memory whose address alone is in use is let go of.
    block[0] = 0


@part
def _turned(x, norm, eps, cos, sin, turn, out, width, half):
    """A head of a row, normalised if there is a weight and rotated if there is a table."""
    scale = splat(1.0)
    if norm:
        scale = splat(_inverse_rms(x, width, eps, half))
    middle = width // 2
    for start in range(0, middle, WIDTH):
        i = min(start, middle - WIDTH)
        j = i + middle
        first, second = read(x, i, half) * scale, read(x, j, half) * scale
        if norm:
            first, second = first * read(norm, i, half), second * read(norm, j, half)
        if cos:
            straight, across = first * read(cos + turn, i, False), second * read(cos + turn, j, False)
            across = fma(first, read(sin + turn, j, False), across)
            first, second = fma(second, read(sin + turn, i, False), straight), across
        write(out, i, finite(first, half), half)
        write(out, j, finite(second, half), half)


@kernel(
    "void(int64, int64, int64, float64, int64, int64, int64, int64, int64, int64, int64,"
    " int64, int64, int64, int64, int64, boolean)"
)
def rope_append(
    qkv, q_norm, k_norm, eps, cos, sin, page, offset, q, keys, values, rows, heads, kv_heads, width, slots, half
):
    """q and k normalised over each head and rotated; q to its own place, k and v to their pages.

    qkv [rows, heads + 2·kv_heads, width] → q [rows, heads, width]; keys, values [pages, kv_heads, slots, width]; cos,
    sin float32 [rows, width]; page, offset [rows], a page below 0 for a row that writes nothing.
    """
    size = 2 if half else 4
    for row in range(rows):
        source = qkv + row * (heads + 2 * kv_heads) * width * size
        turn = 4 * row * width
        for head in range(heads):
            target = q + (row * heads + head) * width * size
            _turned(source + head * width * size, q_norm, eps, cos, sin, turn, target, width, half)
        place = whole(page + 8 * row)
        if place < 0:
            continue
        for head in range(kv_heads):
            at = ((place * kv_heads + head) * slots + whole(offset + 8 * row)) * width * size
            source_k = source + (heads + head) * width * size
            _turned(source_k, k_norm, eps, cos, sin, turn, keys + at, width, half)
            for i in range(0, width, WIDTH):
                v = read(source_k + kv_heads * width * size, i, half)
                write(values + at, i, finite(v, half), half)
