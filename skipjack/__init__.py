"""Skipjack: layer skipping that pays in milliseconds, with the same text, bit for bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime.engine import Engine
    from .runtime.errors import (
        AbortedError,
        BusyError,
        CapacityError,
        CheckpointError,
        CompilationError,
        ConfigError,
        RequestError,
        SkipjackError,
        TokenizerError,
    )
    from .runtime.forced import Scored
    from .runtime.metrics import Metrics
    from .runtime.plan import LayerPlan
    from .runtime.request import Choice, Chunk, Output, Piece, SamplingParams, Stats, TokenLogprob
    from .runtime.stream import AsyncStream, Stream
    from .runtime.warm_up import WarmUp

if TYPE_CHECKING:
    __version__: str
__all__ = [
    "AbortedError",
    "AsyncStream",
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "Choice",
    "Chunk",
    "CompilationError",
    "ConfigError",
    "Engine",
    "LayerPlan",
    "Metrics",
    "Output",
    "Piece",
    "RequestError",
    "SamplingParams",
    "Scored",
    "SkipjackError",
    "Stats",
    "Stream",
    "TokenLogprob",
    "TokenizerError",
    "WarmUp",
    "__version__",
]

_HOMES = {
    "AsyncStream": "stream",
    "Choice": "request",
    "Chunk": "request",
    "Engine": "engine",
    "LayerPlan": "plan",
    "Metrics": "metrics",
    "Output": "request",
    "Piece": "request",
    "SamplingParams": "request",
    "Scored": "forced",
    "Stats": "request",
    "Stream": "stream",
    "TokenLogprob": "request",
    "WarmUp": "warm_up",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import skipjack` stays free of torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return import_module("importlib.metadata").version("skipjack")
    value = getattr(import_module(f".runtime.{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
