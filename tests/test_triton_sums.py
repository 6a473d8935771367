"""Sums in the order the contract fixes, against the same additions made one by one."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from skipjack.kernels.primitives import gathered_sum, gathered_sum_of_columns, ordered_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _sums_kernel(
    x_ptr,
    ordered_ptr,
    gathered_ptr,
    columns_ptr,
    P: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
):
    """x [P, N, M] summed over P, twice [N, M], and over P and N [M]."""
    offs_p, offs_n, offs_m = tl.arange(0, P), tl.arange(0, N), tl.arange(0, M)
    x = tl.load(x_ptr + (offs_p[:, None, None] * N + offs_n[None, :, None]) * M + offs_m[None, None, :])
    tl.store(ordered_ptr + tl.arange(0, N * M), ordered_sum(tl.reshape(x, (P, N * M))))
    tl.store(gathered_ptr + offs_n[:, None] * M + offs_m[None, :], gathered_sum(x))
    tl.store(columns_ptr + offs_m, gathered_sum_of_columns(x))


def in_pairs(x: Tensor) -> Tensor:
    """Sum over the first axis: neighbours first."""
    while x.shape[0] > 1:
        x = x[0::2] + x[1::2]
    return x[0]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_sums_add_neighbours_in_pairs(parts: int) -> None:
    n, m = 16, 8
    x = torch.randn(parts, n, m, generator=torch.Generator().manual_seed(parts)).to(DEVICE)
    ordered, gathered = (torch.full((n, m), torch.nan, device=DEVICE) for _ in range(2))
    columns = torch.full((m,), torch.nan, device=DEVICE)
    _sums_kernel[(1,)](x, ordered, gathered, columns, P=parts, N=n, M=m)
    assert torch.equal(ordered, in_pairs(x))
    assert torch.equal(gathered, in_pairs(x))
    assert torch.equal(columns, in_pairs(x.reshape(parts * n, m)))
