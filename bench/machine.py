"""Where a figure was measured: the part of every result file that makes it comparable."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, versions, commit and date (UTC); what was measured on a GPU has that `device`'s name as `gpu` too."""
    gpu: dict[str, Any] = {}
    if device is not None and device.type == "cuda":
        card = cast("Any", torch.cuda).get_device_properties(device)
        gpu = {"gpu": card.name, "cuda": torch.version.cuda, "memory_gib": round(card.total_memory / 2**30, 1)}
    return gpu | {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "skipjack": version("skipjack"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this runs from; None for an installed package."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
