"""Model folders out: safetensors and config.json, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor

from .checkpoint import INDEX_FILE, SINGLE_FILE
from .errors import CheckpointError


@contextmanager
def staged_folder(target: Path, *, mend: bool = False) -> Generator[Path]:
    """A folder beside `target` that takes its place when the block ends, and is removed when it raises.

    With `mend` a folder that is there already keeps its place, and each file takes that of its own: who reads it, or
    mends it at the same time, never finds a file gone that was there.

    Raises:
        CheckpointError: `target` is there already and is not an empty folder, or not to be mended, or the disk refuses.
    """
    stage = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        if not mend and os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target}: cannot be written: it is there already and no empty folder")
        stage.mkdir(parents=True)
        yield stage
        if mend and target.is_dir():
            for file in list(stage.iterdir()):
                os.replace(file, target / file.name)
        else:
            os.replace(stage, target)
    except OSError as problem:
        raise CheckpointError(f"{target}: cannot be written: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    config_fields: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int | None = None,
    files: Iterable[Path] = (),
) -> None:
    """Write a new model folder; `max_shard_bytes` splits the tensors into shards with an index, `files` are copied.

    Raises:
        CheckpointError: the folder is there already and not empty, or cannot be written.
    """
    with staged_folder(Path(folder)) as stage:
        write_checkpoint(stage, config_fields, tensors, max_shard_bytes, files)


def write_checkpoint(
    folder: Path,
    config_fields: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int | None = None,
    files: Iterable[Path] = (),
) -> None:
    """What `save_checkpoint` writes, into a folder that is there; OSError where the disk refuses."""
    write_json(folder / "config.json", config_fields)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if max_shard_bytes is None:
        write_tensors(folder / SINGLE_FILE, tensors)
        return
    shards = _shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards
