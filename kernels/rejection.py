"""Speculative sampling on the device: drafts accepted and rejected by probability."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .chains import ACCEPT_STREAM, verify_chain
from .primitives import wait_for_producers
from .probabilities import warping_of
from .residual import Left, draw, keep, probability, subtract
from .values import Verdict
from .warping import uniform


@triton.jit(
    do_not_specialize=["k", "drafts", "stride_node", "stride_parent", "stride_drawn"],
    do_not_specialize_on_alignment=["draft_ptr", "parent_ptr", "drawn_ptr", "count_ptr", "length_ptr"],
)
def _rejection_kernel(  # noqa: PLR0915
    scores_ptr,
    warping_ptr,
    best_ptr,
    draft_scores_ptr,
    draft_warping_ptr,
    draft_best_ptr,
    draft_ptr,
    parent_ptr,
    drawn_ptr,
    count_ptr,
    length_ptr,
    temperature_ptr,
    seed_ptr,
    residual_ptr,
    others_ptr,
    accepted_ptr,
    next_length_ptr,
    path_ptr,
    left_row_ptr,
    left_side_ptr,
    left_total_ptr,
    stride_node,
    stride_parent,
    stride_drawn,
    k,
    drafts,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """From row 0: accept child x if u·q(x) ≤ p(x), or p ← norm(max(p − q, 0)), q ← norm(q without x).

    scores [S, k + 1, V]; draft_scores [S, drafts, V] or None: q certain; warping, best as `_warping_kernel` gives them;
    draft, parent int64 [S, k]; drawn int64 [S, k + 1] or None; residual float32 [S, 2, V]: p in turn, read from one and
    written to the other; others float32 [S, V]: q; path int64 [S, k + 1]; left as in `Left`; the rest [S].
    """
    pid_s = tl.program_id(0).to(tl.int64)
    residual_ptr += pid_s * 2 * V
    others_ptr += pid_s * V
    wait_for_producers(PDL)
    count = tl.minimum(tl.load(count_ptr + pid_s), k)
    length = tl.load(length_ptr + pid_s)
    seed = tl.load(seed_ptr + pid_s)
    temperature = tl.load(temperature_ptr + pid_s)

    row = tl.zeros((), tl.int64)
    accepted = tl.zeros((), tl.int64)
    side = tl.zeros((), tl.int32)
    p_total = tl.zeros((), tl.float32)
    q_total = tl.zeros((), tl.float32)
    tl.store(path_ptr + pid_s * (k + 1), row)
    for j in range(ROWS):
        parent = tl.zeros((), tl.int64) + j
        if parent_ptr is not None:
            parent = tl.load(parent_ptr + pid_s * stride_parent + j, mask=j < count, other=-1)
        if (j < count) & (parent == row):
            x = tl.load(draft_ptr + pid_s * stride_node + j)
            p_row_ptr = scores_ptr + (pid_s * (k + 1) + row) * V
            p_warping_ptr = warping_ptr + (pid_s * (k + 1) + row) * 3
            p_best = tl.load(best_ptr + pid_s * (k + 1) + row)
            old_ptr = residual_ptr + side * V
            p_x = probability(p_row_ptr, p_warping_ptr, p_best, temperature, old_ptr, p_total, x, x >= 0)
            q_x = tl.zeros((), tl.float32)
            if draft_scores_ptr is not None:
                q_row = pid_s * drafts + row
                if drawn_ptr is not None:
                    q_row = pid_s * drafts + tl.load(drawn_ptr + pid_s * stride_drawn + row)
                q_row_ptr = draft_scores_ptr + q_row * V
                q_warping_ptr = draft_warping_ptr + q_row * 3
                q_best = tl.load(draft_best_ptr + q_row)
                q_x = probability(q_row_ptr, q_warping_ptr, q_best, temperature, others_ptr, q_total, x, x >= 0)
            bound = tl.where(q_x > 0.0, q_x, 1.0)
            noise = uniform(seed, length + accepted + 1, j // 16 * 16, 16, ACCEPT_STREAM)
            u = tl.sum(tl.where(tl.arange(0, 16) == j % 16, noise, 0.0), axis=0)
            if (u * bound <= p_x) & (p_x > 0.0):
                accepted += 1
                row = tl.zeros((), tl.int64) + j + 1
                p_total = tl.zeros((), tl.float32)
                q_total = tl.zeros((), tl.float32)
                tl.store(path_ptr + pid_s * (k + 1) + accepted, row)
            else:
                new_ptr = residual_ptr + (1 - side) * V
                total = tl.zeros((), tl.float32)
                if draft_scores_ptr is not None and q_x > 0.0:
                    total, rest = subtract(
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
                        x,
                        V,
                        BLOCK,
                    )
                    # Even with nothing left q is what is in others_ptr.
                    q_total = tl.where(rest > 0.0, rest, 1.0)
                else:
                    total = keep(p_row_ptr, p_warping_ptr, p_best, temperature, old_ptr, p_total, new_ptr, x, V, BLOCK)
                p_total = tl.where(total > 0.0, total, p_total)
                side = tl.where(total > 0.0, 1 - side, side)

    tl.store(left_row_ptr + pid_s, row)
    tl.store(left_side_ptr + pid_s, side)
    tl.store(left_total_ptr + pid_s, p_total)
    offs_r = tl.arange(0, ROWS)
    last = tl.zeros((ROWS,), tl.int64) + row
    tl.store(path_ptr + pid_s * (k + 1) + offs_r, last, mask=(offs_r > accepted) & (offs_r <= k))
    tl.store(accepted_ptr + pid_s, accepted)
    tl.store(next_length_ptr + pid_s, length + accepted + 1)


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
    """Speculative sampling (Leviathan et al., arXiv 2211.17192), over siblings by recursive rejection.

    scores [S, k + 1, V] of the target; draft_scores [S, n, V] of the drafter, −∞ outside a reduced vocabulary: the
    children of row i were drawn with those of drawn[i], int64 [S, k + 1], or of i without it, and without replacement;
    None: every draft token was certain. temperature, top_k, top_p, min_p, seed [S] as in `sample`, for both p and q;
    draft, count, length, parent as in `verify`.

    From row 0: a child x is accepted with probability min(1, p(x)/q(x)), which moves on to its row; a rejected one
    leaves p ← norm(max(p − q, 0)) and q ← q without x, renormalised. The token after the last accepted row is drawn
    from p as it is left. A token that q cannot give counts as certain; a residual that rounds to zero leaves p.
    """
    sequences, k = draft.shape
    draft_scores = draft_scores if k else None
    scores, draft = scores.contiguous(), launch.rows_of(draft)
    parent, drawn = (None if each is None else launch.rows_of(each) for each in (parent, drawn))
    size = scores.shape[2]
    rule = launch.vocabulary_rule(size)
    rules = [field.contiguous() for field in (temperature, top_k, top_p, min_p)]
    arrivals = torch.empty((sequences,), dtype=torch.int32, device=scores.device)
    warping, best = warping_of(scores, rules, arrivals)
    draft_warping, draft_best = None, None
    if draft_scores is not None:
        draft_scores = draft_scores.contiguous()
        draft_warping, draft_best = warping_of(draft_scores, rules, arrivals)
    count, length, seed = count.contiguous(), length.contiguous(), seed.contiguous()
    verdict = empty_verdict(draft)
    if parent is None and drawn is None:
        drafter = None if draft_scores is None else (draft_scores, draft_warping, draft_best)
        verify_chain((scores, warping, best), drafter, draft, count, length, rules[0], seed, arrivals, verdict)
        return verdict
    residual = torch.empty((sequences, 2, size), dtype=torch.float32, device=scores.device)
    others = torch.empty((sequences, size), dtype=torch.float32, device=scores.device)
    left = Left.empty(sequences, draft.device)
    _rejection_kernel[(sequences,)](
        scores,
        warping,
        best,
        draft_scores,
        draft_warping,
        draft_best,
        draft,
        parent,
        drawn,
        count,
        length,
        rules[0],
        seed,
        residual,
        others,
        verdict.accepted,
        verdict.length,
        verdict.path,
        *left,
        draft.stride(0),
        0 if parent is None else parent.stride(0),
        0 if drawn is None else drawn.stride(0),
        k,
        0 if draft_scores is None else draft_scores.shape[1],
        V=size,
        BLOCK=max(16, rule.block // 4),
        ROWS=max(16, 1 << k.bit_length()),
        **launch.options(max(1, rule.warps // 2), registers=launch.PRODUCT_REGISTERS),
    )
    draw(scores, warping, best, rules[0], residual, seed, verdict, left, arrivals)
    return verdict


def empty_verdict(draft: Tensor) -> Verdict:
    """The tensors of a verdict about a draft [S, k], not yet written."""
    sequences, k = draft.shape
    accepted, token, length = (torch.empty(sequences, dtype=torch.int64, device=draft.device) for _ in range(3))
    return Verdict(accepted, token, length, torch.empty((sequences, k + 1), dtype=torch.int64, device=draft.device))
