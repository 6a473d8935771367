"""Models and caches that do not fit into the memory there is."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from skipjack import CapacityError, Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime.memory import free_bytes

# A limit on the address space, from here on; the weights are asked for in a type of twice the size they are read in.
LIMITED = """
import resource, sys
from skipjack.runtime.commands import cli, generate
from skipjack.runtime import engine

mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 60 * 2**20,) * 2)
sys.exit(cli.run(["generate", sys.argv[1], "--prompt-ids", "1", "--dtype", "float32", "--max-tokens", "2"]))
"""


def saved(folder: Path, **fields: object) -> Path:
    found = synthetic_config("tiny") | fields
    config = ModelConfig.parse(found, "tiny")
    weights = synthetic_weights(config, 0, torch.bfloat16)
    save_checkpoint(folder, found, checkpoint_tensors(weights, config))
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on memory are the system's own")
def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", vocab_size=200_000)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"error: {folder}: its weights are 0.1 GiB in float32, and the memory of the cpu ran out" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_is_a_capacity_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    folder = saved(tmp_path / "m")
    monkeypatch.setattr("skipjack.runtime.engine.load_weights", fail)
    with pytest.raises(CapacityError, match=r"its weights are 0\.0 GiB in float16, and the memory of the cpu ran out"):
        Engine.load(folder, dtype="float16", device="cpu")


def test_other_errors_of_loading_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    folder = saved(tmp_path / "m")
    monkeypatch.setattr("skipjack.runtime.engine.load_weights", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        Engine.load(folder)


def engine(**options: Any) -> Engine:
    config = ModelConfig.parse(synthetic_config("tiny") | {"max_position_embeddings": 40_000}, "tiny")
    return Engine(config, synthetic_weights(config, 0, torch.float32), **options)


def test_a_cache_of_no_given_size_leaves_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fifths of what is free after the weights, by the size of a token's keys and values: 8 layers of 2 heads."""
    each = 2 * 8 * 2 * 16 * 4
    for free, tokens in (
        (10**12, 40_000),
        (40_000 * each * 5 // 4, 40_000),
        (30_000 * each * 5 // 4, 30_000),
        (0, 2048),
    ):
        monkeypatch.setattr("skipjack.runtime.memory.free_bytes", lambda _, free=free: free)
        with engine() as made:
            assert made.cache_tokens == tokens
            assert tokens <= made._loaded()[1].total_pages * 256 < tokens + 6 * 256
            if tokens == 40_000:
                assert made.cache_note is None
                continue
            assert f"holds {tokens} tokens of the model's context of 40000" in str(made.cache_note)
            assert "cache_tokens (--cache-tokens)" in str(made.cache_note)
            with pytest.raises(CapacityError, match=r"raise cache_tokens \(--cache-tokens\)"):
                made.generate([1] * 20, SamplingParams(max_tokens=39_000))


def test_a_given_size_is_taken_whatever_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipjack.runtime.memory.free_bytes", lambda _: 0)
    with engine(cache_tokens=5000) as made:
        assert (made.cache_tokens, made.cache_note) == (5000, None)


def test_free_memory_is_what_the_system_says() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
