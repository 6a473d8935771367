"""The memory of a device: what is free, how much of it a cache takes unasked, and running out of it."""

from __future__ import annotations

import errno
import math
from collections.abc import Generator
from contextlib import contextmanager, suppress

import torch

from ..loaders.config import ModelConfig
from ..loaders.naming import field_shapes
from .choices import check_cache_tokens
from .errors import CapacityError
from .model import Model

# What a KV cache of no given size takes at most of the memory that is free once the weights are there.
CACHE_SHARE = 0.8
# Tokens of each sequence of a full batch that it has room for then, and all that it has at least.
BATCH_CONTEXT = 2048
# How PyTorch's allocators, its operator library and C++ say on the host that there is no more.
_EXHAUSTED = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc", "out of memory")


@contextmanager
def loading(
    source: object, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Generator[None, None, None]:
    """Turn running out of memory in the block, which loads a model's weights, into a CapacityError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not exhausted(error):
            raise
        size = sum(map(math.prod, field_shapes(config).values())) * dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        raise CapacityError(
            f"{source}: its weights are {_gib(size)} in {name}, and the memory of the {device.type} ran out while they "
            f"were loaded: free some, or choose a smaller model or dtype"
        ) from error


def cache_size(model: Model, sequences: int, given: int | None) -> tuple[int, str | None]:
    """Tokens of a model's cache, and what to say where memory keeps them below its context.

    Unless they are `given`: a context, or `sequences` times `BATCH_CONTEXT`, as far as there is room for it.
    """
    given = check_cache_tokens(given)
    config, free = model.config, free_bytes(model.device)
    wanted = max(config.max_context, sequences * min(config.max_context, BATCH_CONTEXT))
    if given is not None or free is None:
        return given or wanted, None
    each = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    tokens = min(wanted, max(int(CACHE_SHARE * free / each), BATCH_CONTEXT))
    if tokens >= config.max_context:
        return tokens, None
    return tokens, (
        f"the KV cache holds {tokens} tokens of the model's context of {config.max_context}: {CACHE_SHARE:.0%} of the "
        f"{_gib(free)} that are free, and {BATCH_CONTEXT} at least; cache_tokens (--cache-tokens) sets another size"
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that nobody uses; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, IndexError), open("/proc/meminfo", encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None


def exhausted(error: Exception) -> bool:
    """Whether an error says that memory ran out, of the host or of a device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or any(said in str(error) for said in _EXHAUSTED)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
