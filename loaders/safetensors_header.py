"""The header of a safetensors file, checked in full before a byte of the data is touched."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeGuard, cast

import torch

from .errors import CheckpointError
from .json_files import GIT_LFS_POINTER, as_object, parse_object, refuse_pointer, shown

MAX_HEADER_BYTES: Final = 16_000_000
MAX_TENSORS: Final = 100_000
_MAX_DIMENSIONS: Final = 8
_METADATA_MARKS: Final = 10_000
_MAX_ELEMENTS: Final = 1 << 48
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
WEIGHT_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` and `end` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order of the data.

    Raises:
        CheckpointError: the file or a field of its header is not as the format demands; the message names both.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a safetensors file, found none") from None
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path}: cannot be opened: {getattr(problem, 'strerror', None) or problem}") from None
    try:
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: expected a regular file, found another kind")
            length = file.read(8)
            if len(length) < 8:
                raise CheckpointError(f"{path}: header length: expected 8 bytes, found a file of {len(length)}")
            header_bytes = int.from_bytes(length, "little")
            if header_bytes > MAX_HEADER_BYTES:
                refuse_pointer(path, length + file.read(len(GIT_LFS_POINTER) - 8), CheckpointError)
                raise CheckpointError(
                    f"{path}: header: expected at most {MAX_HEADER_BYTES} bytes, found {header_bytes}"
                )
            if 8 + header_bytes > status.st_size:
                raise CheckpointError(
                    f"{path}: header: expected {header_bytes} bytes, found a file that ends after {status.st_size - 8}"
                )
            content = file.read(header_bytes)
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read: {problem.strerror}") from None
    if len(content) != header_bytes:
        raise CheckpointError(f"{path}: header: expected {header_bytes} bytes, found {len(content)}")
    if not content.startswith(b"{"):
        raise CheckpointError(
            f"{path}: header: expected a JSON object that starts with '{{', found {shown(content[:8])}"
        )
    _check_build(path, content)
    return _entries(path, parse_object(content, f"{path}: header", CheckpointError), 8 + header_bytes, status.st_size)


def _check_build(path: Path, content: bytes) -> None:
    """Refuse what cannot be a header by counting, before JSON objects many times its size are built from it."""
    objects = content.count(b"{")
    for mark, each in ((b"[", 2), (b'":', 4)):
        allowed = each * objects + _METADATA_MARKS
        if content.count(mark) > allowed:
            raise CheckpointError(
                f"{path}: header: expected at most {allowed} of {mark.decode()!r} for {objects} objects, "
                f"found {content.count(mark)}"
            )


def _entries(path: Path, header: dict[str, object], data_start: int, file_bytes: int) -> dict[str, TensorEntry]:
    _check_metadata(path, header.pop("__metadata__", None))
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: header: expected at most {MAX_TENSORS} tensors, found {len(header)}")
    entries = {name: _entry(path, name, fields, data_start) for name, fields in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    position = data_start
    for name, entry in ordered:
        if entry.start != position:
            kind = "an overlap" if entry.start < position else "a hole"
            expected, found = position - data_start, entry.start - data_start
            raise CheckpointError(
                f"{path}: {shown(name)}.data_offsets: expected to begin at byte {expected}, found {found} ({kind})"
            )
        position = entry.end
    if position != file_bytes:
        expected, found = position - data_start, file_bytes - data_start
        raise CheckpointError(f"{path}: data: expected {expected} bytes as the header says, found {found}")
    return dict(ordered)


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:
        return
    values = as_object(metadata)
    if values is None or not all(isinstance(value, str) for value in values.values()):
        raise CheckpointError(f"{path}: __metadata__: expected an object of strings, found {shown(metadata)}")


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    def refuse(field: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{path}: {shown(name)}{field}: expected {expected}, found {shown(found)}")

    values = as_object(fields)
    if values is None or set(values) != {"dtype", "shape", "data_offsets"}:
        raise refuse("", "an object of dtype, shape and data_offsets", fields)
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise refuse(".dtype", "a safetensors dtype", dtype)
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise refuse(".shape", f"at most {_MAX_DIMENSIONS} non-negative integers", shape)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(".data_offsets", "two integers in ascending order", offsets)
    elements = 1
    for size in shape:
        # Zero sizes count as one here, so that they cannot hide an absurd one beside them.
        elements *= max(size, 1)
        if elements > _MAX_ELEMENTS:
            raise refuse(".shape", f"at most 2**{_MAX_ELEMENTS.bit_length() - 1} elements", shape)
    bits = (0 if 0 in shape else elements) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise refuse(".data_offsets", f"{bits / 8:g} bytes for {dtype} of shape {shape}", offsets)
    return TensorEntry(path, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(entry) is int and 0 <= entry < 1 << 63 for entry in cast("list[object]", value)
    )
