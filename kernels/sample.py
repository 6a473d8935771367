"""Sampling: a token, or several distinct ones, per row of scores.

The first launch leaves every block's best sum of score and noise (`partials`); the second looks again at the few blocks
that may hold the winner. What wins among all ids wins among those that top-k, top-p and min-p leave, if it is one of
them: likely, and cheaper to see than where they end. Only if it is not is their threshold searched for, and a winner
above it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .nucleus import EDGES, limited_by_nucleus, nucleus_of
from .partials import block_peaks, partials_of, total_of_blocks
from .primitives import wait_for_producers
from .sampling_rule import sampling_rule
from .warping import known, limits, log, lowest_of_best, surely_left, threshold_of, uniform


@triton.jit(do_not_specialize=["stream"])
def _sample_kernel(  # noqa: PLR0915
    scores_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    segment_ptr,
    peak_ptr,
    total_ptr,
    edge_ptr,
    race_ptr,
    list_ptr,
    kept_ptr,
    token_ptr,
    stride_scores,
    stride_list,
    stream,
    COUNT: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    PDL: tl.constexpr,
):
    """The COUNT highest of (x − max x)/temperature + Gumbel(seed, position, id, stream) over the warped row, in order.

    At temperature 0 those of x. scores [R, V]; temperature, top_p, min_p float32 [R]; top_k, seed, position int64 [R];
    segment, peak, total, edge, race as in `Partials`; list int32 [R, segments]; kept [R, ROOM]; token int64 [R, COUNT].
    """
    SEGMENTS: tl.constexpr = BLOCKS * BLOCK // SEGMENT
    pid_row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + pid_row * stride_scores
    segment_ptr += pid_row * SEGMENTS
    list_ptr += pid_row * stride_list
    token_ptr += pid_row * COUNT
    offs = tl.arange(0, BLOCK)
    offs_b = tl.arange(0, triton.next_power_of_2(BLOCKS))
    wait_for_producers(PDL)
    temperature = tl.load(temperature_ptr + pid_row)
    top_k = tl.load(top_k_ptr + pid_row)
    top_p = tl.load(top_p_ptr + pid_row)
    min_p = tl.load(min_p_ptr + pid_row)
    seed = tl.load(seed_ptr + pid_row)
    position = tl.load(position_ptr + pid_row)
    peaks = block_peaks(peak_ptr + pid_row * BLOCKS, BLOCKS)
    highest = tl.max(peaks, axis=0)
    # No id of a block has a higher value.
    ceilings = peaks
    total = tl.zeros((), tl.float32)
    if temperature > 0.0:
        race = tl.load(race_ptr + pid_row * BLOCKS + offs_b, mask=offs_b < BLOCKS, other=0.0)
        ceilings = _ceilings(race, tl.div_rn(peaks - highest, temperature))
        total = total_of_blocks(total_ptr + pid_row * BLOCKS, peaks, highest, temperature, BLOCKS)

    threshold = tl.full((), float("-inf"), tl.float32)
    unlimited = (temperature <= 0.0) | (limits(top_k, top_p, min_p, V) == 0) | (tl.abs(highest) == float("inf"))
    drawing = tl.full((), 1, tl.int1)
    while drawing:
        bounds = tl.where(peaks >= threshold, ceilings, float("-inf"))
        last = tl.full((), float("inf"), tl.float32)
        last_id = tl.full((), -1, tl.int32)
        lowest = last
        first = last_id
        for column in range(COUNT):
            best = tl.full((), float("-inf"), tl.float32)
            best_id = tl.full((), 2147483647, tl.int32)
            unseen = bounds
            bound = tl.max(unseen, axis=0)
            block = lowest_of_best(unseen, offs_b)
            while (bound > best) | ((bound == best) & (bound > float("-inf")) & (block * BLOCK < best_id)):
                start = block * BLOCK
                x = known(tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")))
                value = x
                if temperature > 0.0:
                    noise = -log(-log(uniform(seed, position, start, BLOCK, stream)))
                    value = tl.div_rn(x - highest, temperature) + noise
                    value = tl.where((x >= threshold) & (x > float("-inf")), value, float("-inf"))
                if COUNT > 1:
                    value = _after(value, start + offs, last, last_id)
                own = tl.max(value, axis=0)
                own_id = lowest_of_best(value, start + offs)
                better = (own > best) | ((own == best) & (own_id < best_id))
                best = tl.where(better, own, best)
                best_id = tl.where(better, own_id, best_id)
                bounds = tl.where(offs_b == block, own, bounds)
                unseen = tl.where(offs_b == block, float("-inf"), unseen)
                bound = tl.max(unseen, axis=0)
                block = lowest_of_best(unseen, offs_b)
            token = tl.where(best > float("-inf"), best_id, first)
            first = tl.where(column == 0, token, first)
            lowest = tl.minimum(lowest, known(tl.load(row_ptr + token, mask=token >= 0, other=float("-inf"))))
            last = best
            last_id = best_id
            tl.store(token_ptr + column, token.to(tl.int64))
        drawing = tl.full((), 0, tl.int1)
        if unlimited == 0:
            left = surely_left(
                row_ptr,
                segment_ptr,
                list_ptr,
                total,
                highest,
                temperature,
                top_k,
                top_p,
                min_p,
                lowest,
                V,
                SEGMENTS,
                SEGMENT,
                TILE,
            )
            if left == 0:
                drawing = tl.full((), 1, tl.int1)
                if limited_by_nucleus(top_k, top_p, min_p, V):
                    threshold = nucleus_of(
                        row_ptr,
                        segment_ptr,
                        edge_ptr + pid_row * BLOCKS * EDGES,
                        list_ptr,
                        kept_ptr + pid_row * ROOM,
                        peaks,
                        total,
                        highest,
                        temperature,
                        top_p,
                        ROOM,
                        V,
                        SEGMENTS,
                        SEGMENT,
                        TILE,
                    )
                else:
                    threshold = threshold_of(
                        row_ptr,
                        segment_ptr,
                        list_ptr,
                        highest,
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                        V,
                        SEGMENTS,
                        SEGMENT,
                        TILE,
                    )
        unlimited = tl.full((), 1, tl.int1)


@triton.jit
def _ceilings(race, far):
    """What race + far, of a block, is at most when computed from each id's own distance to the highest score.

    Both ways round a few times, by 2⁻²⁴ of what is rounded: distances of at most |race| + |far| + 17, noise below 17.
    """
    slack = (tl.abs(race) + tl.abs(far) + 64.0) * 9.5367431640625e-07
    return tl.where(far > float("-inf"), race + far + slack, float("-inf"))


@triton.jit
def _after(value, ids, last, last_id):
    """value [BLOCK], −∞ where it does not come after the value `last` of last_id: lower, or equal with a higher id."""
    return tl.where((value < last) | ((value == last) & (ids > last_id)), value, float("-inf"))


def sample(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    stream: int = 0,
    count: int | None = None,
) -> Tensor:
    """Draw one token per row: argmax of warped log-probability + Gumbel(seed, position, id, stream).

    scores [R, V]; temperature, top_p, min_p float32 [R]; top_k (≤ 0: off), seed, position int64 [R]; → int64 [R].
    Rows with temperature 0 take the argmax. Order: temperature, min-p, top-k, top-p; ties at a threshold stay.

    count (≤ 32): the tokens of the `count` highest sums, in order, ties to the lowest id: a draw without replacement
    (Gumbel top-k; Kool et al., arXiv 1903.06059); → int64 [R, count], of which column 0 is the one token. Where fewer
    ids are possible, the columns left repeat column 0: a repeated sibling is an absent one.
    """
    scores = launch.rows_of(scores)
    rows, size = scores.shape
    rule = sampling_rule(size)
    columns = 1 if count is None else count
    rules = [field.contiguous() for field in (temperature, top_k, top_p, min_p)]
    seed, position = seed.contiguous(), position.contiguous()
    partials = partials_of(scores, 1, rules, seed, position, stream)
    listed = torch.empty((rows, rule.listed), dtype=torch.int32, device=scores.device)
    kept = torch.empty((rows, rule.kept), dtype=scores.dtype, device=scores.device)
    token = torch.empty((rows, columns), dtype=torch.int64, device=scores.device)
    _sample_kernel[(rows,)](
        scores,
        *rules,
        seed,
        position,
        *partials,
        listed,
        kept,
        token,
        scores.stride(0),
        rule.listed,
        stream,
        COUNT=columns,
        V=size,
        BLOCK=rule.block,
        BLOCKS=rule.blocks,
        SEGMENT=rule.segment,
        TILE=rule.tile,
        ROOM=rule.kept,
        **launch.options(rule.warps, registers=launch.PRODUCT_REGISTERS),
    )
    return token[:, 0] if count is None else token
