"""Sampling: a token, or several distinct ones, per row of scores, warped and drawn in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers
from .warping import log, lowest_of_best, peak, threshold_of, uniform


@triton.jit(do_not_specialize=["stream"])
def _sample_kernel(
    scores_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,
    stride_scores,
    stream,
    COUNT: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The COUNT highest of (x − max x)/temperature + Gumbel(seed, position, id, stream) over the warped row, in order.

    At temperature 0 those of x. scores [R, V]; temperature, top_p, min_p float32 [R]; top_k, seed, position int64 [R];
    token int64 [R, COUNT].
    """
    pid_row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + pid_row * stride_scores
    token_ptr += pid_row * COUNT
    wait_for_producers(PDL)
    temperature = tl.load(temperature_ptr + pid_row)
    highest, token = peak(row_ptr, V, BLOCK)
    # Draws only compare, so the size of their blocks rounds nothing; siblings take more registers.
    DRAW: tl.constexpr = BLOCK // 2 if COUNT > 1 else BLOCK
    offs = tl.arange(0, DRAW)
    if temperature > 0.0:
        top_k = tl.load(top_k_ptr + pid_row)
        top_p = tl.load(top_p_ptr + pid_row)
        min_p = tl.load(min_p_ptr + pid_row)
        seed = tl.load(seed_ptr + pid_row)
        position = tl.load(position_ptr + pid_row)
        threshold = threshold_of(row_ptr, highest, temperature, top_k, top_p, min_p, V, BLOCK)
        last = tl.full((), float("inf"), tl.float32)
        last_id = tl.full((), -1, tl.int32)
        first = last_id
        for column in range(COUNT):
            best = tl.full((DRAW,), float("-inf"), tl.float32)
            ids = offs
            for start in range(0, V, DRAW):
                x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
                noise = -log(-log(uniform(seed, position, start, DRAW, stream)))
                value = tl.where(x >= threshold, tl.div_rn(x - highest, temperature) + noise, float("-inf"))
                if COUNT > 1:
                    value = _after(value, start + offs, last, last_id)
                ids = tl.where(value > best, start + offs, ids)
                best = tl.maximum(best, value)
            last = tl.max(best, axis=0)
            last_id = lowest_of_best(best, ids)
            first = tl.where(column == 0, last_id, first)
            tl.store(token_ptr + column, tl.where(last > float("-inf"), last_id, first).to(tl.int64))
    else:
        tl.store(token_ptr, token.to(tl.int64))
        last = highest
        last_id = token
        for column in range(1, COUNT):
            best = tl.full((DRAW,), float("-inf"), tl.float32)
            ids = offs
            for start in range(0, V, DRAW):
                x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
                value = _after(x, start + offs, last, last_id)
                ids = tl.where(value > best, start + offs, ids)
                best = tl.maximum(best, value)
            last = tl.max(best, axis=0)
            last_id = lowest_of_best(best, ids)
            tl.store(token_ptr + column, tl.where(last > float("-inf"), last_id, token).to(tl.int64))


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
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    rows, size = scores.shape
    rule = launch.vocabulary_rule(size)
    columns = 1 if count is None else count
    token = torch.empty(rows, columns, dtype=torch.int64, device=scores.device)
    _sample_kernel[(rows,)](
        scores,
        temperature.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        seed.contiguous(),
        position.contiguous(),
        token,
        scores.stride(0),
        stream,
        COUNT=columns,
        V=size,
        BLOCK=rule.block,
        PDL=launch.dependent(launch.architecture()),
        **launch.options(rule.warps),
    )
    return token[:, 0] if count is None else token
