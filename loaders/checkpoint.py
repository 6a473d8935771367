"""Checkpoint: the tensors of a model folder, validated at the door and mapped, not copied."""

from __future__ import annotations

import mmap
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType

import torch

from .errors import CheckpointError
from .json_files import as_object, present, read_object, shown
from .safetensors_header import MAX_TENSORS, WEIGHT_DTYPES, TensorEntry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 16_000_000
_MAX_SHARDS = 4096
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


class Checkpoint:
    """The tensors of one model.safetensors, without it of the shards that model.safetensors.index.json lists.

    Opening reads and checks every header and compares sizes; data is read when a tensor is.
    """

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self._entries = entries
        self._maps: dict[Path, mmap.mmap] = {}

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Open a model folder.

        Raises:
            CheckpointError: no safetensors there, or a file is malformed; the message names file and field.
        """
        folder = Path(folder)
        # The order of other libraries, which leave an old index beside new weights.
        if present(folder / SINGLE_FILE, CheckpointError):
            return Checkpoint(read_header(folder / SINGLE_FILE))
        if present(folder / INDEX_FILE, CheckpointError):
            return Checkpoint(_sharded(folder))
        pickles = (
            sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)) if os.path.isdir(folder) else []
        )
        if pickles:
            raise CheckpointError(
                f"{folder}: expected {SINGLE_FILE}, found {pickles[0]}: pickled weights can run code and are never read"
            )
        raise CheckpointError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")

    @staticmethod
    def of_file(path: Path) -> Checkpoint:
        """Open one safetensors file. Raises CheckpointError where it is missing or malformed."""
        return Checkpoint(read_header(path))

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The dtype by its safetensors name, such as BF16."""
        return self._entry(name).dtype

    def file(self, name: str) -> Path:
        return self._entry(name).file

    def size(self, name: str) -> int:
        """The tensor's bytes in the file."""
        entry = self._entry(name)
        return entry.end - entry.start

    def check_dtype(self, name: str) -> None:
        """Refuse, with CheckpointError, a tensor whose dtype is not F64, F32, F16 or BF16."""
        entry = self._entry(name)
        if entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{entry.file}: {shown(name)}.dtype: expected one of {', '.join(WEIGHT_DTYPES)}, found {entry.dtype}"
            )

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapped file; valid for as long as it lives, not to be written to.

        Raises:
            CheckpointError: no such tensor, a dtype that is not F64, F32, F16 or BF16, or a file that has changed.
        """
        self.check_dtype(name)
        entry = self._entry(name)
        dtype = WEIGHT_DTYPES[entry.dtype]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        mapping = self._map(entry.file)
        if len(mapping) < entry.end:
            raise CheckpointError(f"{entry.file}: expected {entry.end} bytes or more, found {len(mapping)}")
        count = (entry.end - entry.start) // dtype.itemsize
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def close(self) -> None:
        """Forget the mappings; each is given back when its last view goes."""
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            files = sorted({str(entry.file) for entry in self._entries.values()}) or ["the checkpoint"]
            raise CheckpointError(f"{files[0]}: expected a tensor {shown(name)}, found none") from None

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with open(path, "rb") as file:
                    # A private copy-on-write mapping: torch wants a writable buffer, the file must never change.
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as problem:
                raise CheckpointError(f"{path}: cannot be mapped: {problem}") from None
        return self._maps[path]


def shard_names(index_path: Path) -> set[str]:
    """The files an index names, all of them bare file names.

    Raises:
        CheckpointError: it is malformed.
    """
    return set(_read_index(index_path).values())


def _read_index(index_path: Path) -> dict[str, str]:
    """The file of every tensor."""
    weight_map = read_object(index_path, _MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    places = as_object(weight_map)
    if not places:
        raise CheckpointError(f"{index_path}: weight_map: expected an object of file names, found {shown(weight_map)}")
    if len(places) > MAX_TENSORS:
        raise CheckpointError(f"{index_path}: weight_map: expected at most {MAX_TENSORS} entries, found {len(places)}")
    named = {name: _shard_name(index_path, name, shard) for name, shard in places.items()}
    shards = len(set(named.values()))
    if shards > _MAX_SHARDS:
        raise CheckpointError(f"{index_path}: weight_map: expected at most {_MAX_SHARDS} files, found {shards}")
    return named


def _sharded(folder: Path) -> dict[str, TensorEntry]:
    index_path = folder / INDEX_FILE
    places = _read_index(index_path)
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(places.values())):
        if not present(folder / shard, CheckpointError):
            raise CheckpointError(f"{index_path}: weight_map: expected the file {shown(shard)} beside it, found none")
        for name, entry in read_header(folder / shard).items():
            if places.get(name) != shard:
                expected = shown(places[name]) if name in places else "no shard"
                raise CheckpointError(
                    f"{folder / shard}: {shown(name)}: expected in {expected} by {INDEX_FILE}, found here"
                )
            entries[name] = entry
    for name, shard in places.items():
        if name not in entries:
            raise CheckpointError(
                f"{index_path}: weight_map: expected {shown(name)} in {shown(shard)}, found it absent"
            )
    return entries


def _shard_name(index_path: Path, tensor: str, shard: object) -> str:
    """A bare file name: a path could lead out of the folder."""
    if not isinstance(shard, str):
        raise CheckpointError(f"{index_path}: weight_map.{shown(tensor)}: expected a file name, found {shown(shard)}")
    bare = shard not in ("", ".", "..") and shard == PurePosixPath(shard).name == PureWindowsPath(shard).name
    if not bare or "\0" in shard or not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{index_path}: weight_map.{shown(tensor)}: expected a bare .safetensors file name, found {shown(shard)}"
        )
    return shard
