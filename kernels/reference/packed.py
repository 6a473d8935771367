"""Weights reordered for the CPU's matrix units, and the products with them.

oneDNN's blocked layout, through the two operators PyTorch's own compiler uses, costs about the same for one row and for
a tile of eight, and rounds every row of a fixed tile alike. The operators are private to PyTorch, so they
are probed once per dtype; where they are missing the plain product on the same tile is used, and `Ops.description`
says which of the two is in use. Where numba is installed most weights lie in `panels` instead.
"""

from functools import cache

import torch
from torch import Tensor

from ..values import Matrix

PACKED_ROWS = 8


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

        taken = panels.take(weight, rows)
        return panels.pack(taken) if panels.fits(taken) else pack(taken)
    if weight.packed:
        return pack(weight.data.to_dense()[rows])
    return Matrix(weight.data[rows], len(rows), weight.columns, packed=False)


def product(x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [M, columns] · weightᵀ + bias + residual → [M, rows], rounded once on the packed path."""
    if weight.in_panels:
        from ..cpu import panels

        return panels.product(x, weight, bias, residual)
    if weight.packed and residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight.data, bias, "add")
    if weight.packed:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight.data, bias, "none", [], "")
    y = torch.nn.functional.linear(x, weight.data, bias)
    return y if residual is None else y + residual
