"""Checkpoint: what safetensors wrote comes back; every malformation is refused by file and field."""

import json
import os
import runpy
import struct
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from skipjack.loaders.checkpoint import Checkpoint
from skipjack.loaders.errors import CheckpointError
from skipjack.loaders.save import save_checkpoint

TENSORS = {
    "f64": torch.randn(3, 5, dtype=torch.float64),
    "f32": torch.randn(2, 3, 4),
    "f16": torch.randn(7).half(),
    "bf16": torch.randn(4, 4).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 8),
}


def write(folder, header, data=b"", name="model.safetensors"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize("shard_bytes", [None, 40, 200])
def test_reads_what_was_written(tmp_path, shard_bytes):
    save_checkpoint(tmp_path / "m", {}, TENSORS, shard_bytes)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard_bytes is not None)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.names() == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert same(checkpoint.read(name), tensor)


def test_reads_what_the_library_wrote_and_the_library_reads_ours(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"a": "b"})
    checkpoint = Checkpoint.open(tmp_path)
    views = {name: checkpoint.read(name) for name in TENSORS}
    checkpoint.close()
    assert all(same(views[name], tensor) for name, tensor in TENSORS.items())  # views outlive the checkpoint
    save_checkpoint(tmp_path / "ours", {"a": 1}, TENSORS)
    loaded = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert os.listdir(tmp_path) != []
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "ours"]  # nothing staged is left


def test_reading_copies_nothing_and_never_writes_the_file(tmp_path):
    save_checkpoint(tmp_path / "m", {}, {"a": torch.zeros(4)})
    checkpoint = Checkpoint.open(tmp_path / "m")
    first, second = checkpoint.read("a"), checkpoint.read("a")
    assert first.data_ptr() == second.data_ptr()
    first.fill_(1)
    assert Checkpoint.open(tmp_path / "m").read("a").sum() == 0


def test_unaligned_data_is_read(tmp_path):
    data = b"\0" + struct.pack("<2f", 1.5, -2.5)
    write(tmp_path, {"pad": entry("U8", (1,), 0, 1), "a": entry(begin=1, end=9)}, data)
    assert Checkpoint.open(tmp_path).read("a").tolist() == [1.5, -2.5]


EIGHT = b"\0" * 8
MALFORMED = [
    ("no header length", b"\1\2\3", "header length: expected 8 bytes, found a file of 3"),
    ("empty file", b"", "header length: expected 8 bytes, found a file of 0"),
    ("header over the limit", struct.pack("<Q", 16_000_001) + EIGHT, "header: expected at most 16000000 bytes"),
    ("header of 2**64", b"\xff" * 8 + EIGHT, "header: expected at most 16000000 bytes"),
    ("header beyond the file", struct.pack("<Q", 100) + b"{}", "header: expected 100 bytes, found a file that ends"),
    ("header empty", struct.pack("<Q", 0), "header: expected a JSON object"),
    ("not UTF-8", b'{"\xff": 1}', "header: expected UTF-8"),
    ("not JSON", b"{oops}", "header: expected JSON"),
    ("not an object", b"[]", "header: expected a JSON object"),
    ("leading space", b" {}", "header: expected a JSON object that starts with"),
    ("nested", b'{"a":' * 90_000, "nested brackets"),
    ("duplicate tensor", b'{"a":1,"a":1}', "expected each key once, found 'a' twice"),
    ("duplicate field", b'{"a":{"dtype":"F32","dtype":"F32"}}', "expected each key once, found 'dtype' twice"),
    ("too many lists", b'{"a":[' + b"[]," * 20_000, "header: expected at most 10002 of '[' for 1 objects, found 20001"),
    ("too many keys", b"{" + b'"a":0,' * 20_000, "header: expected at most 10004 of '\":' for 1 objects, found 20000"),
    ("metadata", {"__metadata__": {"a": 1}}, "__metadata__: expected an object of strings"),
    ("entry not an object", {"a": 3}, "'a': expected an object of dtype, shape and data_offsets, found 3"),
    ("field missing", {"a": {"dtype": "F32", "shape": []}}, "'a': expected an object of dtype, shape"),
    ("field unknown", {"a": entry() | {"x": 1}}, "'a': expected an object of dtype, shape"),
    ("dtype unknown", {"a": entry("F99")}, "'a'.dtype: expected a safetensors dtype, found 'F99'"),
    ("dtype no string", {"a": entry(7)}, "'a'.dtype: expected a safetensors dtype, found 7"),
    ("shape no list", {"a": entry() | {"shape": 2}}, "'a'.shape: expected at most 8 non-negative integers"),
    ("shape negative", {"a": entry(shape=(-2,))}, "'a'.shape: expected at most 8 non-negative integers"),
    ("shape boolean", {"a": entry(shape=(True,))}, "'a'.shape: expected at most 8 non-negative integers"),
    ("shape long", {"a": entry(shape=(1,) * 9)}, "'a'.shape: expected at most 8 non-negative integers"),
    ("shape overflow", {"a": entry(shape=(1 << 40, 1 << 40))}, "'a'.shape: expected at most 2**48 elements"),
    ("shape beyond 64 bits", {"a": entry(shape=(1 << 70,))}, "'a'.shape: expected at most 8 non-negative"),
    ("absurd and zero", {"a": entry(shape=(0, 1 << 62), end=0)}, "'a'.shape: expected at most 2**48 elements"),
    ("offsets reversed", {"a": entry(begin=8, end=0)}, "'a'.data_offsets: expected two integers in ascending order"),
    ("offsets three", {"a": entry() | {"data_offsets": [0, 4, 8]}}, "'a'.data_offsets: expected two integers"),
    ("offsets float", {"a": entry(end=8.0)}, "'a'.data_offsets: expected two integers in ascending order"),
    ("size mismatch", {"a": entry(shape=(3,))}, "'a'.data_offsets: expected 12 bytes for F32 of shape [3]"),
    ("half bytes", {"a": entry("F4", (3,), 0, 1)}, "'a'.data_offsets: expected 1.5 bytes for F4"),
    ("hole at the start", {"a": entry(begin=4, end=12)}, "'a'.data_offsets: expected to begin at byte 0, found 4 (a h"),
    ("hole", {"a": entry(), "b": entry(begin=12, end=20)}, "'b'.data_offsets: expected to begin at byte 8, found 12"),
    ("overlap", {"a": entry(), "b": entry(begin=4, end=12)}, "to begin at byte 8, found 4 (an overlap)"),
    ("same place", {"a": entry(), "b": entry()}, "expected to begin at byte 8, found 0 (an overlap)"),
    ("truncated", {"a": entry(shape=(4,), end=16)}, "data: expected 16 bytes as the header says, found 8"),
    ("trailing", {"a": entry(shape=(1,), end=4)}, "data: expected 4 bytes as the header says, found 8"),
    ("data without tensors", {}, "data: expected 0 bytes as the header says, found 8"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "message"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_malformed_files_refused(tmp_path, header, message):
    if isinstance(header, bytes) and header[:1] not in (b"{", b"[", b" "):
        (tmp_path / "model.safetensors").write_bytes(header)
    else:
        write(tmp_path, header, EIGHT)
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "model.safetensors"))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_too_many_tensors_refused(tmp_path):
    one = json.dumps(entry("U8", (0,), 0, 0), separators=(",", ":"))
    header = "{" + ",".join(f'"{number}":{one}' for number in range(100_001)) + "}"
    write(tmp_path, header.encode())
    with pytest.raises(CheckpointError, match="header: expected at most 100000 tensors, found 100001"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("bomb", [b'{"a":[' + b"[]," * 5_000_000, b"{" + b'"a":0,' * 2_000_000], ids=["lists", "keys"])
def test_bombs_take_no_memory(tmp_path, bomb):
    write(tmp_path, bomb)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="header: expected at most"):
        Checkpoint.open(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(bomb)
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "U8", "F8_E4M3"])
def test_other_dtypes_are_listed_but_not_read(tmp_path, dtype):
    width = {"I64": 8}.get(dtype, 1)
    write(tmp_path, {"a": entry(dtype, (1,), 0, width)}, b"\0" * width)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype("a") == dtype
    with pytest.raises(CheckpointError, match=rf"'a'.dtype: expected one of F64, F32, F16, BF16, found {dtype}"):
        checkpoint.read("a")


def test_absent_tensor_named(tmp_path):
    save_checkpoint(tmp_path / "m", {}, {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a tensor 'b', found none"):
        Checkpoint.open(tmp_path / "m").read("b")


def test_a_file_cut_after_opening_is_refused_not_a_crash(tmp_path):
    save_checkpoint(tmp_path / "m", {}, {"a": torch.zeros(4096)})
    checkpoint = Checkpoint.open(tmp_path / "m")
    os.truncate(tmp_path / "m" / "model.safetensors", 4096)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected \d+ bytes or more, found 4096"):
        checkpoint.read("a")


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*, found neither"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="found neither"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin: pickled weights can run code"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        Checkpoint.open(tmp_path)


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a regular file"):
        Checkpoint.open(tmp_path)


def sharded(folder, weight_map):
    write(folder, {"a": entry()}, EIGHT, "model-1.safetensors")
    write(folder, {"b": entry()}, EIGHT, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


GOOD = {"a": "model-1.safetensors", "b": "model-2.safetensors"}


def test_a_single_file_comes_before_an_index(tmp_path):
    """As in transformers, whose `save_pretrained` leaves the index of shards that it replaced."""
    write(tmp_path, {"new": entry()}, EIGHT, "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"old": "model-00001-of-00002.safetensors"}}'
    )
    assert Checkpoint.open(tmp_path).names() == {"new"}


def test_shards_read(tmp_path):
    assert Checkpoint.open(sharded(tmp_path, GOOD)).names() == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (GOOD | {"b": "model-3.safetensors"}, "expected the file 'model-3.safetensors' beside it, found none"),
        (GOOD | {"c": "model-1.safetensors"}, "weight_map: expected 'c' in 'model-1.safetensors', found it absent"),
        ({"a": "model-2.safetensors", "b": "model-2.safetensors"}, "weight_map: expected 'a' in 'model-2.safetensors'"),
        ({"a": "model-2.safetensors", "b": "model-1.safetensors"}, "'a': expected in 'model-2.safetensors' by"),
        (GOOD | {"b": "../model-2.safetensors"}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": "/etc/model.safetensors"}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": "x\\model.safetensors"}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": "C:model.safetensors"}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": "a\0.safetensors"}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": ".."}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": ""}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": "model.bin"}, "weight_map.'b': expected a bare .safetensors file name"),
        (GOOD | {"b": 3}, "weight_map.'b': expected a file name, found 3"),
        ({}, "weight_map: expected an object of file names"),
        ([], "weight_map: expected an object of file names"),
        (None, "weight_map: expected an object of file names"),
    ],
)  # fmt: skip
def test_bad_indexes_refused(tmp_path, weight_map, message):
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(sharded(tmp_path, weight_map))
    assert message in str(refusal.value)
    assert str(tmp_path / "model") in str(refusal.value)


def test_a_tensor_in_two_shards_refused(tmp_path):
    sharded(tmp_path, GOOD)
    write(tmp_path, {"b": entry(), "a": entry(begin=8, end=16)}, EIGHT * 2, "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: 'a': expected in 'model-1\.safetensors' by"):
        Checkpoint.open(tmp_path)


def test_saving_keeps_what_is_there(tmp_path):
    (tmp_path / "m").mkdir()
    save_checkpoint(tmp_path / "m", {}, TENSORS)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "m", {}, {})
    assert Checkpoint.open(tmp_path / "m").names() == set(TENSORS)
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "kind", ["safetensors", "config", "cycle", "mindskip", "routed", "index", "tokenizer", "settings", "template"]
)
def test_mutated_files_raise_nothing_else(kind):
    examples = int(os.environ.get("SKIPJACK_FUZZ", "150"))
    outcomes = runpy.run_path(str(Path(__file__).with_name("fuzz_files.py")))["fuzz"](kind, examples)
    assert sum(outcomes.values()) == examples
    assert outcomes["accepted"] < examples
