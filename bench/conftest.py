"""Options of `pytest bench`, its correctness gate, its table, and its result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skipjack.bench import tables
from skipjack.bench.clock import bandwidth, denominator, peak
from skipjack.bench.machine import describe
from skipjack.bench.micro import OF_CONTEXT, OPS, TOLERANCE, difference
from skipjack.bench.op_cases import CASES, Side
from skipjack.bench.record import markdown, write
from skipjack.kernels.ops import TORCH, Ops, select
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config

SHAPES = ("135m", "1b", "4b", "8b")
ON_GPU = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("skipjack")
    group.addoption("--shape", action="append", help=f"repeatable: {', '.join(SHAPES)}, or another synthetic shape")
    group.addoption("--op", action="append", help="repeatable; default: every op")
    group.addoption("--rows", action="append", type=int, help="rows of a pass, repeatable")
    group.addoption("--context", action="append", type=int, help="cached positions, repeatable")
    group.addoption("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    group.addoption("--rounds", type=int, default=20, help="samples of every figure")
    group.addoption("--figures", type=Path, help="write the figures, with machine, versions and commit, as JSON here")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    config = metafunc.config
    shapes = config.getoption("--shape") or (SHAPES if ON_GPU else SHAPES[:1])
    rows = config.getoption("--rows") or ([1, 8, 16] if ON_GPU else [1, 8])
    contexts = config.getoption("--context") or ([512, 4096] if ON_GPU else [512])
    cases = [
        (shape, op, count, context)
        for shape in shapes
        for op in _chosen(config.getoption("--op"))
        for count in rows
        for context in (contexts if op in OF_CONTEXT else contexts[:1])
    ]
    metafunc.parametrize(("shape", "op", "rows", "context"), cases)


def _chosen(names: list[str] | None) -> list[str]:
    """The ops of these names; `linear` also stands for "linear (down)" and its like."""
    for name in names or ():
        if not any(name in (op, op.partition(" ")[0]) for op in OPS):
            raise pytest.UsageError(f"--op: expected one of {', '.join(OPS)}, got {name!r}")
    return [op for op in OPS if not names or op in names or op.partition(" ")[0] in names]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, str(request.config.getoption("--dtype")))


@pytest.fixture(scope="session")
def table() -> Ops:
    return select("triton" if ON_GPU else "torch")


@pytest.fixture(scope="session")
def gate(table: Ops, device: torch.device, dtype: torch.dtype) -> None:
    """Every op against the torch table in float64; a speed beside a wrong result means nothing."""
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    mine, oracle = Side(table, device, dtype, dtype), Side(TORCH, torch.device("cpu"), dtype, torch.float64)
    for name, case in CASES.items():
        with torch.inference_mode():
            got, expected = (case(side, config, 9, table.decode_tile) for side in (mine, oracle))
        for key, value in expected.items():
            error = difference((got[key].cpu(),), (value,))
            if not error < TOLERANCE[dtype]:
                pytest.exit(f"correctness gate: {name}, {key}: relative error {error:.1e}; no speeds", returncode=1)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, table: Ops, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The result being made: bandwidths of this process first, then a figure for every case."""
    result: dict[str, Any] = {
        "bench": "micro",
        "machine": describe(device),
        "model": "shapes of models",
        "backend": table.description(dtype),
        "dtype": str(dtype).removeprefix("torch."),
        "of": denominator(device),
        "bandwidth": bandwidth(device),
        "peak": peak(device, dtype, 8192 if ON_GPU else 2048),
        "figures": [],
    }
    request.config.stash[_RESULT] = result
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    result = config.stash.get(_RESULT, None)
    if result is None or not result["figures"]:
        return
    path = config.getoption("--figures")
    if path:
        write(result, path)
    terminalreporter.write_line("")
    terminalreporter.write_line(markdown([tables.micro(result)]))


_RESULT = pytest.StashKey[dict[str, Any]]()
