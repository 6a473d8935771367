"""Functions of single elements. Transcendental ones give an element the same bits wherever it lies.

PyTorch computes the main part of a range with vector code and its tail with scalar code, whose last bits differ, and
several threads each have a tail. Ranges of whole vectors, no longer than the span one thread takes, have none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

VECTOR = 64
ONE_THREAD = 16384


def steady(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every element of `x`, any shape; independent of the element's place and of the thread count."""
    if x.shape[-1] % VECTOR == 0 and x.numel() <= ONE_THREAD and x.stride(-1) == 1:
        return function(x)
    flat = x.reshape(-1)
    padding = -flat.numel() % VECTOR
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    if flat.numel() <= ONE_THREAD:
        result = function(flat)
    else:
        result = torch.cat([function(flat[i : i + ONE_THREAD]) for i in range(0, flat.numel(), ONE_THREAD)])
    return (result[: x.numel()] if padding else result).view(x.shape)


def known(x: Tensor) -> Tensor:
    """x, with −∞ for NaN."""
    return torch.where(x > -torch.inf, x, -torch.inf)
