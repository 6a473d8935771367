"""The product every weight-reading kernel is built on: rows of activations with rows of a weight.

One program holds BLOCK_N weight rows against ROWS activations and walks the columns in steps of BLOCK_K, in order from
column 0. Weights are the left operand, so that eight rows of activations are one instruction of the matrix units.

No offset or mask given here may come from a load of 8-bit values such as a bool: the compiler takes the narrowest load
behind an operand as its width, and sums the columns in another order.
"""

import triton
import triton.language as tl

from .primitives import dot


@triton.jit
def weight_tile(
    w_ptr,
    offs_w,
    mask_w,
    BLOCK_K: tl.constexpr,
):
    """The first BLOCK_K columns of the weight rows at offs_w [BLOCK_N]: the loads to have in flight early."""
    return tl.load(w_ptr + offs_w[:, None] + tl.arange(0, BLOCK_K)[None, :], mask=mask_w[:, None], other=0.0)


@triton.jit
def row_product(
    x_ptr,
    offs_x,
    mask_x,
    w_ptr,
    offs_w,
    mask_w,
    first,
    norm_ptr,
    norm_bias_ptr,
    eps,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """W·norm(x)ᵀ → float32 [BLOCK_N, ROWS]; the norm is left out where norm_ptr is None.

    x [rows, K] at offs_x int64 [ROWS]; W [·, K_PADDED], zero past K, at offs_w int64 [BLOCK_N]; BLOCK_K divides
    K_PADDED; first = weight_tile(…). RMSNorm's 1/√(mean x² + eps) scales the sums at the end, so x is read once; in
    float16, where w·x might overflow before it, and for LayerNorm (norm_bias_ptr given), statistics come first.
    """
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_x[None, :] + offs_k[:, None]
    w_ptrs = w_ptr + offs_w[:, None] + offs_k[None, :]
    STATISTICS_FIRST: tl.constexpr = norm_ptr is not None and (
        norm_bias_ptr is not None or x_ptr.dtype.element_ty == tl.float16
    )
    mean = tl.zeros((ROWS,), tl.float32)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if STATISTICS_FIRST:
        mean, scale = _statistics(x_ptr, offs_x, mask_x, norm_bias_ptr, eps, K, K_PADDED, BLOCK_K, ROWS)

    squares = tl.zeros((BLOCK_K, ROWS), tl.float32)
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    operand, squares = _operand(x_ptrs, mask_x, norm_ptr, norm_bias_ptr, mean, scale, squares, 0, K, K_PADDED, BLOCK_K)
    acc = dot(first, operand, acc)
    for k in range(BLOCK_K, K_PADDED, BLOCK_K):
        w = tl.load(w_ptrs + k, mask=mask_w[:, None], other=0.0)
        operand, squares = _operand(
            x_ptrs, mask_x, norm_ptr, norm_bias_ptr, mean, scale, squares, k, K, K_PADDED, BLOCK_K
        )
        acc = dot(w, operand, acc)
    if norm_ptr is not None and not STATISTICS_FIRST:
        acc *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)[None, :]
    return acc


@triton.jit
def halves(
    x,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The upper and the lower [BLOCK, ROWS] of [2·BLOCK, ROWS]."""
    return tl.split(tl.permute(tl.reshape(x, (2, BLOCK, ROWS)), (1, 2, 0)))


@triton.jit
def _operand(
    x_ptrs,
    mask_x,
    norm_ptr,
    norm_bias_ptr,
    mean,
    scale,
    squares,
    k,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns k to k + BLOCK_K of x as the product's right operand, and the running sum of squares."""
    offs_k = k + tl.arange(0, BLOCK_K)
    mask = mask_x[None, :]
    mask_k = offs_k < K
    if K != K_PADDED:
        mask = mask & mask_k[:, None]
    x = tl.load(x_ptrs + k, mask=mask, other=0.0)
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        weight = tl.load(norm_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[:, None]
        if norm_bias_ptr is not None:
            bias = tl.load(norm_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[:, None]
            wide = (wide - mean[None, :]) * scale[None, :] * weight + bias
        else:
            squares += wide * wide
            wide = wide * scale[None, :] * weight
        x = wide.to(x.dtype)
    return x, squares


@triton.jit
def _statistics(
    x_ptr,
    offs_x,
    mask_x,
    norm_bias_ptr,
    eps,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean, zero for RMSNorm, and 1/√(variance + eps) of each row: float32 [ROWS] each."""
    offs_k = tl.arange(0, BLOCK_K)
    mean = tl.zeros((ROWS,), tl.float32)
    if norm_bias_ptr is not None:
        total = tl.zeros((BLOCK_K, ROWS), tl.float32)
        for k in range(0, K_PADDED, BLOCK_K):
            mask = mask_x[None, :] & ((k + offs_k) < K)[:, None]
            total += tl.load(x_ptr + offs_x[None, :] + (k + offs_k)[:, None], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=0) / K
    squares = tl.zeros((BLOCK_K, ROWS), tl.float32)
    for k in range(0, K_PADDED, BLOCK_K):
        mask = mask_x[None, :] & ((k + offs_k) < K)[:, None]
        x = tl.load(x_ptr + offs_x[None, :] + (k + offs_k)[:, None], mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean[None, :], 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
