"""Weights in panels, for the products of a CPU.

A panel is 48 rows of a weight, column after column, and of bfloat16 two columns side by side: memory is read in a
straight line, and a vector holds one column of sixteen weight rows. Of eight bits
panels are int32 [N / 48, K / 4, 48, 1], four columns a number.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..reference import packed
from ..values import Matrix, Norm
from . import large_pages, matrix_unit, openmp, panel_kernels, panel_steps
from .lanes import WIDTH

PANEL: int = panel_steps.PANEL
LIGHT: int = panel_steps.LIGHT
ACTIVATIONS = {None: panel_kernels.NONE, "silu_gate": panel_kernels.SILU_GATE, "gelu_tanh": panel_kernels.GELU}


def fits(weight: Tensor, parts: int = 1) -> bool:
    """Whether so many parts of the rows of a weight [N, K] can lie in panels of their own."""
    rows, columns = weight.shape
    return weight.dtype in (torch.float32, torch.bfloat16) and rows % (parts * WIDTH) == 0 and columns % 2 == 0


def pack(weight: Tensor) -> Matrix:
    """A weight [N, K] that `fits`: panels [N / 48, K, 48, 1], of bfloat16 [N / 48, K / 2, 48, 2]; rows past N are 0."""
    return Matrix(_packed(weight[None]), *weight.shape, packed=True)


def pack_gated(weight: Tensor) -> Matrix:
    """A weight [2·N, K] whose halves fit: panels as those of `pack`, one of the first half and one of the second."""
    return Matrix(_packed(weight.reshape(2, -1, weight.shape[1])), *weight.shape, packed=True, gated=True)


def _packed(parts: Tensor) -> Tensor:
    """Panels of each part [P, N, K] in turn."""
    count, rows, columns = parts.shape
    each = 2 if parts.dtype == torch.bfloat16 else 1
    padded = functional.pad(parts, (0, 0, 0, -rows % PANEL))
    panels = padded.view(count, -1, PANEL, columns // each, each).transpose(0, 1).transpose(2, 3).flatten(0, 1)
    return large_pages.empty(panels.shape, panels.dtype).copy_(panels)


def take(weight: Matrix, rows: Tensor) -> Tensor:
    """Rows int64 [N'] of a matrix that was packed by `pack`: [N', K]."""
    return weight.data[rows // PANEL, :, rows % PANEL].reshape(len(rows), weight.columns)


def quantise(weight: Matrix) -> Matrix:
    """A weight in panels in eight bits, as `packed.quantise` has them."""
    rows = weight.data.transpose(1, 2).reshape(-1, weight.columns)
    parts = 2 if weight.gated else 1
    if parts == 2:
        rows = rows.view(-1, 2, PANEL, weight.columns).transpose(0, 1)
    rows = rows.reshape(parts, -1, weight.columns)[:, : weight.rows // parts].reshape(weight.rows, -1)
    data, scale = packed.rounded(rows)
    if weight.columns % WIDTH:
        return Matrix(data, *data.shape, packed=False, scale=scale)
    return replace(weight, data=_packed(_joined(data).view(parts, -1, weight.columns // LIGHT)), scale=scale)


def _joined(digits: Tensor) -> Tensor:
    """Rows int8 [N, K] as whole numbers int32 [N, K / 4] in base 256: the first of four columns counts least."""
    joined = digits.new_zeros((len(digits), digits.shape[1] // LIGHT), dtype=torch.int32)
    for i in reversed(range(LIGHT)):
        joined = (joined << 8) + digits[:, i::LIGHT]
    return joined


def _digits(joined: Tensor) -> Tensor:
    """The columns int8 [N, K] of such rows."""
    found: list[Tensor] = []
    for _ in range(LIGHT):
        found.append(joined.to(torch.int8))
        joined = (joined - found[-1]) >> 8
    return torch.stack(found, dim=-1).flatten(1)


def take_light(weight: Matrix, rows: Tensor) -> Matrix:
    """Rows int64 [N'] of a weight that `quantise` made of one packed by `pack`, as a weight of its own."""
    assert weight.scale is not None
    data, scale = weight.data[rows // PANEL, :, rows % PANEL, 0], weight.scale[rows]
    if len(rows) % WIDTH:
        return Matrix(_digits(data), len(rows), weight.columns, packed=False, scale=scale)
    return Matrix(_packed(data[None]), len(rows), weight.columns, packed=True, scale=scale)


def product(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None = None,
    norm: Norm | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(norm(x)·Wᵀ + bias + residual): x [R, K] → [R, N], of "silu_gate" [R, N / 2].

    Rounded after the norm, the sum and the activation. The result is in `out` if given, which may be the residual
    where there is no activation; "silu_gate" is for weights that were packed by `pack_gated`.
    """
    assert weight.gated or activation != "silu_gate"
    x, half = x.contiguous(), x.dtype == torch.bfloat16
    residual = None if residual is None else residual.contiguous()
    if out is None:
        width = weight.rows // 2 if activation == "silu_gate" else weight.rows
        out = torch.empty((x.shape[0], width), dtype=x.dtype)
    panel_kernels.product(
        x.data_ptr(),
        0 if norm is None else norm.weight.data_ptr(),
        0 if norm is None or norm.bias is None else norm.bias.data_ptr(),
        0.0 if norm is None else norm.eps,
        weight.data.data_ptr(),
        0 if weight.scale is None else weight.scale.data_ptr(),
        weight.gated,
        0 if bias is None else bias.data_ptr(),
        ACTIVATIONS[activation],
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        weight.rows,
        weight.columns,
        half,
        matrix_unit.permitted(),
        torch.get_num_threads(),
        openmp.team(),
        panel_kernels.share.address,
    )
    return out
