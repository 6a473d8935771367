"""What an engine is told by name: the device, the type to compute in, the op table."""

from __future__ import annotations

from typing import cast

import torch

from ..kernels import environment, ops
from ..loaders.config import ModelConfig
from .errors import RequestError
from .request import MOST_SEQUENCES, integer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(dtype: str, config: ModelConfig) -> torch.dtype:
    """The type to compute in: the named one, or for auto the checkpoint's own.

    Raises:
        RequestError: the checkpoint's own is none of those there are.
    """
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise RequestError(f"dtype: expected one of {', '.join(DTYPES)}, got auto for a checkpoint in {name}")
    return DTYPES[name]


def place_of(device: str) -> torch.device:
    """The device of that name, auto being the GPU where there is one; RequestError where torch can use no GPU."""
    one_of("device", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device: expected a GPU that torch {torch.__version__} can use for cuda, found none")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def table_of(backend: str, device: torch.device, numerics: str) -> ops.Ops:
    """The op table of that name, auto being the device's own.

    Raises:
        RequestError: there is none of that name or it cannot run, or an environment variable says what means nothing.
    """
    check_environment()
    one_of("backend", backend, ("auto", "torch", "triton"))
    one_of("numerics", numerics, ("exact", "fast"))
    chosen = backend if backend != "auto" else "triton" if device.type == "cuda" else "torch"
    obstacle = ops.obstacle(chosen, device)
    if obstacle:
        raise RequestError(f"backend: {chosen} cannot run on {device.type}: {obstacle}")
    return ops.select(chosen, numerics)


def check_environment() -> None:
    """Refuse values of environment variables that mean nothing, with a RequestError."""
    try:
        environment.check()
    except environment.VariableError as problem:
        raise RequestError(str(problem)) from problem


def check_cache_tokens(tokens: int | None) -> int | None:
    """A number of cached tokens as Python's, or None; RequestError where it is neither."""
    return None if tokens is None else integer("cache_tokens", tokens, 1)


def check_max_sequences(sequences: int) -> int:
    """How many sequences run together at most, as Python's; RequestError where it is none of 1 to MOST_SEQUENCES."""
    return integer("max_sequences", sequences, 1, MOST_SEQUENCES)


def check_switches(graphs: bool | None, strict: bool, prefix_caching: bool) -> None:
    """Refuse what is neither on nor off, with a RequestError: the text "false" would be on."""
    if graphs is not None and not isinstance(cast(object, graphs), bool):
        raise RequestError(f"graphs: expected True, False or None, got {graphs!r}")
    for name, value in (("strict", strict), ("prefix_caching", prefix_caching)):
        if not isinstance(cast(object, value), bool):
            raise RequestError(f"{name}: expected True or False, got {value!r}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is no choice, with a RequestError."""
    if value not in choices:
        raise RequestError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
