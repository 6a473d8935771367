"""Skip sets found once, saved as JSON and known again by the model they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from ..loaders.config import ModelConfig
from ..loaders.fields import Fields
from ..loaders.json_files import parse_object, read_object, shown
from ..loaders.weights import UNSTACKED, Weights
from .errors import ConfigError, RequestError

FORMAT: Final = "skipjack skip set"
VERSION: Final = 1
MAX_BYTES: Final = 1_000_000
METHODS: Final = ("swift", "knapspec")
_SAMPLE: Final = 1024
_HASH: Final = re.compile(r"[0-9a-f]{64}")


def config_hash(config: ModelConfig) -> str:
    """SHA-256 of everything the configuration says but its dtype."""
    content = asdict(config)
    del content["dtype"]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(weights: Weights) -> str:
    """SHA-256 of each tensor's name, shape and first 1024 elements (of every layer where stacked) in bfloat16.

    A checkpoint has the same one in float32 and in bfloat16; float16 may round it to another.
    """
    digest = hashlib.sha256()
    for field in fields(weights):
        tensor: Tensor | None = getattr(weights, field.name)
        if tensor is None:
            continue
        digest.update(f"{field.name}{list(tensor.shape)}\n".encode())
        rows = tensor.reshape(1, -1) if field.name in UNSTACKED else tensor.flatten(1)
        sample = rows[:, :_SAMPLE].to(torch.bfloat16).contiguous().cpu()
        digest.update(sample.view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class SkipSet:
    """The sub-layers a draft leaves out, and the model they were found for.

    `config`, `weights`: `config_hash` and `fingerprint` of that model. `score`: matchness (swift) or predicted speed-up
    (knapspec). `num_draft_tokens`: the draft length that goes with the set, if the method chose one. `candidates`: how
    many sets were scored.
    """

    config: str
    weights: str
    method: Literal["swift", "knapspec"]
    num_layers: int
    skip_attention: tuple[int, ...]
    skip_mlp: tuple[int, ...]
    score: float
    num_draft_tokens: int | None
    candidates: int

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; one that is there is replaced.

        Raises:
            RequestError: `load` would refuse the values, or the disk refuses.
        """
        path = Path(os.path.realpath(path))
        values = {"format": FORMAT, "version": VERSION} | asdict(self)
        content = (json.dumps(values, indent=2) + "\n").encode()
        _parsed(parse_object(content, str(path), RequestError), str(path))
        if path.exists() and not path.is_file():
            raise RequestError(f"{path}: cannot be written: expected a file, found something else")
        stage = path.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            with stage.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(stage, path)
        except OSError as problem:
            raise RequestError(f"{path}: cannot be written: {problem.strerror or problem}") from None
        finally:
            with suppress(OSError):
                stage.unlink()

    @staticmethod
    def load(path: Path) -> SkipSet:
        """Read a saved set.

        Raises:
            RequestError: the file is missing, larger than 1 MB, malformed or of another version.
        """
        return _parsed(read_object(Path(path), MAX_BYTES, RequestError), str(path))

    def check(self, config: ModelConfig, weights: str, path: Path) -> None:
        """Refuse a set, loaded from `path`, that was found for a model other than that of `config` and the fingerprint
        `weights`.

        Raises:
            RequestError: the configuration's hash, the number of layers or the weights' hash differs.
        """
        if self.num_layers != config.num_layers:
            raise RequestError(f"{path}: num_layers: expected the model's {config.num_layers}, found {self.num_layers}")
        for name, expected in (("config", config_hash(config)), ("weights", weights)):
            found: str = getattr(self, name)
            if found != expected:
                raise RequestError(
                    f"{path}: {name}: expected a skip set of this model, whose {name} hash is {expected[:12]}…, "
                    f"found one of another model: {found[:12]}…"
                )


def _parsed(values: Mapping[str, object], source: str) -> SkipSet:
    try:
        return _checked(Fields(values, source))
    except ConfigError as problem:
        raise RequestError(str(problem)) from None


def _checked(values: Fields) -> SkipSet:
    if values.text("format") != FORMAT:
        raise values.refuse("format", repr(FORMAT), values.values["format"])
    values.integer("version", VERSION, VERSION)
    known = {"format", "version"} | {field.name for field in fields(SkipSet)}
    extra = sorted(values.values.keys() - known)
    if extra:
        raise RequestError(
            f"{values.source}: {shown(extra[0])}: expected no such field, found {shown(values.values[extra[0]])}"
        )
    num_layers = values.integer("num_layers", 1, 512)
    if "num_draft_tokens" not in values.values:
        raise RequestError(f"{values.source}: num_draft_tokens: expected an integer or null, found no such field")
    return SkipSet(
        config=_hash(values, "config"),
        weights=_hash(values, "weights"),
        method=_method(values),
        num_layers=num_layers,
        skip_attention=_layers(values, "skip_attention", num_layers),
        skip_mlp=_layers(values, "skip_mlp", num_layers),
        score=values.number("score", 0, 1e6),
        num_draft_tokens=values.optional_integer("num_draft_tokens", 1, 64),
        candidates=values.integer("candidates", 0, 2**53),
    )


def _hash(values: Fields, name: str) -> str:
    value = values.text(name)
    if _HASH.fullmatch(value) is None:
        raise values.refuse(name, "64 hexadecimal digits", value)
    return value


def _method(values: Fields) -> Literal["swift", "knapspec"]:
    value = values.text("method")
    if value not in METHODS:
        raise values.refuse("method", f"one of {', '.join(METHODS)}", value)
    return value


def _layers(values: Fields, name: str, num_layers: int) -> tuple[int, ...]:
    expected = f"a sorted list of different layers from 0 to {num_layers - 1}"
    entries = values.optional_list(name, num_layers)
    if entries is None:
        if name in values.values:
            raise values.refuse(name, expected, None)
        raise RequestError(f"{values.source}: {name}: expected {expected}, found no such field")
    layers: list[int] = []
    for entry in entries:
        low = layers[-1] + 1 if layers else 0
        if isinstance(entry, bool) or not isinstance(entry, int) or not low <= entry < num_layers:
            raise values.refuse(name, expected, entries)
        layers.append(entry)
    return tuple(layers)
