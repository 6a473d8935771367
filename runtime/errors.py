"""Errors of a request; those of a model folder live with the loaders."""

from ..loaders.errors import CheckpointError, ConfigError, SkipjackError, TokenizerError


class RequestError(SkipjackError):
    """The request asks for something that cannot be served."""


class CapacityError(SkipjackError):
    """The request is valid but does not fit into the memory there is."""


__all__ = ["CapacityError", "CheckpointError", "ConfigError", "RequestError", "SkipjackError", "TokenizerError"]
