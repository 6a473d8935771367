"""Speculative sampling on the device: drafts accepted and rejected by probability."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .chains import ACCEPT_STREAM, verify_chain
from .nucleus import EDGES, bracket_of, gathered, limited_by_nucleus, nucleus_of_kept, nucleus_of_segments
from .partials import block_peaks, partials_of, total_of_blocks
from .primitives import wait_for_producers
from .residual import Left, draw, is_last, keep, place_of, probability, take, total_of
from .sampling_rule import sampling_rule
from .values import Verdict
from .warping import known, listed, lowest_of_best, mass, segment_peaks, threshold_of, uniform


@triton.jit
def _warping_kernel(  # noqa: PLR0915
    scores_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    segment_ptr,
    peak_ptr,
    total_ptr,
    edge_ptr,
    list_ptr,
    kept_ptr,
    count_ptr,
    found_ptr,
    warping_ptr,
    best_ptr,
    arrivals_ptr,
    stride_list,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """What turns a row of scores into probabilities: highest score, threshold and Σ exp((x − highest)/temperature).

    scores [S, n, V]; temperature, top_k, top_p, min_p [S]; segment, peak, total, edge as in `Partials`; list int32
    [S, n, segments]; kept [S, n, PROGRAMS, ROOM] and count int32 [S, n, PROGRAMS]: what each program found of where a
    nucleus ends; found int32 [S, n], zero before: how many have; warping float32 [S, n, 3]; best int32 [S, n]: the
    argmax at temperature 0, else −1; arrivals int32 [S]: zeroed, for a kernel after this one.
    """
    SEGMENTS: tl.constexpr = BLOCKS * BLOCK // SEGMENT
    SHARE: tl.constexpr = triton.next_power_of_2(SEGMENTS) // PROGRAMS
    pid_s = tl.program_id(0).to(tl.int64)
    pid_n = tl.program_id(1).to(tl.int64)
    pid_part = tl.program_id(2)
    row = pid_s * tl.num_programs(1) + pid_n
    row_ptr = scores_ptr + row * V
    segment_ptr += row * SEGMENTS
    list_ptr += row * stride_list
    kept_ptr += row * PROGRAMS * ROOM
    count_ptr += row * PROGRAMS
    offs = tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    if (pid_n == 0) & (pid_part == 0):
        tl.store(arrivals_ptr + pid_s, 0)
    temperature = tl.load(temperature_ptr + pid_s)
    top_k = tl.load(top_k_ptr + pid_s)
    top_p = tl.load(top_p_ptr + pid_s)
    min_p = tl.load(min_p_ptr + pid_s)
    peaks = block_peaks(peak_ptr + row * BLOCKS, BLOCKS)
    highest = tl.max(peaks, axis=0)
    threshold = tl.full((), float("-inf"), tl.float32)
    telling = pid_part == 0
    if temperature > 0.0:
        total = total_of_blocks(total_ptr + row * BLOCKS, peaks, highest, temperature, BLOCKS)
        if limited_by_nucleus(top_k, top_p, min_p, V):
            offs_s = pid_part * SHARE + tl.arange(0, SHARE)
            own = tl.load(segment_ptr + offs_s, mask=offs_s < SEGMENTS, other=float("-inf"))
            goal = top_p * total
            low, high, above = bracket_of(edge_ptr + row * BLOCKS * EDGES, peaks, highest, temperature, goal)
            own_list_ptr = list_ptr + pid_part * SHARE
            among = listed(own >= low, own_list_ptr, pid_part * SHARE)
            # Where it is not known, all are looked at by one program.
            among = tl.where(low > float("-inf"), among, 0)
            own_kept_ptr = kept_ptr + pid_part * ROOM
            number = gathered(row_ptr, own_list_ptr, among, low, high, own_kept_ptr, ROOM, V, SEGMENT, TILE)
            tl.store(count_ptr + pid_part, number)
            telling = is_last(found_ptr + row, PROGRAMS)
            if telling:
                counts = tl.load(count_ptr + tl.arange(0, PROGRAMS), cache_modifier=".cg")
                if (low > float("-inf")) & (tl.max(counts, axis=0) <= ROOM):
                    threshold, total = nucleus_of_kept(
                        kept_ptr, counts, low, high, above, goal, highest, temperature, ROOM, TILE
                    )
                else:
                    threshold, total = nucleus_of_segments(
                        row_ptr,
                        list_ptr,
                        segment_peaks(segment_ptr, SEGMENTS),
                        low,
                        goal,
                        highest,
                        temperature,
                        V,
                        SEGMENT,
                        TILE,
                    )
        elif telling:
            threshold = threshold_of(
                row_ptr, segment_ptr, list_ptr, highest, temperature, top_k, top_p, min_p, V, SEGMENTS, SEGMENT, TILE
            )
            if threshold > float("-inf"):
                total = mass(
                    row_ptr, segment_ptr, list_ptr, highest, temperature, threshold, V, SEGMENTS, SEGMENT, TILE
                )
        if telling:
            tl.store(warping_ptr + row * 3, highest)
            tl.store(warping_ptr + row * 3 + 1, threshold)
            tl.store(warping_ptr + row * 3 + 2, total)
            tl.store(best_ptr + row, -1)
    elif telling:
        start = lowest_of_best(peaks, tl.arange(0, peaks.shape[0])) * BLOCK
        x = known(tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")))
        tl.store(best_ptr + row, lowest_of_best(x, start + offs))


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
    draft_ids_ptr,
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
    V_DRAFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """From row 0: accept child x if u·q(x) ≤ p(x), or p ← norm(max(p − q, 0)), q ← norm(q without x).

    scores [S, k + 1, V]; draft_scores [S, drafts, V_DRAFT] or None: q certain; warping, best as `_warping_kernel` gives
    them; draft_ids int64 [V_DRAFT] or None; draft, parent int64 [S, k]; drawn int64 [S, k + 1] or None; residual
    float32 [S, 2, V]: p in turn, read from one and written to the other; others float32 [S, V_DRAFT]: q; path int64
    [S, k + 1]; left as in `Left`; the rest [S].
    """
    pid_s = tl.program_id(0).to(tl.int64)
    residual_ptr += pid_s * 2 * V
    others_ptr += pid_s * V_DRAFT
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
                place = place_of(draft_ids_ptr, x, V_DRAFT, BLOCK)
                q_row = pid_s * drafts + row
                if drawn_ptr is not None:
                    q_row = pid_s * drafts + tl.load(drawn_ptr + pid_s * stride_drawn + row)
                q_row_ptr = draft_scores_ptr + q_row * V_DRAFT
                q_warping_ptr = draft_warping_ptr + q_row * 3
                q_best = tl.load(draft_best_ptr + q_row)
                q_x = probability(q_row_ptr, q_warping_ptr, q_best, temperature, others_ptr, q_total, place, place >= 0)
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
                gone = tl.where(q_x > 0.0, -1, x)
                keep(p_row_ptr, p_warping_ptr, p_best, temperature, old_ptr, p_total, new_ptr, gone, V, BLOCK)
                if draft_scores_ptr is not None and q_x > 0.0:
                    rest = take(
                        q_row_ptr,
                        q_warping_ptr,
                        q_best,
                        temperature,
                        others_ptr,
                        q_total,
                        new_ptr,
                        draft_ids_ptr,
                        place,
                        V_DRAFT,
                        BLOCK,
                    )
                    # Even with nothing left q is what is in others_ptr.
                    q_total = tl.where(rest > 0.0, rest, 1.0)
                total = total_of(new_ptr, V, BLOCK)
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
    draft_ids: Tensor | None = None,
) -> Verdict:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192), over siblings by recursive rejection.

    scores [S, k + 1, V] of the target; draft_scores [S, n, V'] of the drafter: the children of row i were drawn with
    those of drawn[i], int64 [S, k + 1], or of i without it, and without replacement; None: every draft token was
    certain. draft_ids int64 [V'], distinct: what a reduced draft vocabulary stands for. temperature, top_k, top_p,
    min_p, seed [S] as in `sample`, for both p and q; draft, count, length, parent as in `verify`.

    From row 0: a child x is accepted with probability min(1, p(x)/q(x)), which moves on to its row; a rejected one
    leaves p ← norm(max(p − q, 0)) and q ← q without x, renormalised. The token after the last accepted row is drawn
    from p as it is left. A token that q cannot give counts as certain; a residual that rounds to zero leaves p.
    """
    sequences, k = draft.shape
    draft_scores = draft_scores if k else None
    scores, draft, parent = scores.contiguous(), rows_of(draft), None if parent is None else rows_of(parent)
    drawn = None if drawn is None else rows_of(drawn)
    size = scores.shape[2]
    rule = launch.vocabulary_rule(size)
    rules = [field.contiguous() for field in (temperature, top_k, top_p, min_p)]
    arrivals = torch.empty((sequences,), dtype=torch.int32, device=scores.device)
    warping, best = _warping(scores, rules, arrivals)
    draft_size, draft_warping, draft_best = 1, None, None
    if draft_scores is not None:
        draft_scores = draft_scores.contiguous()
        draft_size = draft_scores.shape[2]
        draft_warping, draft_best = _warping(draft_scores, rules, arrivals)
    count, length, seed = count.contiguous(), length.contiguous(), seed.contiguous()
    verdict = empty_verdict(draft)
    if parent is None and drawn is None and draft_ids is None:
        drafter = None if draft_scores is None else (draft_scores, draft_warping, draft_best)
        verify_chain((scores, warping, best), drafter, draft, count, length, rules[0], seed, arrivals, verdict)
        return verdict
    residual = torch.empty((sequences, 2, size), dtype=torch.float32, device=scores.device)
    others = torch.empty((sequences, draft_size), dtype=torch.float32, device=scores.device)
    left = Left.empty(sequences, draft.device)
    _rejection_kernel[(sequences,)](
        scores,
        warping,
        best,
        draft_scores,
        draft_warping,
        draft_best,
        draft_ids,
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
        V_DRAFT=draft_size,
        BLOCK=max(16, rule.block // 4),
        ROWS=max(16, 1 << k.bit_length()),
        PDL=launch.dependent(launch.architecture()),
        **launch.options(max(1, rule.warps // 2), registers=launch.PRODUCT_REGISTERS),
    )
    draw(scores, warping, best, rules[0], residual, seed, verdict, left, arrivals)
    return verdict


def _warping(scores: Tensor, rules: list[Tensor], arrivals: Tensor) -> tuple[Tensor, Tensor]:
    sequences, rows, size = scores.shape
    rule = sampling_rule(size)
    count = sequences * rows
    found = torch.empty((count,), dtype=torch.int32, device=scores.device)
    *partials, _ = partials_of(scores.flatten(0, 1), rows, rules, arrivals=found)
    numbers = torch.empty((count, rule.listed), dtype=torch.int32, device=scores.device)
    kept = torch.empty((count, rule.kept), dtype=scores.dtype, device=scores.device)
    counts = torch.empty((count, rule.parts), dtype=torch.int32, device=scores.device)
    warping = torch.empty((sequences, rows, 3), dtype=torch.float32, device=scores.device)
    best = torch.empty((sequences, rows), dtype=torch.int32, device=scores.device)
    _warping_kernel[(sequences, rows, rule.parts)](
        scores,
        *rules,
        *partials,
        numbers,
        kept,
        counts,
        found,
        warping,
        best,
        arrivals,
        rule.listed,
        V=size,
        BLOCK=rule.block,
        BLOCKS=rule.blocks,
        SEGMENT=rule.segment,
        TILE=rule.tile,
        ROOM=rule.kept // rule.parts,
        PROGRAMS=rule.parts,
        PDL=launch.dependent(launch.architecture()),
        **launch.options(rule.warps, registers=launch.PRODUCT_REGISTERS),
    )
    return warping, best


def empty_verdict(draft: Tensor) -> Verdict:
    """The tensors of a verdict about a draft [S, k], not yet written."""
    sequences, k = draft.shape
    accepted, token, length = (torch.empty(sequences, dtype=torch.int64, device=draft.device) for _ in range(3))
    return Verdict(accepted, token, length, torch.empty((sequences, k + 1), dtype=torch.int64, device=draft.device))


def rows_of(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
