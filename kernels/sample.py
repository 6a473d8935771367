"""Sampling: a token per row of scores, warped and drawn in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import start_dependents, wait_for_producers
from .warping import log, lowest_of_best, peak, threshold_of, uniform


@triton.jit
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
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """argmax of (x − max x)/temperature + Gumbel(seed, position, id) over the warped row; argmax x at temperature 0.

    scores [R, V]; temperature, top_p, min_p float32 [R]; top_k, seed, position, token int64 [R].
    """
    start_dependents(PDL)
    pid_row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + pid_row * stride_scores
    wait_for_producers(PDL)
    temperature = tl.load(temperature_ptr + pid_row)
    highest, token = peak(row_ptr, V, BLOCK)
    if temperature > 0.0:
        top_k = tl.load(top_k_ptr + pid_row)
        top_p = tl.load(top_p_ptr + pid_row)
        min_p = tl.load(min_p_ptr + pid_row)
        seed = tl.load(seed_ptr + pid_row)
        position = tl.load(position_ptr + pid_row)
        threshold = threshold_of(row_ptr, highest, temperature, top_k, top_p, min_p, V, BLOCK)
        offs = tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        ids = offs
        for start in range(0, V, BLOCK):
            x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
            noise = -log(-log(uniform(seed, position, start, BLOCK, 0)))
            value = tl.where(x >= threshold, tl.div_rn(x - highest, temperature) + noise, float("-inf"))
            ids = tl.where(value > best, start + offs, ids)
            best = tl.maximum(best, value)
        token = lowest_of_best(best, ids)
    tl.store(token_ptr + pid_row, token.to(tl.int64))


def sample(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Draw one token per row: argmax of warped log-probability + Gumbel(seed, position, id).

    scores [R, V]; temperature, top_p, min_p float32 [R]; top_k (≤ 0: off), seed, position int64 [R]; → int64 [R].
    Rows with temperature 0 take the argmax. Order: temperature, min-p, top-k, top-p; ties at a threshold stay.
    """
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    rows, size = scores.shape
    rule = launch.vocabulary_rule(size)
    token = torch.empty(rows, dtype=torch.int64, device=scores.device)
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
        V=size,
        BLOCK=rule.block,
        PDL=launch.dependent(launch.architecture()),
        **launch.options(rule.warps),
    )
    return token
