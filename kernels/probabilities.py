"""What turns rows of scores into probabilities, found for every row of a verification at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .nucleus import EDGES, bracket_of, gathered, limited_by_nucleus, nucleus_of_kept, nucleus_of_segments
from .partials import block_peaks, partials_of, total_of_blocks
from .primitives import is_last, wait_for_producers
from .sampling_rule import sampling_rule
from .warping import known, listed, lowest_of_best, mass, segment_peaks, threshold_of


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
    argmax at temperature 0, V if there is none, else −1; arrivals int32 [S]: zeroed, for a kernel after this one.
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
        tl.store(best_ptr + row, tl.where(highest > float("-inf"), lowest_of_best(x, start + offs), V))


def warping_of(scores: Tensor, rules: list[Tensor], arrivals: Tensor) -> tuple[Tensor, Tensor]:
    """The warping and best of `_warping_kernel`; scores [S, n, V] contiguous, rules and arrivals as there."""
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
        **launch.options(rule.warps, registers=launch.PRODUCT_REGISTERS),
    )
    return warping, best
