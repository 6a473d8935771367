"""Targets that compare engines: with other libraries, and of the lossy methods with plain decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .gpu_parts import Setting
from .gpu_speed import Found
from .targets import Measurement

# The summary lines of `bench peers` that targets are about, by how the peer's name begins.
PEERS = {"T12": "transformers static cache", "T13": "torch.compile loop"}
SKIPJACK = "from skipjack.runtime.cli import main; main()"
PEER_SECONDS = {"8b": 400, "1b": 240, "135m": 150}


def peers(setting: Setting) -> Found:
    """T12 and T13 at the small shapes."""
    yield from _peers(setting, ("135m", "1b"))


def large_peers(setting: Setting) -> Found:
    """T12 and T13 at the shape of Llama-3.1-8B, which alone fills a part's time."""
    yield from _peers(setting, ("8b",))


def _peers(setting: Setting, shapes: tuple[str, ...]) -> Found:
    """`bench peers` in a process of its own for every shape, on a folder of random weights."""
    for label, shape in setting.named(shapes).items():
        with TemporaryDirectory(prefix="skipjack-") as folder:
            output = Path(folder) / "peers.json"
            command = [sys.executable, "-c", SKIPJACK, *arguments(shape, setting.dry, output)]
            limit = PEER_SECONDS[label]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
                problem = done.stderr.strip()[-300:] if done.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"no answer in {limit} s"
            result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
            yield from of_peers(label, result, problem)


def arguments(shape: str, dry: bool, output: Path) -> list[str]:
    """The command line of `skipjack bench peers` for a shape."""
    tiny = ["--dtype", "float32", "--max-tokens", "4", "--compile-mode", "eager", "--device", "cpu"]
    full = ["--dtype", "bfloat16", "--max-tokens", "128"]
    model = ["bench", "peers", f"synthetic:{shape}:0.3", "--per-category", "1", "--category", "writing"]
    return [*model, *(tiny if dry else full), "--output", str(output)]


def of_peers(label: str, result: Mapping[str, Any], problem: str) -> Iterator[Measurement]:
    """The ratios of the two peers that have targets; `problem` says why there is no result."""
    for target, start in PEERS.items():
        line = next((line for line in result.get("summary", ()) if line["peer"].startswith(start)), None)
        if line is None:
            yield Measurement(target, label, None, problem or f"no peer {start}")
        elif line["unavailable"]:
            yield Measurement(target, label, None, line["unavailable"])
        else:
            yield Measurement(target, label, line["ratio"], line["peer"])
