"""Errors of a request; those of a model folder live with the loaders."""

from ..loaders.errors import CheckpointError, ConfigError, SkipjackError, TokenizerError


class RequestError(SkipjackError):
    """The request asks for something that cannot be served."""


class AbortedError(RequestError):
    """Not the request's fault: the engine is closed, or a round that it shared with another request failed."""


class CapacityError(SkipjackError):
    """The request, or the model, is valid but does not fit into the memory there is."""


class BusyError(CapacityError):
    """The memory is held by other requests, none of which got on while this one waited; later it may fit."""


def out_of_range(where: str, dtype: object) -> RequestError:
    """What is said of activations that leave the range of a dtype of PyTorch: no token would mean anything."""
    name = str(dtype).removeprefix("torch.")
    return RequestError(
        f"{where}: the model's activations leave the range of {name}: expected finite ones, as another dtype (--dtype) "
        "may give"
    )


class CompilationError(SkipjackError):
    """A strict engine that was warmed up would have had to compile a kernel."""


__all__ = [
    "AbortedError",
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "CompilationError",
    "ConfigError",
    "RequestError",
    "SkipjackError",
    "TokenizerError",
    "out_of_range",
]
