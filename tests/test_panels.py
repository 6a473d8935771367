"""Products with weights in panels: against float64, and each row against itself among others."""

import math
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from llvmlite import binding

from skipjack.kernels.cpu import compiled, large_pages, matrix_unit, openmp, panels
from skipjack.kernels.reference import dense, packed
from skipjack.kernels.values import Matrix, Norm
from skipjack.runtime.commands import doctor

RTOL = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
DTYPES = list(RTOL)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).norm() / expected.norm()
    assert error < RTOL[got.dtype], f"relative error {error:.2e}"


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [
        *[(1, 16, 2), (2, 32, 6), (3, 48, 34), (5, 96, 66), (6, 80, 34), (7, 64, 130), (9, 64, 576), (23, 112, 130)],
        *[(1, 16, 32), (3, 112, 96), (16, 80, 64), (21, 96, 32), (32, 64, 96), (33, 48, 64), (77, 16, 160)],
    ],
)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (True, True)])
def test_a_product_is_the_sum(
    dtype: torch.dtype, rows: int, width: int, columns: int, bias: bool, residual: bool
) -> None:
    x, weight = randn(rows, columns, dtype=dtype), randn(width, columns, dtype=dtype, seed=1)
    shift, added = randn(width, dtype=dtype, seed=2), randn(rows, width, dtype=dtype, seed=3)
    expected = x.double() @ weight.double().T
    expected = expected + (shift.double() if bias else 0) + (added.double() if residual else 0)
    around = torch.full((rows + 2, width), math.nan, dtype=dtype)
    matrix, out = panels.pack(weight), around[1:-1]
    panels.product(x, matrix, shift if bias else None, added if residual else None, out=out)
    assert_near(out, expected)
    assert around[[0, -1]].isnan().all(), "nothing is written beside the result"
    if residual:
        panels.product(x, matrix, shift if bias else None, added, out=added)
        assert torch.equal(added, out), "in place"


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("columns", [258, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_bits_it_has_alone(dtype: torch.dtype, columns: int) -> None:
    x, matrix = randn(73, columns, dtype=dtype), panels.pack(randn(176, columns, dtype=dtype, seed=1))
    together = panels.product(x, matrix, None, None)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 31, 32, 33, 48, 73):
        for start in {0, min(5, 73 - count), 73 - count}:
            rows = slice(start, start + count)
            assert torch.equal(panels.product(x[rows], matrix, None, None), together[rows])


def test_the_matrix_unit_adds_in_the_order_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if not matrix_unit.permitted():
        pytest.skip("no matrix unit that this process may use")
    x, weight = randn(19, 96, dtype=torch.bfloat16), randn(64, 96, dtype=torch.bfloat16, seed=1)
    # A product of two bfloat16 is exact in float32.
    products = (x.float()[:, None] * weight.float()).view(19, 64, 3, 16, 2)
    expected = torch.zeros(19, 64)
    for block in range(3):
        chains = torch.zeros(19, 64, 2)
        for pair in range(16):
            chains = chains + products[:, :, block, pair]
        expected = expected + chains.sum(-1)
    matrix = panels.pack(weight)
    assert torch.equal(panels.product(x, matrix, None, None), expected.bfloat16())
    assert "matrix unit" in compiled.COMPILED.describe(torch.bfloat16)
    assert "matrix unit" not in compiled.COMPILED.describe(torch.float32)
    assert doctor._matrix_unit() == "used for bfloat16"
    monkeypatch.setenv("SKIPJACK_CPU_KERNELS", "pairs")
    monkeypatch.setattr(matrix_unit, "permitted", matrix_unit.permitted.__wrapped__)
    assert "matrix unit" not in compiled.COMPILED.describe(torch.bfloat16)
    assert doctor._matrix_unit().startswith("there, and not used")
    assert_near(panels.product(x, matrix, None, None), x.double() @ weight.double().T)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_their_absence_change_a_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = randn(5, 128, dtype=dtype), panels.pack(randn(960, 128, dtype=dtype, seed=1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = panels.product(x, matrix, None, None)
        torch.set_num_threads(4)
        assert torch.equal(panels.product(x, matrix, None, None), alone)
        monkeypatch.setattr(openmp, "team", lambda: 0)
        assert torch.equal(panels.product(x, matrix, None, None), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("panel_count", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_every_panel_is_somebodys(panel_count: int, threads: int) -> None:
    width = panels.PANEL * panel_count
    x, weight = randn(3, 64, dtype=torch.float32), randn(width, 64, dtype=torch.float32, seed=1)
    matrix, out, before = panels.pack(weight), torch.full((3, width), math.nan), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            assert_near(panels.product(x, matrix, None, None, out=out.fill_(math.nan)), x.double() @ weight.double().T)
    finally:
        torch.set_num_threads(before)


def test_a_block_goes_with_the_last_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded and closed leaves nothing behind."""
    size = 4 << 20
    monkeypatch.setattr(large_pages, "_BLOCK", size)
    monkeypatch.setattr(large_pages, "_newest", None)  # That of an engine of another test may have room left.
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [large_pages.empty((part,), torch.uint8) for part in (size, 1000, 1000)]
        assert tracemalloc.get_traced_memory()[0] - before > size
        del kept[:2]
        assert tracemalloc.get_traced_memory()[0] - before > size
        kept.clear()
        assert tracemalloc.get_traced_memory()[0] - before < size / 2
    finally:
        tracemalloc.stop()


def test_tensors_in_large_pages_share_blocks_and_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_BLOCK", 4096)
    shapes = [(3, 5), (1,), (700,), (900,), (5000,), (0,), (64, 2), (1, 1, 7)]
    with ThreadPoolExecutor(4) as pool:
        tensors = list(pool.map(lambda i: large_pages.empty(shapes[i % 8], DTYPES[i % 2]).fill_(i), range(160)))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    for i, tensor in enumerate(tensors):
        assert (tensor.shape, tensor.dtype) == (shapes[i % 8], DTYPES[i % 2])
        assert (tensor == i).all()


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 16, 64), (3, 48, 34), (8, 80, 96), (37, 112, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_gates_are_joined_with_what_they_gate(
    dtype: torch.dtype, rows: int, width: int, columns: int, biased: bool
) -> None:
    x, weight = randn(rows, columns, dtype=dtype), randn(2 * width, columns, dtype=dtype, seed=1)
    bias = randn(2 * width, dtype=dtype, seed=2) if biased else None
    residual = randn(rows, 2 * width, dtype=dtype, seed=3)
    apart, matrix = panels.pack(weight), panels.pack_gated(weight)
    assert matrix.in_panels
    assert matrix.gated
    plain = panels.product(x, apart, bias, residual)
    assert torch.equal(panels.product(x, matrix, bias, residual), plain), "without an activation columns are in order"
    sums = panels.product(x, matrix, bias, None)
    around = torch.full((rows + 2, width), math.nan, dtype=dtype)
    panels.product(x, matrix, bias, None, around[1:-1], None, "silu_gate")
    gate, up = sums.double().chunk(2, dim=1)
    assert_near(around[1:-1], gate / (1 + (-gate).exp()) * up)
    assert around[[0, -1]].isnan().all(), "nothing is written beside the result"
    one_by_one = compiled.linear(x, apart, tile=8, bias=bias, activation="silu_gate")
    assert torch.equal(compiled.linear(x, matrix, tile=8, bias=bias, activation="silu_gate"), one_by_one)


def test_halves_that_fit_into_no_panels_are_not_gated() -> None:
    assert not compiled.prepare_gated(randn(48, 32, dtype=torch.float32)).gated
    assert not compiled.prepare_gated(randn(96, 32, dtype=torch.float32).half()).gated
    assert compiled.prepare_gated(randn(96, 32, dtype=torch.float32)).gated


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_weight_are_taken_out_of_its_panels(dtype: torch.dtype) -> None:
    weight, rows = randn(112, 34, dtype=dtype), torch.tensor([0, 47, 48, 95, 96, 111])
    matrix = panels.pack(weight)
    assert torch.equal(panels.take(matrix, torch.arange(112)), weight)
    few = packed.take_rows(matrix, rows)
    assert (few.rows, few.columns, few.in_panels) == (6, 34, False)
    x = randn(8, 34, dtype=dtype)
    assert_near(packed.product(x, few, None, None), x.double() @ weight[rows].double().T)
    assert packed.take_rows(matrix, torch.arange(5, 101)).in_panels, "sixteen at a time"


def test_a_weight_that_fits_into_no_panel_is_laid_out_as_before() -> None:
    for weight in (randn(40, 32, dtype=torch.float32), randn(48, 33, dtype=torch.bfloat16), torch.ones(48, 32).half()):
        matrix = compiled.prepare(weight)
        assert not matrix.in_panels
        x = randn(8, weight.shape[1], dtype=weight.dtype)
        expected = dense.linear(x, dense.prepare(weight), tile=8)
        assert torch.equal(compiled.linear(x, matrix, tile=8), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_scaled_rows_have_the_bits_of_others(dtype: torch.dtype) -> None:
    x, weight = randn(9, 64, dtype=dtype), compiled.prepare(randn(48, 64, dtype=dtype, seed=1))
    norm, residual = Norm(randn(64, dtype=dtype, seed=2), None, 1e-5), randn(9, 48, dtype=dtype, seed=3)
    whole = compiled.linear(x, weight, tile=8, norm=norm, residual=residual.clone())
    active = torch.arange(9) % 3 == 1
    some = compiled.linear(x, weight, tile=8, norm=norm, residual=residual.clone(), active=active)
    assert torch.equal(some, torch.where(active[:, None], whole, residual))
    twice = compiled.linear(x, weight, tile=8, norm=norm, scale=torch.full((9,), 2.0))
    assert torch.equal(twice, 2 * compiled.linear(x, weight, tile=8, norm=norm))


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_rounds_as_decoding_does(dtype: torch.dtype) -> None:
    x, weight = randn(100, 64, dtype=dtype), compiled.prepare(randn(96, 64, dtype=dtype, seed=1))
    prompt = compiled.linear(x, weight, tile=64)
    assert torch.equal(torch.cat([compiled.linear(row[None], weight, tile=8) for row in x]), prompt)


OTHER = """
import torch
from skipjack.kernels.reference import packed
from skipjack.kernels.cpu import attention_sums, compiled, instructions, matrix_unit, panel_steps, panels
from skipjack.kernels.attention_index import AttentionIndex

def by_hand(weight):
    data, scale = packed.rounded(weight)
    return data.double() * scale.double()[:, None]

assert not instructions.PAIRED and not matrix_unit.EXISTS and panel_steps.MOST == attention_sums.FEW == 2
for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
    x, weight = torch.randn(8, 400).to(dtype), torch.randn(64, 400).to(dtype)
    matrix = panels.pack(weight)
    got, expected = panels.product(x, matrix, None, None), x.double() @ weight.double().T
    assert (got.double() - expected).norm() / expected.norm() < most
    light = panels.quantise(matrix)
    few, wanted = panels.product(x, light, None, None), x.double() @ by_hand(weight).T
    assert light.in_panels and (few.double() - wanted).norm() / wanted.norm() < most
    for rows in (1, 2, 3, 5, 7):
        assert torch.equal(panels.product(x[8 - rows :], matrix, None, None), got[8 - rows :])
        assert torch.equal(panels.product(x[8 - rows :], light, None, None), few[8 - rows :])
    keys, values = torch.randn(2, 1, 2, 128, 80).to(dtype)
    q, at = torch.randn(8, 6, 80).to(dtype), torch.arange(90, 98)
    rows = [AttentionIndex(at[r] * 0, at[r], at[:1, None] * 0, page_size=128, tile=8) for r in (slice(8), slice(3, 4))]
    got, alone = (compiled.attend(x, keys, values, r, scale=0.1) for x, r in zip((q, q[3:4]), rows))
    k, v = (x[0, :, :94].repeat_interleave(3, 0).double() for x in (keys, values))
    expected = ((k @ q[3].double()[:, :, None]).mul(0.1).softmax(1) * v).sum(1).flatten()
    assert (got[3].double() - expected).norm() / expected.norm() < most
    assert torch.equal(alone, got[3:4])
print("done")
"""


def test_a_processor_without_wide_registers_or_products_of_pairs(tmp_path: Path) -> None:
    """Nor a matrix unit, whose instructions numba cannot compile for it: one that numba is told to compile for."""
    features = binding.get_host_cpu_features()
    for name in features:
        features[name] = features[name] and "amx" not in name
    given = {"NUMBA_CPU_NAME": binding.get_host_cpu_name(), "NUMBA_CPU_FEATURES": features.flatten()}
    done = subprocess.run(
        [sys.executable, "-c", OTHER],
        env=os.environ | given | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_what_lies_elsewhere_is_not_taken_for_panels() -> None:
    plain = Matrix(torch.ones(16, 4), 16, 4, packed=False)
    assert not plain.in_panels
    assert not packed.pack(torch.ones(16, 4)).in_panels
