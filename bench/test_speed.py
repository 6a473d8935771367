"""`pytest bench --benchmark-only`: every op alone, at the shapes of real models."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from skipjack.bench.clock import Sampler, Spread, cache_bytes, sampler
from skipjack.bench.micro import MAX_LAUNCHES, OF_CONTEXT, OPS, TOLERANCE, difference
from skipjack.bench.point import Launch, Point
from skipjack.kernels.ops import Ops
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config


@torch.inference_mode()
def test_speed(
    benchmark: Any,
    gate: None,
    request: pytest.FixtureRequest,
    table: Ops,
    device: torch.device,
    dtype: torch.dtype,
    shape: str,
    op: str,
    rows: int,
    context: int,
) -> None:
    config = ModelConfig.parse(synthetic_config(shape), shape)
    point = Point(table, config, device, dtype, rows, context)
    launches = [OPS[op](point)]
    error = difference(launches[0].op(), launches[0].plain())
    assert error < TOLERANCE[dtype], "wrong: no speed"
    if not benchmark.enabled:
        benchmark(launches[0].op)
        return
    measured: dict[str, Any] = request.getfixturevalue("measured")
    wanted = min(MAX_LAUNCHES, -(-cache_bytes(device) // launches[0].bytes))
    launches += [OPS[op](replace(point, seed=seed)) for seed in range(1, wanted)]
    mine, plain = _samplers(launches, device)
    own, other = list[float](), [plain()]

    def one() -> None:
        own.append(mine())

    def between() -> None:
        if own:
            other.append(plain())

    benchmark.pedantic(one, setup=between, rounds=request.config.getoption("--rounds"))
    other.append(plain())
    # Each sample lies between two of plain PyTorch, whose mean it is compared with.
    ratio = Spread.of((before + after) / 2 / t for before, t, after in zip(other, own, other[1:], strict=False)).median
    seconds, size = Spread.of(own), launches[0].bytes
    figure = {
        "op": op,
        "shape": shape,
        "rows": rows,
        "context": context if op in OF_CONTEXT else None,
        "seconds": asdict(seconds),
        "bytes": size,
        "flops": launches[0].flops,
        "launches": len(launches),
        "share": size / seconds.median / measured["bandwidth"][measured["of"]],
        "ratio": ratio,
        "error": error,
    }
    measured["figures"].append(figure)
    benchmark.extra_info |= figure


def _samplers(launches: list[Launch], device: torch.device) -> tuple[Sampler, Sampler]:
    """One sample of the op and of plain PyTorch: all launches in turn."""

    def op() -> None:
        for launch in launches:
            launch.op()

    def plain() -> None:
        for launch in launches:
            launch.plain()

    count = len(launches)
    return sampler(op, device, calls=count), sampler(plain, device, calls=count, capture=not launches[0].syncs)
