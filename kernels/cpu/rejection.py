"""Speculative sampling on a CPU: `reference.verify.verify_rejection`, one sequence after the other, each by itself."""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..noise import ACCEPT_STREAM, DRAW_STREAM
from ..reference import verify as reference_verify
from ..values import Verdict
from . import openmp
from .lanes import (
    WIDTH,
    exp,
    greater,
    greatest,
    kernel,
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
from .sample import IDS, limited, uniforms
from .small_ops import NEVER, first_of
from .team import dealt, taken, worker

_FIELDS = 21
# `exp` gives nothing smaller than that of this, which must not pass for a probability: what is less likely has none.
_LEAST = np.float32(-87.0)
_HALF = {torch.float32: False, torch.bfloat16: True}


@part
def _clear(x, width):
    for i in range(0, width, WIDTH):
        write(x, i, splat(0.0), False)


@part
def _divided(x, width, mass):
    for i in range(0, width, WIDTH):
        write(x, i, read(x, i, False) / splat(mass), False)


@part
def _probability(scores, half, rule, p, z, width):
    """softmax of the warped row to p, one-hot at its first greatest at temperature 0; z has room for a row.

    Nothing where there is nothing to draw, as `reference.verify.sample` says.
    """
    temperature, top_k, top_p, min_p = rule
    peaks = splat(NEVER)
    for i in range(0, width, WIDTH):
        peaks = greater(read(scores, i, half), peaks)
    peak = greatest(peaks)
    if peak == NEVER or (temperature > 0 and peak == -NEVER):
        _clear(p, width)
        return
    if temperature <= 0:
        _clear(p, width)
        put_number(p + 4 * first_of(scores, peak, width, half), np.float32(1.0))
        return
    for i in range(0, width, WIDTH):
        x = (greater(read(scores, i, half), splat(NEVER)) - splat(peak)) / splat(temperature)
        write(z, i, x, False)
        write(p, i, exp(x), False)
    bound, mass = splat(max(limited(z, p, width, top_k, top_p, min_p, NEVER), _LEAST)), splat(0.0)
    for i in range(0, width, WIDTH):
        weight = over(bound, read(z, i, False), splat(0.0), read(p, i, False))
        mass = mass + weight
        write(p, i, weight, False)
    _divided(p, width, total(mass))


@part
def _rejected(p, q, x, given, width):
    """p ← norm(max(p − proposal, 0)), where that leaves something, and q ← norm(q without x)."""
    residual, rest = splat(0.0), splat(0.0)
    here = number(p + 4 * x)
    if given:
        for i in range(0, width, WIDTH):
            residual = residual + greater(read(p, i, False) - read(q, i, False), splat(0.0))
        left = total(residual)
        if left > 0:
            for i in range(0, width, WIDTH):
                write(p, i, greater(read(p, i, False) - read(q, i, False), splat(0.0)) / splat(left), False)
    else:
        put_number(p + 4 * x, np.float32(0.0))
        for i in range(0, width, WIDTH):
            residual = residual + read(p, i, False)
        left = total(residual)
        if left > 0:
            _divided(p, width, left)
        else:
            put_number(p + 4 * x, here)
    put_number(q + 4 * x, np.float32(0.0))
    for i in range(0, width, WIDTH):
        rest = rest + read(q, i, False)
    if total(rest) > 0:
        _divided(q, width, total(rest))


@part
def _noise(seed, position, stream, i, room):
    """`noise.uniform` of id i; room has place for IDS numbers."""
    found = uniforms(seed, position, stream, i // IDS * IDS)
    for n, vector in enumerate(found):
        write(room, WIDTH * n, vector, False)
    return number(room + 4 * (i % IDS))


@part
def _drawn(p, sums, seed, position, width):
    """The place of the first greatest p ÷ exponential noise, −1 if p is 0; p, sums have room for IDS more numbers."""
    peaks = splat(NEVER)
    for i in range(0, width, IDS):
        for n, u in enumerate(uniforms(seed, position, DRAW_STREAM, i)):
            at = i + WIDTH * n
            if at < width:
                race = read(p, at, False) / (splat(0.0) - log(u))
                peaks = greater(race, peaks)
                write(sums, at, race, False)
    peak = greatest(peaks)
    return first_of(sums, peak, width, False) if peak > 0 else -1


@worker
def judge_some(address):
    """Sequences as long as some are left; block[0] counts those taken, and `judge` says what the rest is."""
    block = carray(address, _FIELDS)
    scores, draft, proposals, count, length = block[1], block[2], block[3], block[4], block[5]
    temperature, top_k, top_p, min_p, seed = block[6], block[7], block[8], block[9], block[10]
    parent, drawn, accepted, path = block[11], block[12], block[13], block[14]
    sequences, k, width, rows = block[15], block[16], block[17], block[18]
    half, own_half = block[19] != 0, block[20] != 0
    apart, own_apart = width * (2 if half else 4), width * (2 if own_half else 4)
    memory = np.empty((4, width + IDS), np.float32)
    p, q, z, sums = memory[0].ctypes.data, memory[1].ctypes.data, memory[2].ctypes.data, memory[3].ctypes.data
    s = taken(block.ctypes.data)
    while s < sequences:
        rule = (
            number(temperature + 4 * s), whole(top_k + 8 * s), number(top_p + 4 * s), number(min_p + 4 * s),
        )  # fmt: skip
        row, depth, moved, many, cached = 0, 0, True, whole(count + 8 * s), whole(length + 8 * s)
        put_whole(path + 8 * s * (k + 1), 0)
        for j in range(k + 1):
            if moved:
                _probability(scores + (s * (k + 1) + row) * apart, half, rule, p, z, width)
                if proposals and row < k:
                    known = min(whole(drawn + 8 * (s * (k + 1) + row)), rows - 1) if drawn else row
                    at = proposals + (s * rows + known) * own_apart
                    _probability(at, own_half, rule, q, z, width)
                else:
                    _clear(q, width)
                moved = False
            if j == k or j >= many or whole(parent + 8 * (s * k + j)) != row:
                continue
            x = whole(draft + 8 * (s * k + j))
            p_x, q_x = number(p + 4 * x), number(q + 4 * x)
            given = q_x > 0
            u = _noise(whole(seed + 8 * s), cached + depth + 1, ACCEPT_STREAM, j, sums)
            if u * (q_x if given else np.float32(1.0)) <= p_x and p_x > 0:
                row, depth, moved = j + 1, depth + 1, True
                put_whole(path + 8 * (s * (k + 1) + depth), row)
            else:
                _rejected(p, q, x, given, width)
        for d in range(depth + 1, k + 1):
            put_whole(path + 8 * (s * (k + 1) + d), row)
        put_whole(accepted + 8 * s, depth)
        token = _drawn(p, sums, whole(seed + 8 * s), cached + depth + 1, width)
        put_whole(accepted + 8 * (sequences + s), token)
        put_whole(accepted + 8 * (2 * sequences + s), cached + depth + 1)
        s = taken(block.ctypes.data)
    # Memory whose address alone is in use is let go of.
    memory[0, 0] = 0


@kernel("void(int64, int64, int64, int64, int64)")
def judge(block, sequences, threads, team, some):
    """`verify_rejection` of what the int64 of a block describe, by `judge_some`, whose address `some` is.

    After a counter the addresses of its tensors, 0 for those it lacks, of accepted [3, S], with token and length, and
    of path; then S, k, V, the rows of draft_scores, and which scores are bfloat16.
    """
    dealt(team, some, block, threads if sequences > 1 else 1)


def verify_rejection(
    scores: Tensor,
    draft: Tensor,
    draft_scores: Tensor | None,
    count: Tensor,
    length: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    *,
    parent: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Verdict:
    """As `reference.verify.verify_rejection`."""
    sequences, rows, width = scores.shape
    proposals = scores if draft_scores is None else draft_scores
    if width % WIDTH or not {scores.dtype, proposals.dtype} <= set(_HALF):
        return reference_verify.verify_rejection(
            scores, draft, draft_scores, count, length, temperature, top_k, top_p, min_p, seed,
            parent=parent, drawn=drawn,
        )  # fmt: skip
    k = rows - 1
    if parent is None:
        parent = torch.arange(k).expand(sequences, k)
    given = [
        None if tensor is None else tensor.contiguous()
        for tensor in (
            scores, draft, draft_scores, count, length, temperature, top_k, top_p, min_p, seed, parent, drawn,
        )
    ]  # fmt: skip
    found = torch.empty((3, sequences), dtype=torch.int64, device=scores.device)
    path = torch.empty((sequences, rows), dtype=torch.int64, device=scores.device)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*given, found, path)]
    sizes = sequences, k, width, proposals.shape[1]
    halves = _HALF[scores.dtype], _HALF[proposals.dtype]
    block = np.array([0, *addresses, *sizes, *halves], np.int64)
    judge(block.ctypes.data, sequences, torch.get_num_threads(), openmp.team(), judge_some.address)
    accepted, token, lengths = found
    return Verdict(accepted, token, lengths, path)
