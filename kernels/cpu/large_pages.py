"""Memory for what a CPU reads over and over, side by side in large pages.

A processor fetches ahead within a page, and looks up each page it enters: weights in pages of 2 MiB are read up to a
fifth faster than in those of 4 KiB. NumPy asks the system for large pages wherever it allocates 4 MiB or more.
"""

import threading
from math import prod

import numpy as np
import torch
from torch import Tensor

_BLOCK = 32 << 20
_LINE = 64
_lock = threading.Lock()
_block, _used = np.empty(0, np.uint8), 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU. Blocks are shared by tensors, and a block lives as long as one of its tensors."""
    global _block, _used
    size = prod(shape) * dtype.itemsize
    with _lock:
        if _used + size > _block.nbytes:
            block = np.empty(max(_BLOCK, size) + _LINE, np.uint8)
            _block, _used = block[-block.ctypes.data % _LINE :], 0
        start, _used = _used, _used + -(-size // _LINE) * _LINE
        return torch.from_numpy(_block[start : start + size]).view(dtype).view(shape)
