"""Where a model lies, however it is named."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from .errors import ConfigError

DEMO: Final = "demo"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?")
Progress = Callable[[str, int, int], None]


def check_name(model: str | Path) -> None:
    """Refuse, with ConfigError, what is neither a folder, nor "demo", nor a hub id that could be fetched."""
    if not isinstance(cast(object, model), (str, os.PathLike)):
        raise ConfigError(f'MODEL: expected a model folder, "{DEMO}" or a hub id org/name, got {model!r}')
    if str(model) == DEMO or os.path.isdir(model):
        return
    if _HUB_ID.fullmatch(str(model)) is None:
        raise ConfigError(
            f'MODEL: expected a model folder, "{DEMO}" or a hub id org/name, got {str(model)!r}, which is not a folder'
        )
    parent, _, name = str(model).partition("/")
    if "@" not in name and os.path.isdir(parent):
        raise ConfigError(f"MODEL: {parent} is a folder without {name}; on the hub it is {model}@main")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f'MODEL: expected a model folder or "{DEMO}", got {str(model)!r}, which is not a folder; '
            "as a hub id it needs a package: pip install huggingface-hub"
        )


def locate(model: str | Path, progress: Progress | None = None) -> Path:
    """The folder of a model: a local one where there is one, "demo" for the packaged model, else the hub's org/name.

    What is not on this machine yet is made or downloaded; `progress` is called with a label, what is done and what
    there is to do.

    Raises:
        ConfigError: it is none of these.
        CheckpointError: it cannot be made or downloaded.
    """
    check_name(model)
    if str(model) == DEMO:
        from .demo import demo_folder

        return demo_folder(progress)
    if os.path.isdir(model):
        return Path(model)
    from .hub import hub_folder

    return hub_folder(str(model), progress)
