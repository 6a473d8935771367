"""Triton's interpreter as the tests use it: conversions of bfloat16, and shapes and types it remembers."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from skipjack.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


@triton.jit
def convert_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OTHER: tl.constexpr):
    rows, columns, other = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, OTHER)
    x = tl.load(x_ptr + rows)[:, None]
    y = tl.load(y_ptr + columns)[None, :]
    total = x + y + tl.zeros((ROWS, OTHER), tl.int32)
    tl.store(out_ptr + rows[:, None] * OTHER + other[None, :], total)


def test_every_bfloat16_is_the_same_number_in_float32_and_back() -> None:
    """Numbers below the least normal one too, which Triton's own interpreter converts to others."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide, back = torch.full((1 << 16,), 7.0), torch.full((1 << 16,), 7.0, dtype=torch.bfloat16)
    convert_kernel[(1,)](x, wide, N=1 << 16)
    assert torch.equal(wide[~x.isnan()].view(torch.int32), x.float()[~x.isnan()].view(torch.int32))
    assert wide[x.isnan()].isnan().all()
    convert_kernel[(1,)](wide, back, N=1 << 16)
    assert torch.equal(back.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.float32), (torch.bool, torch.int8)])
def test_operands_of_any_shapes_and_types_give_what_torch_gives(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for rows, columns in ((4, 8), (8, 4), (1, 8), (4, 1), (4, 4)):
        x, y = (torch.arange(n).remainder(3).to(dtype) for n, dtype in zip((rows, columns), dtypes, strict=True))
        out = torch.full((rows, columns), -1.0)
        add_kernel[(1,)](x, y, out, ROWS=rows, COLUMNS=columns, OTHER=columns)
        assert torch.equal(out, x[:, None].float() + y[None].float())


def test_shapes_that_do_not_fit_each_other_are_refused() -> None:
    x, out = torch.zeros(4), torch.zeros(4, 8)
    with pytest.raises(Exception, match="incompatible dimensions"):
        add_kernel[(1,)](x, x, out, ROWS=4, COLUMNS=4, OTHER=8)
