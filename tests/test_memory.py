"""Models and caches that do not fit into the memory there is."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipjack import CapacityError, Engine
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors

# A limit on the address space, from here on; the weights are asked for in a type of twice the size they are read in.
LIMITED = """
import resource, sys
from skipjack.runtime import cli, engine, generate

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
