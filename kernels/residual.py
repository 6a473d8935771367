"""Triton functions of speculative sampling: probabilities of warped rows, and what is left of them.

A row's p or q is `rest`/`total` once something was taken from it, which a positive total says, and softmax of the
warped row of scores before.
"""

import triton
import triton.language as tl

from .warping import log, lowest_of_best, uniform

DRAW_STREAM: tl.constexpr = tl.constexpr(2)


@triton.jit
def probability(
    row_ptr,
    warping_ptr,
    best,
    temperature,
    rest_ptr,
    total,
    offs,
    mask,
):
    """Probabilities of the ids at offs: rest/total where total is positive, else of the warped row of scores."""
    if total > 0.0:
        p = tl.load(rest_ptr + offs, mask=mask, other=0.0) / total
    elif best >= 0:
        p = tl.where(mask & (offs == best), 1.0, 0.0)
    else:
        x = tl.load(row_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - tl.load(warping_ptr)) / temperature) / tl.load(warping_ptr + 2)
        p = tl.where(x >= tl.load(warping_ptr + 1), weight, 0.0)
    return p


@triton.jit
def place_of(
    ids_ptr,
    x,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where x is among the ids [V], −1 if it is not; x itself where there are none."""
    if ids_ptr is not None:
        offs = tl.arange(0, BLOCK)
        found = tl.full((BLOCK,), -1, tl.int32)
        for start in range(0, V, BLOCK):
            ids = tl.load(ids_ptr + start + offs, mask=start + offs < V, other=-1)
            found = tl.where(ids == x, start + offs, found)
        place = tl.max(found, axis=0)
    else:
        place = x.to(tl.int32)
    return place


@triton.jit
def keep(
    row_ptr,
    warping_ptr,
    best,
    temperature,
    rest_ptr,
    total,
    new_ptr,
    gone,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """new = p without the id `gone`, [V]."""
    offs = tl.arange(0, BLOCK)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        ids = start + offs
        p = probability(row_ptr, warping_ptr, best, temperature, rest_ptr, total, ids, ids < V)
        tl.store(new_ptr + ids, tl.where(ids == gone, 0.0, p), mask=ids < V)
    tl.debug_barrier()


@triton.jit
def take(
    row_ptr,
    warping_ptr,
    best,
    temperature,
    others_ptr,
    total,
    new_ptr,
    ids_ptr,
    place,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """new = max(new − q, 0) at the ids [V] of q; others = q without the id at `place`, whose sum is returned."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        places = start + offs
        mask = places < V
        q = probability(row_ptr, warping_ptr, best, temperature, others_ptr, total, places, mask)
        rest = tl.where(places == place, 0.0, q)
        acc += rest
        tl.store(others_ptr + places, rest, mask=mask)
        ids = places.to(tl.int64)
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + places, mask=mask, other=0)
        p = tl.load(new_ptr + ids, mask=mask, other=0.0)
        tl.store(new_ptr + ids, tl.maximum(p - q, 0.0), mask=mask)
    tl.debug_barrier()
    return tl.sum(acc, axis=0)


@triton.jit
def total_of(
    p_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ p [V]."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        acc += tl.load(p_ptr + start + offs, mask=start + offs < V, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def draw(
    row_ptr,
    warping_ptr,
    best,
    temperature,
    rest_ptr,
    total,
    seed,
    position,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """argmax p/−ln u [V]: a draw from p, which need not be normalised."""
    offs = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -1.0, tl.float32)
    tokens = offs
    for start in range(0, V, BLOCK):
        ids = start + offs
        p = probability(row_ptr, warping_ptr, best, temperature, rest_ptr, total, ids, ids < V)
        race = p / -log(uniform(seed, position, start, BLOCK, DRAW_STREAM))
        tokens = tl.where(race > highest, ids, tokens)
        highest = tl.maximum(highest, race)
    return lowest_of_best(highest, tokens)
