"""The product every weight-reading kernel is built on: rows of activations with rows of a weight.

One program holds BLOCK_N weight rows against ROWS activations and walks the columns in steps of BLOCK_K, in order from
column 0. Weights are the left operand, so that eight rows of activations are one instruction of the matrix units. The
columns of a step are dealt to the warps in parts, each with sums of its own, which are added at the end. A step is
loaded at once or, where many rows leave no room for it, in chunks of CHUNK columns, a run of each part: the order of
the sums is that of the step.

Where a product feeds a sum, it is said that the two are fused or, by adding 0, that they are not: left to the compiler,
the choice could follow the number of rows. No offset or mask given here may come from a load of 8-bit values such as a
bool, unless by `flags`: the compiler takes the narrowest load behind an operand as its width, and sums the columns in
another order. A weight of eight bits is such a load: its sums have an order of their own, one for any number of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, product_rules
from .primitives import dot, gathered_sum, gathered_sum_of_columns, ordered_sum, wait_for_producers
from .values import Norm


def weighed(x: Tensor, norm: Norm | None, rule: product_rules.ProductRule) -> tuple[Tensor, Norm | None, Tensor | None]:
    """What `row_product` takes as x [R, K], norm and inverse_rms by that rule.

    Where the rule has norms apart, the first is the right operand itself: w·x, whose 1/√(mean x² + eps) is the last,
    float32 [R], or with statistics first all of norm(x). It has the bits it has inside the product.
    """
    if norm is None or not rule.norm_apart:
        return x, norm, None
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    inverse_rms = None
    if not statistics_first(norm, x.dtype):
        inverse_rms = torch.empty(rows, dtype=torch.float32, device=x.device)
    _weigh_kernel[(rows,)](
        x,
        norm.weight,
        norm.bias,
        out,
        inverse_rms,
        x.stride(0),
        norm.eps,
        K=columns,
        BLOCK_K=rule.block_k,
        PARTS=rule.parts,
        **launch.options(warps=4),
    )
    return out, None, inverse_rms


def statistics_first(norm: Norm | None, dtype: torch.dtype) -> bool:
    """Whether `row_product` reads activations of that dtype once for their statistics before it multiplies them."""
    return norm is not None and (norm.bias is not None or dtype == torch.float16)


@triton.jit
def _columns(
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The columns of a step's first chunk: [PARTS, CHUNK / PARTS], or [CHUNK] where it is one part."""
    if PARTS > 1:
        offs = tl.arange(0, PARTS)[:, None] * (BLOCK_K // PARTS) + tl.arange(0, CHUNK // PARTS)[None, :]
    else:
        offs = tl.arange(0, CHUNK)
    return offs


@triton.jit
def _chunk(
    start,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """How far the columns of the chunk before which `start` columns were read lie behind those of the first."""
    k = start // BLOCK_K * BLOCK_K
    if CHUNK < BLOCK_K:
        k += start % BLOCK_K // CHUNK * (CHUNK // PARTS)
    return k


@triton.jit
def _left(rows, columns):
    """Values of weight rows and of columns as views that broadcast to the left operand, [parts, rows, columns]."""
    if len(columns.shape) == 2:
        rows = rows[None, :]
    return tl.expand_dims(rows, -1), tl.expand_dims(columns, -2)


@triton.jit
def _right(rows, columns):
    """Values of rows and of columns as views that broadcast to the right operand, [parts, columns, rows]."""
    if len(columns.shape) == 2:
        rows = rows[None, :]
    return tl.expand_dims(rows, -2), tl.expand_dims(columns, -1)


@triton.jit
def weight_tile(
    w_ptr,
    offs_w,
    mask_w,
    K_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first chunk of the weight rows at offs_w [BLOCK_N]: the loads to have in flight early."""
    offs_k = _columns(BLOCK_K, PARTS, CHUNK)
    rows, columns = _left(offs_w, offs_k)
    return _weight(w_ptr + rows + columns, offs_k, mask_w, 0, K_PADDED, BLOCK_K)


@triton.jit
def weight_scale(w_scale_ptr, offs_n, mask_w):
    """The scales float32 [BLOCK_N] of weight rows of eight bits, None of others: to ask for before the product."""
    scale = None
    if w_scale_ptr is not None:
        scale = tl.load(w_scale_ptr + offs_n, mask=mask_w, other=0.0)
    return scale


@triton.jit
def _weight(
    w_ptrs,
    offs_k,
    mask_w,
    k,
    K_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The chunk of W at column k as the product's left operand."""
    mask, mask_k = _left(mask_w, k + offs_k < K_PADDED)
    if K_PADDED % BLOCK_K != 0:
        mask = mask & mask_k
    return tl.load(w_ptrs + k, mask=mask, other=0.0)


@triton.jit
def _norm(
    norm_ptr,
    offs_k,
    k,
    K: tl.constexpr,
):
    """The step of a norm's weight or bias at column k; zero where it has none."""
    values = 0.0
    if norm_ptr is not None:
        values = tl.load(norm_ptr + k + offs_k, mask=k + offs_k < K, other=0.0)
    return values


@triton.jit
def row_product(
    x_ptr,
    offs_x,
    mask_x,
    w_ptr,
    offs_w,
    mask_w,
    first,
    w_scale,
    norm_ptr,
    norm_bias_ptr,
    inverse_rms,
    eps,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    REDUCED: tl.constexpr = False,
):
    """W·norm(x)ᵀ → float32 [BLOCK_N, ROWS]; the norm is left out where norm_ptr is None.

    x [rows, K] at offs_x int64 [ROWS]; W [·, K_PADDED], zero past K, at offs_w int64 [BLOCK_N]; BLOCK_K a power of two,
    whose last step reads nothing past K_PADDED; first = weight_tile(…); w_scale = weight_scale(…), which the sums of a
    weight of eight bits are multiplied by. RMSNorm's 1/√(mean x² + eps) scales the sums at the end, so x is read once;
    in float16, where w·x might overflow before it, and for LayerNorm (norm_bias_ptr given), statistics come first
    (`statistics_first`). inverse_rms float32 [ROWS]: that scale where x is w·x already, or None (`weighed`). REDUCED:
    the caller reduces over the weight rows, so that each warp had better hold all of them; else they are dealt to the
    warps.
    """
    offs_k = _columns(BLOCK_K, PARTS, CHUNK)
    rows, columns = _right(offs_x, offs_k)
    x_ptrs = x_ptr + rows + columns
    rows, columns = _left(offs_w, offs_k)
    w_ptrs = w_ptr + rows + columns
    STATISTICS_FIRST: tl.constexpr = norm_ptr is not None and (
        norm_bias_ptr is not None or x_ptr.dtype.element_ty == tl.float16
    )
    mean = tl.zeros((ROWS,), tl.float32)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if STATISTICS_FIRST:
        mean, scale = _statistics(x_ptrs, offs_k, mask_x, norm_bias_ptr, eps, K, K_PADDED, BLOCK_K, ROWS)

    squares = tl.zeros(x_ptrs.shape, tl.float32)
    acc = tl.zeros((PARTS, BLOCK_N, ROWS) if PARTS > 1 else (BLOCK_N, ROWS), tl.float32)
    norm, norm_bias = _norm(norm_ptr, offs_k, 0, K), _norm(norm_bias_ptr, offs_k, 0, K)
    x = _step(x_ptrs, offs_k, mask_x, 0, K, BLOCK_K)
    operand, squares = _operand(x, norm_ptr, norm, norm_bias_ptr, norm_bias, mean, scale, squares)
    acc = dot(first, operand, acc)
    for start in range(CHUNK, (K_PADDED + BLOCK_K - 1) // BLOCK_K * BLOCK_K, CHUNK):
        k = _chunk(start, BLOCK_K, PARTS, CHUNK)
        w = _weight(w_ptrs, offs_k, mask_w, k, K_PADDED, BLOCK_K)
        x = _step(x_ptrs, offs_k, mask_x, k, K, BLOCK_K)
        norm, norm_bias = _norm(norm_ptr, offs_k, k, K), _norm(norm_bias_ptr, offs_k, k, K)
        operand, squares = _operand(x, norm_ptr, norm, norm_bias_ptr, norm_bias, mean, scale, squares)
        acc = dot(w, operand, acc)
    if PARTS > 1:
        if REDUCED:
            acc = tl.reshape(ordered_sum(tl.reshape(acc, (PARTS, BLOCK_N * ROWS))), (BLOCK_N, ROWS))
        else:
            acc = gathered_sum(acc)
    if w_scale is not None:
        acc = tl.fma(acc, tl.broadcast_to(w_scale[:, None], acc.shape), 0.0)
    if norm_ptr is not None and not STATISTICS_FIRST:
        inverse_rms = tl.rsqrt(_sum_of_columns(squares) / K + eps)
    if inverse_rms is not None:
        acc = tl.fma(acc, tl.broadcast_to(inverse_rms[None, :], acc.shape), 0.0)
    return acc


@triton.jit
def _sum_of_columns(x):
    """Sum of [parts, columns / parts, ROWS] or [columns, ROWS] over all columns: [ROWS]."""
    total = ordered_sum(x) if len(x.shape) == 2 else gathered_sum_of_columns(x)
    return total


@triton.jit
def halves(
    x,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The upper and the lower [BLOCK, ROWS] of [2·BLOCK, ROWS]."""
    return tl.split(tl.permute(tl.reshape(x, (2, BLOCK, ROWS)), (1, 2, 0)))


@triton.jit
def _operand(x, norm_ptr, norm, norm_bias_ptr, norm_bias, mean, scale, squares):
    """norm(x), a step of the product's right operand, and the running sum of squares."""
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        scale, weight = _right(scale, norm.to(tl.float32))
        if norm_bias_ptr is not None:
            mean, bias = _right(mean, norm_bias.to(tl.float32))
            wide = tl.fma((wide - mean) * scale, weight, bias)
        else:
            squares = tl.fma(wide, wide, squares)
            wide = wide * scale * weight
        x = wide.to(x.dtype)
    return x, squares


@triton.jit
def _step(
    x_ptrs,
    offs_k,
    mask_x,
    k,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    mask, mask_k = _right(mask_x, k + offs_k < K)
    if K % BLOCK_K != 0:
        mask = mask & mask_k
    return tl.load(x_ptrs + k, mask=mask, other=0.0)


@triton.jit
def _statistics(
    x_ptrs,
    offs_k,
    mask_x,
    norm_bias_ptr,
    eps,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean, zero for RMSNorm, and 1/√(variance + eps) of each row: float32 [ROWS] each."""
    mean = tl.zeros((ROWS,), tl.float32)
    if norm_bias_ptr is not None:
        total = tl.zeros(x_ptrs.shape, tl.float32)
        for k in range(0, K_PADDED, BLOCK_K):
            total += _step(x_ptrs, offs_k, mask_x, k, K, BLOCK_K).to(tl.float32)
        mean = _sum_of_columns(total) / K
    squares = tl.zeros(x_ptrs.shape, tl.float32)
    for k in range(0, K_PADDED, BLOCK_K):
        x = _step(x_ptrs, offs_k, mask_x, k, K, BLOCK_K).to(tl.float32)
        centre, mask_k = _right(mean, k + offs_k < K)
        centred = tl.where(mask_k, x - centre, 0.0)
        squares = tl.fma(centred, centred, squares)
    return mean, tl.rsqrt(_sum_of_columns(squares) / K + eps)


@triton.jit
def _weigh_kernel(
    x_ptr,
    norm_ptr,
    norm_bias_ptr,
    out_ptr,
    inverse_rms_ptr,
    stride_x,
    eps,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The right operand of `row_product`, and with inverse_rms_ptr, what its sums are scaled with at the end.

    x, out [R, K]; norm, norm_bias [K]; inverse_rms float32 [R]. One row a program.
    """
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    every = row >= 0
    offs_k = _columns(BLOCK_K, PARTS, BLOCK_K)
    rows, columns = _right(row * stride_x, offs_k)
    x_ptrs = x_ptr + rows + columns
    rows, columns = _right(row * K, offs_k)
    out_ptrs = out_ptr + rows + columns
    wait_for_producers(PDL)
    mean = tl.zeros((1,), tl.float32)
    scale = tl.full((1,), 1.0, tl.float32)
    if inverse_rms_ptr is None:
        mean, scale = _statistics(x_ptrs, offs_k, every, norm_bias_ptr, eps, K, K, BLOCK_K, 1)
    squares = tl.zeros(x_ptrs.shape, tl.float32)
    for k in range(0, K, BLOCK_K):
        x = _step(x_ptrs, offs_k, every, k, K, BLOCK_K)
        norm, norm_bias = _norm(norm_ptr, offs_k, k, K), _norm(norm_bias_ptr, offs_k, k, K)
        operand, squares = _operand(x, norm_ptr, norm, norm_bias_ptr, norm_bias, mean, scale, squares)
        _, mask = _right(every, k + offs_k < K)
        tl.store(out_ptrs + k, operand, mask=mask)
    if inverse_rms_ptr is not None:
        tl.store(inverse_rms_ptr + row, tl.rsqrt(_sum_of_columns(squares) / K + eps))
