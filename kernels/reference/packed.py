"""Weights reordered for the CPU's matrix units, and the products with them.

oneDNN's blocked layout, through the two operators PyTorch's own compiler uses, costs about the same for one row and for
a tile of eight, and rounds every row of a fixed tile alike. The operators are private to PyTorch, so they
are probed once per dtype; where they are missing the plain product on the same tile is used, and `Ops.description`
says which of the two is in use. Where numba is installed most weights lie in `panels` instead.
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..values import Matrix

PACKED_ROWS = 8
# The largest magnitude of a quantised weight.
LARGEST = 127


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product works here for `dtype` and agrees with the plain one."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x = torch.randn(PACKED_ROWS, 32, generator=generator).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise.binary(x, product, packed, None, "add")
    except (RuntimeError, AttributeError):
        return False
    expected = x.double() @ weight.double().T
    return bool(torch.allclose(product.double(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max())))


def pack(weight: Tensor) -> Matrix:
    """Reorder `weight` [rows, columns] where the packed product is available, else keep it as it is."""
    rows, columns = weight.shape
    if weight.device.type == "cpu" and available(weight.dtype):
        data = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return Matrix(data, rows, columns, packed=True)
    return Matrix(weight, rows, columns, packed=False)


def take_rows(weight: Matrix, rows: Tensor) -> Matrix:
    """The given rows int64 [N'] of a weight, as a weight of its own in the same layout."""
    if weight.in_panels:
        from ..cpu import panels

        if weight.scale is not None:
            return panels.take_light(weight, rows)
        taken = panels.take(weight, rows)
        return panels.pack(taken) if panels.fits(taken) else pack(taken)
    if weight.packed:
        return pack(weight.data.to_dense()[rows])
    scale = None if weight.scale is None else weight.scale[rows]
    return Matrix(weight.data[rows], len(rows), weight.columns, packed=False, scale=scale)


def quantise(weight: Matrix) -> Matrix:
    """A weight in eight bits, each row symmetric about 0: the nearest multiples of its greatest magnitude ÷ 127."""
    data, scale = rounded(weight.data.to_dense() if weight.packed else weight.data)
    return replace(weight, data=data, packed=False, scale=scale)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] as int8 [N, K] and scale float32 [N], of which they are about the product; 0 of a row of zeros."""
    steps = weight.to(torch.float32, copy=True)
    low, high = torch.aminmax(steps, dim=1)
    scale = torch.maximum(-low, high) / LARGEST
    steps /= scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def product(x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [M, columns] · weightᵀ + bias + residual → [M, rows], rounded once on the packed path."""
    if weight.in_panels:
        from ..cpu import panels

        return panels.product(x, weight, bias, residual)
    if weight.scale is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = (x.to(wide) @ weight.data.to(wide).T) * weight.scale
        for added in (bias, residual):
            y = y if added is None else y + added
        return y.to(x.dtype)
    if weight.packed and residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight.data, bias, "add")
    if weight.packed:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight.data, bias, "none", [], "")
    y = torch.nn.functional.linear(x, weight.data, bias)
    return y if residual is None else y + residual
