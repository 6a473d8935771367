"""Triton functions of speculative sampling: probabilities of warped rows, and what is left of them.

A row's p or q is `rest`/`total` once something was taken from it, which a positive total says, and softmax of the
warped row of scores before.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, noise
from .primitives import is_last, wait_for_producers
from .ranking import NONE, candidate, token_of, value_of
from .sampling_rule import sampling_rule
from .values import Verdict
from .warping import log, uniform

DRAW_STREAM: tl.constexpr = tl.constexpr(noise.DRAW_STREAM)


class Left(NamedTuple):
    """What the walk down a draft leaves to draw from: p of `row` int64 [S], or residual[s, side]/total if total > 0."""

    row: Tensor
    side: Tensor
    total: Tensor

    @staticmethod
    def empty(sequences: int, device: torch.device) -> "Left":
        kinds = (torch.int64, torch.int32, torch.float32)
        return Left(*(torch.empty((sequences,), dtype=kind, device=device) for kind in kinds))


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
    else:
        p = warped(row_ptr, warping_ptr, best, temperature, offs, mask)
    return p


@triton.jit
def warped(row_ptr, warping_ptr, best, temperature, offs, mask):
    """Probabilities of the ids at offs in a warped row of scores, whose one possible id is `best` unless that is −1."""
    if best >= 0:
        p = tl.where(mask & (offs == best), 1.0, 0.0)
    else:
        x = tl.load(row_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - tl.load(warping_ptr)) / temperature) / tl.load(warping_ptr + 2)
        p = tl.where(x >= tl.load(warping_ptr + 1), weight, 0.0)
    return p


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
    """new = p without the id `gone`, [V]; returns its sum."""
    offs = tl.arange(0, BLOCK)
    left = tl.zeros((BLOCK,), tl.float32)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        ids = start + offs
        p = probability(row_ptr, warping_ptr, best, temperature, rest_ptr, total, ids, ids < V)
        p = tl.where(ids == gone, 0.0, p)
        tl.store(new_ptr + ids, p, mask=ids < V)
        left += p
    tl.debug_barrier()
    return tl.sum(left, axis=0)


@triton.jit
def subtract(
    p_row_ptr,
    p_warping_ptr,
    p_best,
    q_row_ptr,
    q_warping_ptr,
    q_best,
    temperature,
    old_ptr,
    p_total,
    others_ptr,
    q_total,
    new_ptr,
    gone,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """new = max(p − q, 0) [V]; others = q without the id `gone`. Returns the sums of both."""
    offs = tl.arange(0, BLOCK)
    left = tl.zeros((BLOCK,), tl.float32)
    rest = tl.zeros((BLOCK,), tl.float32)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        ids = start + offs
        mask = ids < V
        p = probability(p_row_ptr, p_warping_ptr, p_best, temperature, old_ptr, p_total, ids, mask)
        q = probability(q_row_ptr, q_warping_ptr, q_best, temperature, others_ptr, q_total, ids, mask)
        p = tl.maximum(p - q, 0.0)
        q = tl.where(ids == gone, 0.0, q)
        tl.store(new_ptr + ids, p, mask=mask)
        tl.store(others_ptr + ids, q, mask=mask)
        left += p
        rest += q
    tl.debug_barrier()
    return tl.sum(left, axis=0), tl.sum(rest, axis=0)


@triton.jit(do_not_specialize=["rows"])
def _draw_kernel(
    scores_ptr,
    warping_ptr,
    best_ptr,
    temperature_ptr,
    residual_ptr,
    seed_ptr,
    length_ptr,
    row_ptr,
    side_ptr,
    total_ptr,
    candidate_ptr,
    arrivals_ptr,
    token_ptr,
    rows,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """token = argmax p/−ln u [V]: a draw from p, which need not be normalised; the last of BLOCKS programs tells it.

    p is that of row `row` of a sequence's scores [S, rows, V], or residual[s, side]/total where total is positive; u of
    position `length`. candidate int64 [S, BLOCKS]; arrivals int32 [S], zero before; the rest [S].
    """
    pid_s = tl.program_id(0).to(tl.int64)
    pid_block = tl.program_id(1)
    start = pid_block * BLOCK
    ids = start + tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    row = pid_s * rows + tl.load(row_ptr + pid_s)
    p = probability(
        scores_ptr + row * V,
        warping_ptr + row * 3,
        tl.load(best_ptr + row),
        tl.load(temperature_ptr + pid_s),
        residual_ptr + (2 * pid_s + tl.load(side_ptr + pid_s)) * V,
        tl.load(total_ptr + pid_s),
        ids,
        ids < V,
    )
    race = p
    if tl.max(p, axis=0) > 0.0:
        race = p / -log(uniform(tl.load(seed_ptr + pid_s), tl.load(length_ptr + pid_s), start, BLOCK, DRAW_STREAM))
    candidate_ptr += pid_s * BLOCKS
    tl.store(candidate_ptr + pid_block, best_of(race, ids, V))
    if is_last(arrivals_ptr + pid_s, BLOCKS):
        best = best_of_blocks(candidate_ptr, BLOCKS)
        tl.store(token_ptr + pid_s, tl.where(value_of(best) > 0.0, token_of(best), -1))


@triton.jit
def best_of(race, ids, V: tl.constexpr):
    """The `candidate` of the highest race [BLOCK] among the ids below V."""
    return tl.max(tl.where(ids < V, candidate(race, ids), NONE), axis=0)


@triton.jit
def best_of_blocks(candidate_ptr, BLOCKS: tl.constexpr):
    """The highest candidate of all blocks, which other programs have stored."""
    offs_b = tl.arange(0, triton.next_power_of_2(BLOCKS))
    return tl.max(tl.load(candidate_ptr + offs_b, mask=offs_b < BLOCKS, other=NONE, cache_modifier=".cg"), axis=0)


def draw(
    scores: Tensor,
    warping: Tensor,
    best: Tensor,
    temperature: Tensor,
    residual: Tensor,
    seed: Tensor,
    verdict: Verdict,
    left: Left,
    arrivals: Tensor,
) -> None:
    """Write verdict.token: a draw from what the walk has `left` of each sequence's p, at position verdict.length.

    arrivals int32 [S]: zero.
    """
    sequences, rows, size = scores.shape
    rule = sampling_rule(size)
    candidates = torch.empty((sequences, rule.blocks), dtype=torch.int64, device=scores.device)
    _draw_kernel[(sequences, rule.blocks)](
        scores,
        warping,
        best,
        temperature,
        residual,
        seed,
        verdict.length,
        *left,
        candidates,
        arrivals,
        verdict.token,
        rows,
        V=size,
        BLOCK=rule.block,
        BLOCKS=rule.blocks,
        **launch.options(max(1, rule.block // 256)),
    )
