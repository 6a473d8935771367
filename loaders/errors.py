"""Errors a user can meet. Each message names what was expected, what was found and where."""


class SkipjackError(Exception):
    """Base of every error Skipjack raises on purpose."""


class ConfigError(SkipjackError):
    """config.json is missing, malformed or describes a model that is not supported."""


class CheckpointError(SkipjackError):
    """The weights are missing, malformed or do not match config.json."""


class TokenizerError(SkipjackError):
    """The tokenizer or chat template is missing, malformed or unusable."""
