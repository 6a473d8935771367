"""Speculative sampling of chains: every drafted token is judged at once, and the one after them drawn by all blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, noise
from .primitives import is_last, wait_for_producers
from .ranking import token_of, value_of
from .residual import DRAW_STREAM, best_of, best_of_blocks, warped
from .sampling_rule import sampling_rule
from .values import Verdict
from .warping import log, uniform

ACCEPT_STREAM: tl.constexpr = tl.constexpr(noise.ACCEPT_STREAM)


@triton.jit(
    do_not_specialize=["k", "drafts", "stride_node"],
    do_not_specialize_on_alignment=["draft_ptr", "count_ptr", "length_ptr"],
)
def _chain_kernel(
    scores_ptr,
    warping_ptr,
    best_ptr,
    draft_scores_ptr,
    draft_warping_ptr,
    draft_best_ptr,
    draft_ptr,
    count_ptr,
    length_ptr,
    temperature_ptr,
    seed_ptr,
    candidate_ptr,
    arrivals_ptr,
    accepted_ptr,
    token_ptr,
    next_length_ptr,
    path_ptr,
    stride_node,
    k,
    drafts,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Accept tokens x while u·q(x) ≤ p(x); token = argmax r/−ln u over r = max(p − q, 0) after a rejection, else p.

    scores [S, k + 1, V]; draft_scores [S, drafts, V] or None: q certain, as where q(x) = 0; warping, best as
    `_warping_kernel` gives them; draft int64 [S, k]; candidate int64 [S, 2, BLOCKS]: of r, then of p, which is drawn
    from where r is zero; arrivals int32 [S], zero before; path int64 [S, k + 1]; the rest [S].
    """
    pid_s = tl.program_id(0).to(tl.int64)
    pid_block = tl.program_id(1)
    offs_r = tl.arange(0, ROWS)
    start = pid_block * BLOCK
    ids = start + tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    count = tl.minimum(tl.load(count_ptr + pid_s), k)
    length = tl.load(length_ptr + pid_s)
    seed = tl.load(seed_ptr + pid_s)
    temperature = tl.load(temperature_ptr + pid_s)
    mask_r = offs_r < count
    x = tl.load(draft_ptr + pid_s * stride_node + offs_r, mask=mask_r, other=-1)
    row = pid_s * (k + 1) + offs_r
    p_x = _probabilities(scores_ptr, warping_ptr, best_ptr, temperature, row, x, mask_r, V)
    q_x = tl.zeros((ROWS,), tl.float32)
    if draft_scores_ptr is not None:
        row = pid_s * drafts + offs_r
        q_x = _probabilities(draft_scores_ptr, draft_warping_ptr, draft_best_ptr, temperature, row, x, mask_r, V)
    bound = tl.where(q_x > 0.0, q_x, 1.0)
    accept = mask_r & (_noise(seed, length + 1 + offs_r, offs_r) * bound <= p_x) & (p_x > 0.0)
    accepted = tl.min(tl.where(accept, ROWS, offs_r), axis=0).to(tl.int64)

    row = pid_s * (k + 1) + accepted
    p = warped(scores_ptr + row * V, warping_ptr + row * 3, tl.load(best_ptr + row), temperature, ids, ids < V)
    r = p
    if accepted < count:
        at = offs_r == accepted
        r = tl.where(ids == tl.sum(tl.where(at, x, 0), axis=0), 0.0, p)
        if draft_scores_ptr is not None and tl.sum(tl.where(at, q_x, 0.0), axis=0) > 0.0:
            row = pid_s * drafts + accepted
            best = tl.load(draft_best_ptr + row)
            q = warped(draft_scores_ptr + row * V, draft_warping_ptr + row * 3, best, temperature, ids, ids < V)
            r = tl.maximum(p - q, 0.0)
    race = p
    rest = r
    if tl.max(p, axis=0) > 0.0:
        cost = -log(uniform(seed, length + accepted + 1, start, BLOCK, DRAW_STREAM))
        race = p / cost
        rest = r / cost
    candidate_ptr += pid_s * 2 * BLOCKS
    tl.store(candidate_ptr + pid_block, best_of(rest, ids, V))
    tl.store(candidate_ptr + BLOCKS + pid_block, best_of(race, ids, V))
    if is_last(arrivals_ptr + pid_s, BLOCKS):
        first = best_of_blocks(candidate_ptr, BLOCKS)
        best = tl.where(value_of(first) > 0.0, first, best_of_blocks(candidate_ptr + BLOCKS, BLOCKS))
        token = tl.where(value_of(best) > 0.0, token_of(best), -1)
        tl.store(path_ptr + pid_s * (k + 1) + offs_r, tl.minimum(offs_r, accepted), mask=offs_r <= k)
        tl.store(accepted_ptr + pid_s, accepted)
        tl.store(token_ptr + pid_s, token)
        tl.store(next_length_ptr + pid_s, length + accepted + 1)


@triton.jit
def _probabilities(scores_ptr, warping_ptr, best_ptr, temperature, row, x, mask, V: tl.constexpr):
    """The probability of the id x [N] in the warped row of scores of the same place in `row` [N]."""
    best = tl.load(best_ptr + row, mask=mask, other=-1)
    score = tl.load(scores_ptr + row * V + x, mask=mask, other=float("-inf")).to(tl.float32)
    highest = tl.load(warping_ptr + row * 3, mask=mask, other=0.0)
    threshold = tl.load(warping_ptr + row * 3 + 1, mask=mask, other=0.0)
    mass = tl.load(warping_ptr + row * 3 + 2, mask=mask, other=1.0)
    p = tl.where(score >= threshold, tl.exp((score - highest) / temperature) / mass, 0.0)
    return tl.where(best >= 0, (x == best).to(tl.float32), p)


@triton.jit
def _noise(seed, position, ids):
    """`noise.uniform` of each id [N] at its own position [N], in the stream of acceptance."""
    zero = tl.zeros_like(ids)
    w0, w1, w2, w3 = tl.philox(seed, ids // 4, position.to(tl.int32), zero, zero + ACCEPT_STREAM)
    bits = tl.where(ids % 4 < 2, tl.where(ids % 4 == 0, w0, w1), tl.where(ids % 4 == 2, w2, w3))
    return ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


def verify_chain(
    target: tuple[Tensor, Tensor, Tensor],
    drafter: tuple[Tensor, Tensor, Tensor] | None,
    draft: Tensor,
    count: Tensor,
    length: Tensor,
    temperature: Tensor,
    seed: Tensor,
    arrivals: Tensor,
    verdict: Verdict,
) -> None:
    """Write the verdict about a draft [S, k]. target, drafter: scores [S, n, V] with their warping and best tokens."""
    sequences, k = draft.shape
    scores = target[0]
    rule = sampling_rule(scores.shape[2])
    candidates = torch.empty((sequences, 2, rule.blocks), dtype=torch.int64, device=scores.device)
    _chain_kernel[(sequences, rule.blocks)](
        *target,
        *(drafter or (None, None, None)),
        draft,
        count,
        length,
        temperature,
        seed,
        candidates,
        arrivals,
        verdict.accepted,
        verdict.token,
        verdict.length,
        verdict.path,
        draft.stride(0),
        k,
        drafter[0].shape[1] if drafter else 0,
        V=scores.shape[2],
        BLOCK=rule.block,
        BLOCKS=rule.blocks,
        ROWS=max(16, 1 << k.bit_length()),
        **launch.options(max(1, rule.block // 256)),
    )
