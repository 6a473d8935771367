"""RMSNorm and LayerNorm on their own; the products have them built in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers
from .values import Norm


@triton.jit
def _normalise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_x,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """w·x/√(mean x² + eps); with bias w·(x − mean)/√(var + eps) + b. [R, H] → [R, H]."""
    pid_row = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    wait_for_producers(PDL)
    x = tl.load(x_ptr + pid_row * stride_x + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = tl.where(mask_h, x - tl.sum(x) / H, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x) / H + eps) * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    tl.store(out_ptr + pid_row * H + offs_h, y, mask=mask_h)


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm: w·x/√(mean x² + eps); LayerNorm: w·(x − mean)/√(var + eps) + b. [R, H] → [R, H]."""
    rows, hidden = x.shape
    x = launch.rows_of(x)
    out = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    rule = launch.norm_rule(hidden)
    _normalise_kernel[(rows,)](
        x,
        norm.weight,
        norm.bias,
        out,
        x.stride(0),
        norm.eps,
        H=hidden,
        BLOCK_H=rule.block,
        **launch.options(rule.warps),
    )
    return out
