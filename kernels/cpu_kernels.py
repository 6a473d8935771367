"""The small operations between the products of a pass, for a CPU: one row after the other, each by itself."""

import math

import numpy as np
from numba import carray

from .lanes import (
    WIDTH,
    alone,
    exp,
    fma,
    greater,
    greatest,
    kernel,
    lane,
    number,
    part,
    put_number,
    put_whole,
    read,
    splat,
    taken,
    together,
    total,
    whole,
    worker,
    write,
)

_WORTH_A_TEAM = 2048


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


@kernel("void(int64, int64, int64, int64, boolean)")
def silu_gate(x, out, rows, width, half):
    """out = silu(gate)·up: x [rows, 2·width], gate before up → [rows, width]."""
    size = 2 if half else 4
    for row in range(rows):
        source, target = x + row * 2 * width * size, out + row * width * size
        for i in range(0, width, WIDTH):
            gate = read(source, i, half)
            gate = gate / (splat(1.0) + exp(splat(0.0) - gate))
            write(target, i, gate * read(source, width + i, half), half)


@kernel("void(int64, int64, int64, int64, int64, boolean)")
def choose(scores, token, log_sum_exp, rows, width, half):
    """The first greatest of each row of scores [rows, width], int64, and log Σ exp of the row, float32."""
    for row in range(rows):
        source = scores + row * width * (2 if half else 4)
        peaks, masses = read(source, 0, half), splat(0.0)
        for i in range(WIDTH, width, WIDTH):
            peaks = greater(read(source, i, half), peaks)
        peak = greatest(peaks)
        for i in range(0, width, WIDTH):
            masses = masses + exp(read(source, i, half) - splat(peak))
        first, i = width, 0
        while i < width and first == width:
            x = read(source, i, half)
            if greatest(x) == peak:
                for j in range(WIDTH - 1, -1, -1):
                    first = i + j if lane(x, j) == peak else first
            i += WIDTH
        put_whole(token + 8 * row, first % width)
        put_number(log_sum_exp + 4 * row, np.float32(peak + np.float32(math.log(total(masses)))))


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
        write(out, i, first, half)
        write(out, j, second, half)


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
                write(values + at, i, read(source_k + kv_heads * width * size, i, half), half)


@part
def _find(places, first, end, row, owner, table, pages, length, slot, depth, kv_heads, slots, width):
    """Where the keys of positions from `first` to `end` - 1 lie in [pages, kv_heads, slots, width], in elements."""
    for page in range(first // slots, (end - 1) // slots + 1):
        start = page * slots
        base = whole(table + 8 * (owner * pages + page)) * kv_heads * slots - start
        for position in range(max(first, start), min(end, start + slots)):
            places[position - first] = (base + position) * width
    if length:
        root = whole(length + 8 * row)
        for position in range(max(first, root), end):
            at = whole(slot + 8 * (row * depth + position - root))
            base = whole(table + 8 * (owner * pages + at // slots)) * kv_heads * slots
            places[position - first] = (base + at % slots) * width


@part
def _score(query, keys, places, scale, slope, scores, count, width, half):
    """scale·q·k + slope·distance of a query float32 [width] and `count` keys."""
    size = 2 if half else 4
    for i in range(count):
        key, products = keys + whole(places + 8 * i) * size, splat(0.0)
        for j in range(0, width, WIDTH):
            products = fma(read(query, j, False), read(key, j, half), products)
        distance = np.float32(i + 1 - count)
        scores[i] = total(products) * np.float32(scale) + slope * distance


@part
def _softmax(scores, count):
    """exp(scores − their greatest), zero from `count` on, in place; the inverse of their sum. A multiple of lanes."""
    at = scores.ctypes.data
    scores[count:] = -np.inf
    peak = read(at, 0, False)
    for i in range(WIDTH, len(scores), WIDTH):
        peak = greater(read(at, i, False), peak)
    peak = splat(greatest(peak))
    for i in range(0, len(scores), WIDTH):
        write(at, i, exp(read(at, i, False) - peak), False)
    scores[count:] = 0
    mass = splat(0.0)
    for i in range(0, len(scores), WIDTH):
        mass = mass + read(at, i, False)
    return np.float32(1.0) / total(mass)


@part
def _mix(weights, values, places, share, out, count, width, half):
    """share·Σ weight·value of `count` values in order; four vectors at a time, each a sum of its own."""
    size, j = 2 if half else 4, 0
    while j + 4 * WIDTH <= width:
        first, second, third, fourth = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        for i in range(count):
            weight, value = splat(weights[i]), values + (whole(places + 8 * i) + j) * size
            first = fma(weight, read(value, 0, half), first)
            second = fma(weight, read(value, WIDTH, half), second)
            third = fma(weight, read(value, 2 * WIDTH, half), third)
            fourth = fma(weight, read(value, 3 * WIDTH, half), fourth)
        write(out, j, first * splat(share), half)
        write(out, j + WIDTH, second * splat(share), half)
        write(out, j + 2 * WIDTH, third * splat(share), half)
        write(out, j + 3 * WIDTH, fourth * splat(share), half)
        j += 4 * WIDTH
    for rest in range(j, width, WIDTH):
        mixed = splat(0.0)
        for i in range(count):
            mixed = fma(splat(weights[i]), read(values + whole(places + 8 * i) * size, rest, half), mixed)
        write(out, rest, mixed * splat(share), half)


@part
def _keep(arrays):
    """numba frees an array after its last use by name, even if its address is used later."""
    return len(arrays)


@worker
def attend_some(address):
    """Heads of rows as long as some are left; block[0] counts those taken, and `attend` says what the rest is."""
    block = carray(address, 16)
    q, keys, values, out, places, counts = block[1], block[2], block[3], block[4], block[5], block[6]
    longest, slopes, rows, heads, kv_heads = block[7], block[8], block[9], block[10], block[11]
    width, slots, half, scale = block[12], block[13], block[14] != 0, block[15:].view(np.float64)[0]
    size, query, scores = 2 if half else 4, np.empty(width, np.float32), np.empty(longest, np.float32)
    task = taken(block.ctypes.data)
    while task < rows * heads:
        row, head = task // heads, task % heads
        target, count, found = out + task * width * size, whole(counts + 8 * row), places + 8 * row * longest
        for i in range(0, width, WIDTH):
            write(query.ctypes.data, i, read(q + task * width * size, i, half), False)
            write(target, i, splat(0.0), half)
        if count:
            own = head // (heads // kv_heads) * slots * width * size
            slope = number(slopes + 4 * head) if slopes else np.float32(0.0)
            seen = scores[: (count + WIDTH - 1) // WIDTH * WIDTH]
            _score(query.ctypes.data, keys + own, found, scale, slope, seen, count, width, half)
            share = _softmax(seen, count)
            _mix(seen, values + own, found, share, target, count, width, half)
        task = taken(block.ctypes.data)
    _keep((query, scores))


@kernel(
    "void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64,"
    " int64, int64, int64, int64, int64, int64, float64, boolean, int64, int64, int64)"
)
def attend(
    q, keys, values, out, sequence, position, table, pages, length, slot, depth, slopes,
    rows, heads, kv_heads, width, slots, window, scale, half, threads, entry, some,
):  # fmt: skip
    """softmax(scale·q·kᵀ + slope·(key position − position))·v over the positions a row sees, in order.

    q [rows, heads, width] → out [rows, heads·width], zeros for rows of no sequence; keys, values [pages, kv_heads,
    slots, width]; sequence, position [rows]; table [sequences, pages]; of a tree length [rows], slot [rows, depth];
    slopes float32 [heads]; window 0 for none. With an `entry` (`team.entry`) that many threads run `some`, the address
    of `attend_some`, where there is enough for them to do.
    """
    counts, longest, seen = np.zeros(rows, np.int64), 0, 0
    for row in range(rows):
        if whole(sequence + 8 * row) >= 0:
            count = whole(position + 8 * row) + 1
            counts[row] = min(count, window) if window else count
            longest, seen = max(longest, counts[row]), seen + counts[row]
    longest = (longest + WIDTH - 1) // WIDTH * WIDTH
    places = np.empty((rows, longest), np.int64)
    for row in range(rows):
        if counts[row]:
            owner, end = whole(sequence + 8 * row), whole(position + 8 * row) + 1
            first = end - counts[row]
            _find(places[row], first, end, row, owner, table, pages, length, slot, depth, kv_heads, slots, width)
    block = np.empty(16, np.int64)
    block[0], block[1], block[2], block[3], block[4] = 0, q, keys, values, out
    block[5], block[6], block[7], block[8] = places.ctypes.data, counts.ctypes.data, longest, slopes
    block[9], block[10], block[11], block[12], block[13] = rows, heads, kv_heads, width, slots
    block[14], block[15:].view(np.float64)[0] = half, scale
    if entry and threads > 1 and seen * heads >= _WORTH_A_TEAM:
        together(entry, some, block.ctypes.data, threads)
    else:
        alone(some, block.ctypes.data)
    _keep((counts, places, block))
