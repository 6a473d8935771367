"""Products of activations with weights, and how a weight lies for them."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import launch, product_rules
from .primitives import flags, gelu_tanh, prefetch_first, silu, wait_for_producers
from .products import halves, row_product, statistics_first, weighed, weight_scale, weight_tile
from .values import Matrix, Norm, Split, Stack

# Sums of a program beside whose product registers hold what they are completed with.
FEW_SUMS: tl.constexpr = tl.constexpr(1024)


def prepare(weight: Tensor) -> Matrix:
    """The physical layout of a weight [N, K] for `linear`, `qkv_rope_append`, `logits` and `head`."""
    rows, columns = weight.shape
    return Matrix(_padded(weight), rows, columns, packed=False)


def prepare_stack(weight: Tensor) -> Stack:
    """`prepare` for one weight of every layer, [L, N, K]."""
    _, rows, columns = weight.shape
    data = _padded(weight)
    return Stack(tuple(Matrix(layer, rows, columns, packed=False) for layer in data), data)


def prepare_split(weight: Tensor, rows: int) -> Matrix | Split:
    """`prepare` for a q/k/v weight [N, K] whose first `rows` rows, the queries, are often not needed.

    Here one matrix serves: programs that compute no row read nothing.
    """
    return prepare(weight)


def _padded(weight: Tensor) -> Tensor:
    columns = weight.shape[-1]
    width = launch.padded(columns)
    return weight.contiguous() if width == columns else functional.pad(weight, (0, width - columns))


@triton.jit
def _results(
    pid_n,
    offs_r,
    mask_r,
    stride_out,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where a program's results lie, int64 [BLOCK, ROWS], and which there are."""
    offs_n = pid_n * BLOCK + tl.arange(0, BLOCK)
    return offs_r[None, :] * stride_out + offs_n[:, None], mask_r[None, :] & (offs_n < OUT)[:, None]


@triton.jit
def _terms(
    bias_ptr,
    offs_w,
    mask_w,
    scale_ptr,
    offs_r,
    mask_r,
    residual_ptr,
    offs_out,
    mask,
):
    """What a product is completed with: bias [BLOCK_N], scale [ROWS], residual [BLOCK, ROWS]; 0 where there is none."""
    bias, scale, residual = 0.0, 0.0, tl.zeros(mask.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_r, mask=mask_r, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs_out, mask=mask, other=0.0).to(tl.float32)
    return bias, scale, residual


@triton.jit(do_not_specialize=["rows", "ahead"], do_not_specialize_on_alignment=["active_ptr"])
def _linear_kernel(
    x_ptr,
    norm_ptr,
    norm_bias_ptr,
    inverse_rms_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    scale_ptr,
    active_ptr,
    residual_ptr,
    ahead_ptr,
    out_ptr,
    stride_x,
    stride_out,
    rows,
    eps,
    ahead,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SETTLED: tl.constexpr,
    PDL: tl.constexpr,
):
    """scale·activation(norm(x)·Wᵀ + bias) + residual → out.

    x [R, K]; W [N, K_PADDED]; norm, norm_bias [K]; inverse_rms float32 [R], of x that is `weighed`; bias [N]; scale
    float32 [R]; active bool [R]; residual, out [R, N], with "silu_gate" [R, N/2].
    """
    GATED: tl.constexpr = ACTIVATION == "silu_gate"
    BLOCK: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    OUT: tl.constexpr = N // 2 if GATED else N
    EARLY: tl.constexpr = BLOCK_N * ROWS <= FEW_SUMS
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pid_n = tl.program_id(1).to(tl.int64)
    offs_b = tl.arange(0, BLOCK_N)
    offs_w = pid_n * BLOCK + offs_b % BLOCK
    # A mask takes registers, and blocks that fill the weight need none.
    mask_w = offs_w < OUT if OUT % BLOCK != 0 else offs_b >= 0
    offs_w += offs_b // BLOCK * OUT
    mask_r = offs_r < rows
    mask_out = mask_r
    if SETTLED:
        mask_out = flags(active_ptr, offs_r, mask_r)
        if tl.max(mask_out.to(tl.int32), axis=0) == 0:
            wait_for_producers(PDL)
            return
    if active_ptr is None or SETTLED:
        first = weight_tile(w_ptr, offs_w * K_PADDED, mask_w, K_PADDED, BLOCK_K, PARTS, CHUNK)
        if ahead_ptr is not None:
            prefetch_first(ahead_ptr, ahead)
        wait_for_producers(PDL)
    else:
        wait_for_producers(PDL)
        mask_out = mask_r & (tl.load(active_ptr + offs_r, mask=mask_r, other=0) != 0)
        if tl.max(mask_out.to(tl.int32), axis=0) == 0:
            return
        first = weight_tile(w_ptr, offs_w * K_PADDED, mask_w, K_PADDED, BLOCK_K, PARTS, CHUNK)
    if EARLY:
        offs_out, mask = _results(pid_n, offs_r, mask_out, stride_out, OUT, BLOCK)
        bias, scale, residual = _terms(
            bias_ptr, offs_w, mask_w, scale_ptr, offs_r, mask_r, residual_ptr, offs_out, mask
        )
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
    if not EARLY:
        offs_out, mask = _results(pid_n, offs_r, mask_out, stride_out, OUT, BLOCK)
        bias, scale, residual = _terms(
            bias_ptr, offs_w, mask_w, scale_ptr, offs_r, mask_r, residual_ptr, offs_out, mask
        )
    if bias_ptr is not None:
        y += bias[:, None]
    if GATED:
        gate, up = halves(y, BLOCK, ROWS)
        y = silu(gate) * up
    elif ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    if scale_ptr is not None:
        y = tl.fma(y, tl.broadcast_to(scale[None, :], y.shape), residual)
    elif residual_ptr is not None:
        y += residual
    tl.store(out_ptr + offs_out, y.to(out_ptr.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weight: Matrix,
    *,
    tile: int | None,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    active: Tensor | None = None,
    settled: bool = False,
    ahead: Matrix | None = None,
) -> Tensor:
    """scale·activation(norm(x)·Wᵀ + bias), added in place to `residual` where that is given.

    x [R, K], W [N, K] → [R, N]; with activation "silu_gate" W holds gate rows above up rows and the result is
    silu(gate)·up, [R, N/2]; "gelu_tanh" is elementwise. `scale` float32 [R]. `active` bool [R]: rows that are False
    leave `residual` untouched (their result is undefined without one); `settled`: the kernel launched just before has
    not written it, so that it and the weights can be read before that one ends. `ahead`: a weight that the kernel after
    this one reads, which the L2 cache is asked for while this one waits, unless there is `active` that is not settled.
    With and without it are two kernels: where what follows is not always known, one of no rows asks for nothing.
    """
    rows = x.shape[0]
    x = launch.rows_of(x)
    width = weight.rows // 2 if activation == "silu_gate" else weight.rows
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device) if residual is None else residual
    arch = launch.architecture()
    short = statistics_first(norm, x.dtype)
    rule = product_rules.product_rule(
        weight.rows, weight.columns, rows, tile, x.element_size(), arch, normed=norm is not None, short=short
    )
    if weight.scale is not None:
        rule = rule.light(weight.columns, x.element_size())
    block = rule.block_n // 2 if activation == "silu_gate" else rule.block_n
    eps = 0.0 if norm is None else norm.eps
    settled = settled and active is not None and active.is_contiguous() and launch.dependent(arch)
    asked = ahead if (active is None or settled) and launch.asks(arch) else None
    x, norm, inverse_rms = weighed(x, norm, rule)
    _linear_kernel[(triton.cdiv(rows, rule.rows), triton.cdiv(width, block))](
        x,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        inverse_rms,
        weight.data,
        weight.scale,
        bias,
        None if scale is None else scale.contiguous(),
        None if active is None else active.contiguous(),
        residual,
        None if asked is None else asked.data,
        out,
        x.stride(0),
        out.stride(0),
        rows,
        eps,
        0 if asked is None else launch.ahead_bytes(asked.data.nbytes),
        N=weight.rows,
        K=weight.columns,
        K_PADDED=weight.data.shape[-1],
        ACTIVATION=activation,
        BLOCK_N=rule.block_n,
        BLOCK_K=rule.block_k,
        PARTS=rule.parts,
        CHUNK=rule.chunk,
        ROWS=rule.rows,
        SETTLED=settled,
        **launch.options(rule.warps, rule.stages, rule.registers),
    )
    return out


def logits(x: Tensor, norm: Norm, weight: Matrix, *, tile: int | None, active: Tensor | None = None) -> Tensor:
    """norm(x)·Wᵀ: x [R, H], W [V, H] → [R, V]; rows that are not `active` bool [R] are undefined."""
    return linear(x, weight, tile=tile, norm=norm, active=active)
