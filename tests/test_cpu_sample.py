"""Sampling as it is compiled for a CPU: the tokens of the reference, whose uniform numbers it makes bit for bit."""

import ast
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="numba is not installed")

import numba

from skipjack.kernels import noise
from skipjack.kernels.cpu import compiled, lanes, openmp
from skipjack.kernels.cpu import sample as cpu_sample
from skipjack.kernels.cpu.lanes import log, read, write
from skipjack.kernels.reference import verify as reference_verify

DTYPES = [torch.float32, torch.bfloat16]
# temperature, top_k, top_p, min_p.
RULES = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.7, 0, 1.0, 0.0),
    "hot": (50.0, -1, 1.0, 0.0),
    "cold": (1e-3, 0, 0.9, 0.0),
    "top-p": (0.9, 0, 0.8, 0.0),
    "narrow": (1.2, 0, 0.05, 0.0),
    "top-k": (1.0, 7, 1.0, 0.0),
    "top-1": (1.0, 1, 1.0, 0.0),
    "all": (1.0, 10**6, 1.0, 0.0),
    "min-p": (1.0, 0, 1.0, 0.1),
    "both": (0.8, 40, 0.6, 0.0),
    "every": (1.1, 20, 0.9, 0.02),
}


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(compiled)


@numba.njit("void(int64, int64, int64)")
def logarithms(x: int, out: int, count: int) -> None:
    for i in range(0, count, 16):
        write(out, i, log(read(x, i, False)), False)


@numba.njit("void(int64, int64, int64, int64, int64)")
def fractions(seed: int, position: int, stream: int, start: int, out: int) -> None:
    u = cpu_sample.uniforms(seed, position, stream, start)
    for i in range(4):
        write(out, 16 * i, u[i], False)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def rule_of(rows: int, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    temperature, top_k, top_p, min_p = RULES[name]
    floats = [torch.full((rows,), value) for value in (temperature, top_p, min_p)]
    return floats[0], torch.full((rows,), top_k), floats[1], floats[2]


def counters(rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) * 0x1_2345_6789 + 3, 5 * torch.arange(rows) + 2


def test_log_is_right_to_a_unit_in_the_last_place() -> None:
    near = 1 + torch.linspace(-0.4, 0.4, 1 << 16)
    x = torch.cat([near, torch.logspace(-37, 38, 1 << 16), 1 - 2.0 ** -torch.arange(1.0, 17.0), torch.ones(16)])
    out = torch.full_like(x, torch.nan)
    logarithms(x.data_ptr(), out.data_ptr(), len(x))
    exact = x.double().log()
    unit = 2.0 ** (exact.abs().log2().floor() - 23)
    assert ((out.double() - exact).abs() <= unit)[:-16].all()
    assert (out[-16:] == 0).all()


@pytest.mark.parametrize("seed", [0, 1, 0x9E3779B9, 2**40 + 17, 2**63 - 1])
@pytest.mark.parametrize("stream", [0, 3])
def test_noise_has_the_bits_of_the_reference(seed: int, stream: int) -> None:
    for position in (0, 1, 70_000):
        expected = noise.uniform(torch.tensor([seed]), torch.tensor([position]), 49152, stream)[0]
        for start in (0, 64, 49152 - 64):
            out = torch.full((64,), torch.nan)
            fractions(seed, position, stream, start, out.data_ptr())
            assert torch.equal(out, expected[start : start + 64])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_tokens_are_those_of_the_reference(dtype: torch.dtype, name: str) -> None:
    for width, rows, scale in ((16, 300, 1.0), (48, 100, 3.0), (208, 100, 6.0), (1040, 40, 0.1), (49152, 3, 3.0)):
        scores = randn(rows, width, dtype=dtype, scale=scale, seed=width)
        given = (scores, *rule_of(rows, name), *counters(rows))
        assert torch.equal(compiled.sample(*given), reference_verify.sample(*given))
        for count in (1, 6):
            got = compiled.sample(*given, stream=2, count=count)
            assert torch.equal(got, reference_verify.sample(*given, stream=2, count=count)), (width, count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_draw_by_their_own_rules_whoever_is_beside_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, threads = 2 * len(RULES), torch.get_num_threads()
    scores = randn(2 * rows, 624, dtype=dtype)[::2]
    rules = [torch.cat(parts) for parts in zip(*(rule_of(2, name) for name in RULES), strict=True)]
    given = (scores, *rules, *counters(rows))
    try:
        torch.set_num_threads(3)
        together = compiled.sample(*given, count=3)
        monkeypatch.setattr(openmp, "team", lambda: 0)
        assert torch.equal(compiled.sample(*given, count=3), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, reference_verify.sample(*given, count=3))
    for row in range(rows):
        alone = compiled.sample(*(tensor[row : row + 1] for tensor in given), count=3)
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize("name", RULES)
def test_ties_and_ids_that_cannot_be(name: str) -> None:
    even, few = torch.zeros(60, 64), torch.full((60, 64), -math.inf)
    few[:, [5, 17, 40]] = torch.tensor([1.0, 1.0, 0.0])
    steps = (torch.arange(64) // 8).float().expand(60, 64)
    for scores in (even, few, steps, -1e4 * steps):
        given = (scores, *rule_of(60, name), *counters(60))
        got = compiled.sample(*given, count=5)
        assert torch.equal(got, reference_verify.sample(*given, count=5))


def test_what_does_not_fit_is_drawn_by_the_reference() -> None:
    for scores in (randn(9, 203), randn(9, 64, dtype=torch.float16)):
        given = (scores, *rule_of(9, "every"), *counters(9))
        assert torch.equal(compiled.sample(*given), reference_verify.sample(*given))


def test_code_on_disk_is_known_by_every_file_it_is_made_of() -> None:
    """Numba looks for changes in a kernel's own file alone; the others are told by its name."""
    folder = Path(lanes.__file__).parent
    for name in ("panel_kernels", "attention", "attention_tiles", "small_ops", "sample"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        imported = {
            folder.parents[node.level - 2] / f"{module}.py" if node.level > 1 else folder / f"{module}.py"
            for node in nodes
            for module in ([node.module] if node.module else [x.name for x in node.names])
        }
        assert imported <= set(lanes._FILES), name
