"""How every benchmark takes time: samples of a function on the host, or of its captured graph on a GPU.

Samples of functions that are compared come in pairs: all of them in order, then all of them backwards, so that a
machine that slows down during the run slows each of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch

from ..kernels.cpu import large_pages

Sampler = Callable[[], float]
REPLAYS = 4
WARM_UP = 3
HOST_BYTES, DEVICE_BYTES = 1 << 29, 1 << 31


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile of samples."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(samples: Iterable[float]) -> Spread:
        low, middle, high = (float(value) for value in np.percentile(list(samples), (10, 50, 90)))
        return Spread(middle, low, high)


def sampler(function: Callable[[], Any], device: torch.device, *, calls: int = 1, capture: bool = True) -> Sampler:
    """Takes one sample when called: the seconds one of the `calls` that `function` makes takes.

    On a GPU `function` is captured in a graph, unless it waits for the device (`capture` False), and timed by device
    events. It has been warmed up.
    """
    run = _captured(function, device) if device.type == "cuda" and capture else function
    replays = REPLAYS if device.type == "cuda" else 1

    def sample() -> float:
        with torch.inference_mode():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(replays):
                    run()
                end.record()
                end.synchronize()
                return begin.elapsed_time(end) / 1e3 / replays / calls
            start = perf_counter()
            run()
            return (perf_counter() - start) / calls

    for _ in range(WARM_UP):
        sample()
    return sample


def paired(samplers: Mapping[str, Sampler], pairs: int) -> dict[str, list[float]]:
    """2·`pairs` samples of each, in order and backwards in turn."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(2 * pairs):
        for name in list(samplers) if turn % 2 == 0 else reversed(list(samplers)):
            samples[name].append(samplers[name]())
    return samples


def bandwidth(device: torch.device, size: int | None = None) -> dict[str, float]:
    """Bytes per second of a large copy (read and written) and of a large reduction (read); `size` of the buffer."""
    on_gpu = device.type == "cuda"
    size = size or (DEVICE_BYTES if on_gpu else HOST_BYTES)
    # On a CPU as weights lie: small pages are read a third more slowly.
    source, target = (
        torch.empty(size // 4, device=device) if on_gpu else large_pages.empty((size // 4,), torch.float32)
        for _ in range(2)
    )
    source.normal_()
    # On a GPU a kernel's copy: `copy_` takes the copy engine, which is slower (bench/results/gpu-h100/second.jsonl).
    copy = sampler(lambda: torch.add(source, 1.0, out=target) if on_gpu else target.copy_(source), device)
    read = sampler(lambda: torch.amax(source) if on_gpu else torch.sum(source), device)
    samples = paired({"copy": copy, "read": read}, 5)
    size = source.numel() * source.element_size()
    return {
        "copy": 2 * size / Spread.of(samples["copy"]).median,
        "read": size / Spread.of(samples["read"]).median,
    }


def peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large square matrix product, the roof of arithmetic; `size` rows and columns."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    samples = paired({"product": sampler(lambda: left @ right, device)}, 5)
    return 2 * size**3 / Spread.of(samples["product"]).median


def denominator(device: torch.device) -> str:
    """The bandwidth that shares are of: "copy" on a GPU; "read" on a CPU, where copies read what they overwrite."""
    return "copy" if device.type == "cuda" else "read"


def cache_bytes(device: torch.device) -> int:
    """Buffers that together exceed this do not come from the last cache when they are read in turn."""
    if device.type == "cuda":
        return 4 * int(cast("Any", torch.cuda).get_device_properties(device).L2_cache_size)
    return 1 << 27


def _captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The replay of a graph of `function`, which is called once before.

    `torch.cuda.graph` would empty the allocator's cache each time, which takes longer than most samples.
    """
    side = _side_stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function()
            side.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
    return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the allocator keeps what each stream has freed for that stream."""
    return torch.cuda.Stream(device)
