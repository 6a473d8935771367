"""Memory for what a CPU reads over and over, side by side in large pages.

A processor fetches ahead within a page, and looks up each page it enters: weights in pages of 2 MiB are read up to a
fifth faster than in those of 4 KiB. NumPy asks the system for large pages wherever it allocates 4 MiB or more.
"""

import threading
from math import prod
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

_BLOCK = 32 << 20
_LINE = 64
_lock = threading.Lock()
# The newest block, while one of its tensors is there, and where the rest of it begins.
_newest: ref[np.ndarray[Any, Any]] | None = None
_rest = 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU. Blocks are shared by tensors, and a block lives as long as one of its tensors."""
    global _newest, _rest
    size = prod(shape) * dtype.itemsize
    with _lock:
        block = None if _newest is None else _newest()
        if block is None or _rest + size > block.nbytes:
            block = np.empty(max(_BLOCK, size) + _LINE, np.uint8)
            _newest, _rest = ref(block), -block.ctypes.data % _LINE
        start, _rest = _rest, _rest + -(-size // _LINE) * _LINE
        return torch.from_numpy(block[start : start + size]).view(dtype).view(shape)
