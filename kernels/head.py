"""The LM head: most likely tokens and log-sum-exp of each row, the logits not written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, product_rules
from .primitives import ordered_sum, wait_for_producers
from .products import row_product, statistics_first, weighed, weight_scale, weight_tile
from .ranking import LAST_ID, LOWEST, NONE, candidate_of_key, key_of, token_of, value_of, value_of_key
from .values import Matrix, Norm, Prediction
from .warping import known


@triton.jit
def _finite(peak):
    """The peak to subtract before exponentials: 0 in place of an infinity, so that ∞ − ∞ does not arise."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["active_ptr"])
def _head_kernel(
    x_ptr,
    norm_ptr,
    norm_bias_ptr,
    inverse_rms_ptr,
    w_ptr,
    w_scale_ptr,
    active_ptr,
    candidate_ptr,
    log_sum_exp_ptr,
    stride_x,
    rows,
    eps,
    V: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The KEPT highest of a block's logits norm(x)·Wᵀ and their log-sum-exp.

    x [R, K]; inverse_rms float32 [R], of x that is `weighed`; W [V, K_PADDED]; active bool [R]; candidate int64 [R,
    KEPT, blocks]; log_sum_exp float32 [R, blocks].
    """
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pid_n = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(1)
    offs_w = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_w = offs_w < V
    mask_r = offs_r < rows
    if active_ptr is None:
        first = weight_tile(w_ptr, offs_w * K_PADDED, mask_w, K_PADDED, BLOCK_K, PARTS, CHUNK)
        wait_for_producers(PDL)
    else:
        wait_for_producers(PDL)
        active = tl.load(active_ptr + offs_r, mask=mask_r, other=0) != 0
        if tl.max(active.to(tl.int32), axis=0) == 0:
            return
        first = weight_tile(w_ptr, offs_w * K_PADDED, mask_w, K_PADDED, BLOCK_K, PARTS, CHUNK)
    w_scale = weight_scale(w_scale_ptr, offs_w, mask_w)
    inverse_rms = None
    if inverse_rms_ptr is not None:
        inverse_rms = tl.load(inverse_rms_ptr + offs_r, mask=mask_r, other=0.0)
    y = row_product(
        x_ptr,
        offs_r * stride_x,
        mask_r,
        w_ptr,
        offs_w * K_PADDED,
        mask_w,
        first,
        w_scale,
        norm_ptr,
        norm_bias_ptr,
        inverse_rms,
        eps,
        K,
        K_PADDED,
        BLOCK_N,
        BLOCK_K,
        PARTS,
        CHUNK,
        ROWS,
    )
    y = known(y.to(x_ptr.dtype.element_ty))
    keys = tl.where(mask_w[:, None], key_of(y), LOWEST)
    best = tl.max(keys, axis=0)
    peak = _finite(value_of_key(best))
    weights = tl.where(mask_w[:, None], tl.exp(y - peak[None, :]), 0.0)
    tl.store(log_sum_exp_ptr + offs_r * blocks + pid_n, peak + tl.log(ordered_sum(weights)), mask=mask_r)

    # Two reductions of 32 bits: one of 64 moves twice as much, and compares it in two steps.
    tokens = offs_w.to(tl.int32)[:, None]
    for j in tl.static_range(KEPT):
        token = tl.min(tl.where(keys == best[None, :], tokens, LAST_ID), axis=0)
        tl.store(candidate_ptr + (offs_r * KEPT + j) * blocks + pid_n, candidate_of_key(best, token), mask=mask_r)
        keys = tl.where(tokens == token[None, :], LOWEST, keys)
        best = tl.max(keys, axis=0)


@triton.jit(do_not_specialize_on_alignment=["active_ptr"])
def _merge_kernel(
    candidate_ptr,
    partial_ptr,
    ids_ptr,
    active_ptr,
    token_ptr,
    value_ptr,
    log_sum_exp_ptr,
    BLOCKS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    SHARE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The TOP_K highest candidates of all blocks and the log-sum-exp of their log-sum-exps.

    candidate [R, KEPT, blocks], highest first; partial [R, blocks]; ids int64 [V] or None; active bool [R]: rows that
    are not get nothing; token, value [R, TOP_K]; log_sum_exp [R]. Lane i of LANES holds the highest candidate not yet
    taken of blocks i, i + LANES, …
    """
    pid_row = tl.program_id(0).to(tl.int64)
    offs_lane = tl.arange(0, LANES)
    candidate_ptr += pid_row * KEPT * BLOCKS
    partial_ptr += pid_row * BLOCKS
    wait_for_producers(PDL)
    if active_ptr is not None:  # noqa: SIM102
        if tl.load(active_ptr + pid_row) == 0:
            return

    lanes = tl.full((LANES,), NONE, tl.int64)
    peaks = tl.full((LANES,), float("-inf"), tl.float32)
    for start in range(0, BLOCKS, LANES):
        offs_b = start + offs_lane
        lanes = tl.maximum(lanes, tl.load(candidate_ptr + offs_b, mask=offs_b < BLOCKS, other=NONE))
        peaks = tl.maximum(peaks, tl.load(partial_ptr + offs_b, mask=offs_b < BLOCKS, other=float("-inf")))
    peak = _finite(tl.max(peaks, axis=0))
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, BLOCKS, LANES):
        offs_b = start + offs_lane
        sums += tl.exp(tl.load(partial_ptr + offs_b, mask=offs_b < BLOCKS, other=float("-inf")) - peak)
    tl.store(log_sum_exp_ptr + pid_row, peak + tl.log(tl.sum(sums, axis=0)))

    offs_s = tl.arange(0, SHARE)
    for j in range(TOP_K):
        best = tl.max(lanes, axis=0)
        token = token_of(best)
        told = token.to(tl.int64)
        if ids_ptr is not None:
            told = tl.load(ids_ptr + token)
        tl.store(token_ptr + pid_row * TOP_K + j, tl.where(value_of(best) > float("-inf"), told, -1))
        tl.store(value_ptr + pid_row * TOP_K + j, value_of(best).to(value_ptr.dtype.element_ty))
        if j + 1 < TOP_K:
            lane = (token // BLOCK_N) % LANES
            offs_b = lane + offs_s // KEPT * LANES
            share = tl.load(candidate_ptr + offs_s % KEPT * BLOCKS + offs_b, mask=offs_b < BLOCKS, other=NONE)
            following = tl.max(tl.where(share < best, share, NONE), axis=0)
            lanes = tl.where(offs_lane == lane, following, lanes)


def head(
    x: Tensor,
    norm: Norm,
    weight: Matrix,
    *,
    tile: int | None,
    top_k: int | None = None,
    ids: Tensor | None = None,
    active: Tensor | None = None,
) -> Prediction:
    """argmax, or the `top_k` highest, of norm(x)·Wᵀ with their logits and the log-sum-exp; ties go to the lowest id.

    ids int64 [V'], ascending: the tokens the rows of a reduced vocabulary's W [V', H] stand for. The results of rows
    that are not `active` bool [R] are undefined. A NaN counts as −∞, and where nothing is above that the token is −1.
    """
    rows, vocabulary = x.shape[0], weight.rows
    x = launch.rows_of(x)
    active = None if active is None else active.contiguous()
    arch = launch.architecture()
    short = statistics_first(norm, x.dtype)
    rule = product_rules.product_rule(
        vocabulary, weight.columns, rows, tile, x.element_size(), arch, short=short, summed=True
    )
    if weight.scale is not None:
        rule = rule.light(weight.columns, x.element_size())
    blocks = triton.cdiv(vocabulary, rule.block_n)
    taken = 1 if top_k is None else min(top_k, vocabulary)
    kept = min(taken, rule.block_n)
    candidate = torch.empty((rows, kept, blocks), dtype=torch.int64, device=x.device)
    partial = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    token = torch.empty((rows, taken), dtype=torch.int64, device=x.device)
    value = torch.empty((rows, taken), dtype=x.dtype, device=x.device)
    log_sum_exp = torch.empty(rows, dtype=torch.float32, device=x.device)
    x, inside, inverse_rms = weighed(x, norm, rule)
    _head_kernel[(triton.cdiv(rows, rule.rows), blocks)](
        x,
        None if inside is None else inside.weight,
        None if inside is None else inside.bias,
        inverse_rms,
        weight.data,
        weight.scale,
        active,
        candidate,
        partial,
        x.stride(0),
        rows,
        norm.eps,
        V=vocabulary,
        K=weight.columns,
        K_PADDED=weight.data.shape[-1],
        KEPT=kept,
        BLOCK_N=rule.block_n,
        BLOCK_K=rule.block_k,
        PARTS=rule.parts,
        CHUNK=rule.chunk,
        ROWS=rule.rows,
        **launch.options(rule.warps, rule.stages, rule.registers),
    )
    merge = launch.merge_rule(blocks, kept, arch)
    _merge_kernel[(rows,)](
        candidate,
        partial,
        ids,
        active,
        token,
        value,
        log_sum_exp,
        BLOCKS=blocks,
        KEPT=kept,
        TOP_K=taken,
        BLOCK_N=rule.block_n,
        LANES=merge.lanes,
        SHARE=merge.share,
        **launch.options(merge.warps),
    )
    if top_k is None:
        token, value = token[:, 0], value[:, 0]
    return Prediction(token, value, log_sum_exp)
