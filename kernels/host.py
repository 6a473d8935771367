"""Reading device values on the host: every such read is a place where the host waits."""

from typing import cast

from torch import Tensor


def ints(tensor: Tensor) -> list[int]:
    """The values of a 1-D integer tensor."""
    return cast("list[int]", tensor.tolist())
