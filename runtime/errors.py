"""Errors of a request; those of a model folder live with the loaders."""

from ..loaders.errors import CheckpointError, ConfigError, SkipjackError, TokenizerError


class RequestError(SkipjackError):
    """The request asks for something that cannot be served."""


class CapacityError(SkipjackError):
    """The request is valid but does not fit into the memory there is."""


class CompilationError(SkipjackError):
    """A strict engine that was warmed up would have had to compile a kernel."""


__all__ = [
    "CapacityError",
    "CheckpointError",
    "CompilationError",
    "ConfigError",
    "RequestError",
    "SkipjackError",
    "TokenizerError",
]
