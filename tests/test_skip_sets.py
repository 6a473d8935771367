"""Saved skip sets: round trips, every refusal by file and field, and whose model they are."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipjack.kernels.host import ints
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.loaders.weights import Weights, load_weights
from skipjack.runtime.errors import RequestError
from skipjack.runtime.skip_sets import SkipSet, config_hash, fingerprint

FOUND = SkipSet("a" * 64, "0f" * 32, "swift", 8, (1, 3), (2, 3, 6), 0.84375, 7, 312)
SAVED: Mapping[str, object] = {
    "format": "skipjack skip set",
    "version": 1,
    "config": "a" * 64,
    "weights": "0f" * 32,
    "method": "swift",
    "num_layers": 8,
    "skip_attention": [1, 3],
    "skip_mlp": [2, 3, 6],
    "score": 0.84375,
    "num_draft_tokens": 7,
    "candidates": 312,
}
SHAPES = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-bloom"]


def model(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[ModelConfig, Weights]:
    config = ModelConfig.parse(synthetic_config(shape), shape)
    return config, synthetic_weights(config, seed, dtype)


@pytest.mark.parametrize(
    "found",
    [FOUND, replace(FOUND, method="knapspec", num_draft_tokens=None, skip_attention=(), score=1.31, candidates=0)],
)
def test_round_trip(tmp_path: Path, found: SkipSet) -> None:
    path = tmp_path / "set.json"
    found.save(path)
    assert SkipSet.load(path) == found
    replace(found, score=0.5).save(path)
    assert SkipSet.load(path).score == 0.5
    assert os.listdir(tmp_path) == ["set.json"]


def test_file_is_the_documented_json(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    FOUND.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == SAVED
    path.write_text(json.dumps(SAVED), encoding="utf-8")
    assert SkipSet.load(path) == FOUND


@pytest.mark.parametrize("shape", SHAPES)
def test_fingerprint_is_the_same_in_float32_and_bfloat16(tmp_path: Path, shape: str) -> None:
    write_synthetic(tmp_path / shape, shape, seed=3)
    config = ModelConfig.load(tmp_path / shape)
    single, half = (load_weights(tmp_path / shape, config, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert fingerprint(single) == fingerprint(half)
    assert fingerprint(synthetic_weights(config, 4, torch.float32)) != fingerprint(single)


def test_fingerprint_is_that_of_the_documented_bytes() -> None:
    _, weights = model("tiny-qwen3", torch.bfloat16)
    digest = hashlib.sha256()
    for field in fields(weights):
        tensor = getattr(weights, field.name)
        if tensor is not None:
            digest.update(f"{field.name}{list(tensor.shape)}\n".encode())
            stacked = field.name not in (
                "embedding",
                "embedding_norm",
                "embedding_norm_bias",
                "norm",
                "norm_bias",
                "head",
            )
            for part in tensor if stacked else [tensor]:
                digest.update(bytes(ints(part.flatten()[:1024].view(torch.uint8))))
    assert fingerprint(weights) == digest.hexdigest()


@pytest.mark.parametrize("shape", SHAPES)
def test_fingerprint_changes_with_any_tensor(shape: str) -> None:
    config, weights = model(shape)
    seen = {fingerprint(weights)}
    tensors = {field.name: getattr(weights, field.name) for field in fields(weights)}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in present.items():
        changed = tensor.clone()
        changed[-1 if len(changed) == config.num_layers else 0] += 0.5
        seen.add(fingerprint(replace(weights, **{name: changed})))
    assert len(seen) == 1 + len(present)


def test_config_hash_ignores_the_dtype_alone() -> None:
    config, _ = model("tiny-llama")
    assert config_hash(replace(config, dtype="bfloat16")) == config_hash(config)
    changes: list[dict[str, Any]] = [
        {"num_layers": 9},
        {"norm_eps": 1e-6},
        {"tied_head": True},
        {"window": 8},
        {"eos_token_ids": (3,)},
        {"rope_scaling": replace(config.rope_scaling, factor=2.0)},
    ]
    assert len({config_hash(replace(config, **change)) for change in changes} | {config_hash(config)}) == 7


def test_a_set_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    config, weights = model("tiny-llama")
    found = replace(FOUND, config=config_hash(config), weights=fingerprint(weights))
    found.check(config, fingerprint(weights), path)
    _, other = model("tiny-llama", seed=1)
    with pytest.raises(
        RequestError, match=r"set\.json: weights: expected a skip set of this model, .* found .*another"
    ):
        found.check(config, fingerprint(other), path)
    with pytest.raises(RequestError, match=r"set\.json: config: expected a skip set of this model, .* found .*another"):
        found.check(replace(config, norm_eps=1e-3), fingerprint(weights), path)
    with pytest.raises(RequestError, match=r"set\.json: num_layers: expected the model's 8, found 9"):
        replace(found, num_layers=9).check(config, fingerprint(weights), path)


NOTHING = object()
MALFORMED = [
    ("format", "another", "format: expected 'skipjack skip set', found 'another'"),
    ("format", 1, "format: expected a string, found 1"),
    ("version", 2, "version: expected an integer from 1 to 1, found 2"),
    ("version", "1", "version: expected an integer .* found '1'"),
    ("version", True, "version: expected an integer .* found True"),
    ("colour", "red", "'colour': expected no such field, found 'red'"),
    ("config", "abc", "config: expected 64 hexadecimal digits, found 'abc'"),
    ("config", "A" * 64, "config: expected 64 hexadecimal digits"),
    ("weights", None, "weights: expected a string, found None"),
    ("method", "clasp", "method: expected one of swift, knapspec, found 'clasp'"),
    ("num_layers", 0, "num_layers: expected an integer from 1 to 512, found 0"),
    ("num_layers", 6, r"skip_mlp: expected a sorted list of different layers from 0 to 5, found \[2, 3, 6\]"),
    ("skip_attention", [-1], r"skip_attention: expected a sorted list .* found \[-1\]"),
    ("skip_attention", [3, 1], r"skip_attention: expected a sorted list .* found \[3, 1\]"),
    ("skip_attention", [1, 1], r"skip_attention: expected a sorted list .* found \[1, 1\]"),
    ("skip_attention", [True], r"skip_attention: expected a sorted list .* found \[True\]"),
    ("skip_attention", [1.0], r"skip_attention: expected a sorted list .* found \[1.0\]"),
    ("skip_mlp", None, "skip_mlp: expected a sorted list .* found None"),
    ("skip_mlp", 3, "skip_mlp: expected a list of at most 8 entries, found 3"),
    ("skip_mlp", list(range(9)), "skip_mlp: expected a list of at most 8 entries, found"),
    ("score", -0.1, "score: expected a number from 0"),
    ("score", 10**400, "score: expected a number from 0"),
    ("score", "0.5", "score: expected a number .* found '0.5'"),
    ("num_draft_tokens", 0, "num_draft_tokens: expected an integer from 1"),
    ("num_draft_tokens", 2.5, "num_draft_tokens: expected an integer from 1"),
    ("candidates", -1, "candidates: expected an integer from 0"),
    *((name, NOTHING, f"{name}: expected .* found no such field") for name in SAVED),
]


@pytest.mark.parametrize(("name", "value", "message"), MALFORMED)
def test_malformed_fields_are_refused_by_name(tmp_path: Path, name: str, value: object, message: str) -> None:
    path = tmp_path / "set.json"
    values = {**SAVED, name: value}
    if value is NOTHING:
        del values[name]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(RequestError, match=rf"set\.json: {message}"):
        SkipSet.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON, found"),
        (b"{", "expected JSON, found"),
        (b"\xff{}", "expected UTF-8, found byte 0xff at 0"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"{}", "format: expected a string, found no such field"),
        (b'{"version": 1, "version": 1}', "expected each key once, found 'version' twice"),
        (json.dumps({**SAVED, "score": float("nan")}).encode(), "expected JSON, found: NaN is not JSON"),
        (json.dumps(SAVED).replace("0.84375", "1e999").encode(), "score: expected a number .* found inf"),
        (b"[" * 100_000, "expected JSON of moderate depth"),
        (json.dumps(SAVED).encode() + b" " * 1_000_000, "expected at most 1000000 bytes, found"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "set.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=rf"set\.json: {message}"):
        SkipSet.load(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"set\.json: expected a file, found none"):
        SkipSet.load(tmp_path / "set.json")
    with pytest.raises(RequestError, match=str(tmp_path)):
        SkipSet.load(tmp_path)


def test_a_link_is_written_through_and_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    link, pipe = tmp_path / "set.json", tmp_path / "pipe"
    link.symlink_to(tmp_path / "own" / "real.json")
    FOUND.save(link)
    assert link.is_symlink()
    assert SkipSet.load(tmp_path / "own" / "real.json") == FOUND
    os.mkfifo(pipe)
    with pytest.raises(RequestError, match="pipe: cannot be written: expected a file"):
        FOUND.save(pipe)
    assert pipe.is_fifo()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "set.json"
    FOUND.save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(RequestError if isinstance(error, OSError) else KeyboardInterrupt):
        replace(FOUND, score=0.1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["set.json"]


def test_what_cannot_be_loaded_or_written_is_not_saved(tmp_path: Path) -> None:
    for wrong in (replace(FOUND, score=float("nan")), replace(FOUND, skip_mlp=(8,)), replace(FOUND, config="")):
        with pytest.raises(RequestError, match=r"set\.json: "):
            wrong.save(tmp_path / "set.json")
    with pytest.raises(RequestError, match=r"nowhere.set\.json: cannot be written: No such file"):
        FOUND.save(tmp_path / "nowhere" / "set.json")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"set\.json: cannot be written: Not a directory"):
        FOUND.save(tmp_path / "file" / "set.json")
    with pytest.raises(RequestError, match="cannot be written"):
        FOUND.save(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(sorted(SAVED)), JSON, max_size=3).map(lambda other: {**SAVED, **other}))
def test_any_json_is_loaded_or_refused(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        refusal = ""
        try:
            SkipSet.load(path).save(path)
        except RequestError as error:
            refusal = str(error)
        if refusal:
            assert refusal.startswith(f"{path}: ")
            assert "\n" not in refusal
        else:
            assert json.loads(path.read_text(encoding="utf-8")) == value
