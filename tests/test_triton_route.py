"""Row maps and FlexiDepth's router: oracle and kernel against the formulas, and each row against itself."""

import inspect
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from skipjack.kernels import fill, qkv, route
from skipjack.kernels.linear import prepare
from skipjack.kernels.product_rules import route_rule
from skipjack.kernels.reference import dense
from skipjack.kernels.reference import routes as reference_routes
from skipjack.kernels.values import Norm, Route, Router

TILE = 8
EPS = 1e-5
ATOL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, −7 and True, whichever their dtype can hold."""

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        value = torch.nan if dtype.is_floating_point else True if dtype == torch.bool else -7
        return torch.full(shape, value, dtype=dtype, device=device)

    monkeypatch.setattr(route.torch, "empty", empty)


class Case:
    """Rows, a norm and the four matrices of a router as checkpoints hold them."""

    def __init__(self, hidden: int, width: int, rows: int, dtype: torch.dtype, bias: bool = False) -> None:
        self.x = randn(rows, hidden, dtype=dtype)
        self.norm = Norm(
            1 + randn(hidden, dtype=dtype, seed=1) / 4, randn(hidden, dtype=dtype, seed=2) if bias else None, EPS
        )
        self.encoder = (randn(width, hidden, seed=3) / hidden**0.5).to(dtype)
        self.inner_norm = 1 + randn(width, dtype=dtype, seed=4) / 4
        self.dec = randn(hidden, width, dtype=dtype, seed=5) / width**0.5
        self.head = randn(1, hidden, dtype=dtype, seed=6) / hidden**0.5 * 3

    def router(self, prepared: bool = True) -> Router:
        readout = (self.head.double() @ self.dec.double())[0].float()
        return Router((prepare if prepared else dense.prepare)(self.encoder), self.inner_norm, readout)

    def expected(self) -> Tensor:
        """sigmoid(router_head·router_dec·tanh(RMSNorm_r(router_enc·z))), the matrices one after the other."""
        z = self.x.double()
        if self.norm.bias is None:
            z = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt() * self.norm.weight.double()
        else:
            z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + EPS).sqrt()
            z = z * self.norm.weight.double() + self.norm.bias.double()
        code = z @ self.encoder.double().T
        code = code / (code.square().mean(-1, keepdim=True) + EPS).sqrt() * self.inner_norm.double()
        return (code.tanh() @ self.dec.double().T @ self.head.double().T).sigmoid()[:, 0]


def assert_routes(got: Route, expected: Tensor, dtype: torch.dtype, threshold: float = 0.5) -> None:
    assert got.weight.dtype == torch.float32
    assert got.run.dtype == torch.bool
    assert got.weight.shape == got.run.shape == expected.shape
    assert (got.weight.double() - expected).abs().max() < ATOL[dtype]
    assert torch.equal(got.run, got.weight > threshold)
    assert torch.equal(got.skip, ~got.run)
    assert torch.equal(got.rest, 1 - got.weight)


@pytest.mark.parametrize("launcher", [route.route, route.row_map, fill.fill_kv, qkv.qkv_rope_append])
def test_launchers_have_the_signatures_of_their_oracles(launcher: object) -> None:
    oracle = dense if launcher is qkv.qkv_rope_append else reference_routes
    assert inspect.signature(launcher) == inspect.signature(getattr(oracle, launcher.__name__))


CASES = {
    "tiny": (48, 3, 1, torch.float32, False),
    "odd": (33, 5, 7, torch.float32, False),
    "demo": (576, 36, 5, torch.float32, False),
    "two-tiles": (128, 40, 11, torch.float32, False),
    "layer-norm": (40, 17, 9, torch.float32, True),
    "long-steps": (512, 32, 3, torch.float32, False),
    "bfloat16": (64, 24, 9, torch.bfloat16, False),
    "float16": (80, 16, 6, torch.float16, False),
}


@pytest.mark.parametrize("name", CASES)
def test_route_is_the_uncollapsed_formula(name: str) -> None:
    case = Case(*CASES[name])
    expected = case.expected()
    assert 0.01 < float(expected.min()) < 0.99
    assert_routes(route.route(case.x, case.norm, case.router(), tile=TILE), expected, case.x.dtype)
    oracle = reference_routes.route(case.x, case.norm, case.router(prepared=False), tile=TILE)
    assert_routes(oracle, expected, case.x.dtype)


def test_the_oracle_in_float64_is_exact() -> None:
    case = Case(576, 36, 21, torch.float64)
    readout = (case.head @ case.dec)[0]
    router = Router(dense.prepare(case.encoder), case.inner_norm, readout)
    got = reference_routes.route(case.x, case.norm, router, tile=TILE)
    assert torch.allclose(got.weight, case.expected(), rtol=0, atol=1e-13)
    assert torch.equal(got.run, case.expected() > 0.5)


def test_counters_of_others_are_left_at_zero() -> None:
    case = Case(96, 20, 21, torch.float32)
    arrivals = torch.zeros(21, dtype=torch.int32, device=case.x.device)
    for _ in range(2):
        routed = route.route(case.x, case.norm, case.router(), tile=TILE, arrivals=arrivals)
        assert_routes(routed, case.expected(), torch.float32)
        assert not arrivals.any()


def test_prefill_tiles_of_rows() -> None:
    case = Case(96, 20, 70, torch.float32)
    assert_routes(route.route(case.x, case.norm, case.router(), tile=32), case.expected(), torch.float32)


@pytest.mark.parametrize("op", [route.route, reference_routes.route])
def test_a_row_runs_strictly_above_the_threshold(op: object) -> None:
    case = Case(48, 16, 9, torch.float32)
    router = case.router(prepared=op is route.route)
    weight = op(case.x, case.norm, router, tile=TILE).weight
    for threshold in (0.0, float(weight[4]), 1.0):
        got = op(case.x, case.norm, router, tile=TILE, threshold=threshold)
        assert torch.equal(got.weight, weight)
        assert torch.equal(got.run, weight > threshold)
    still = Router(router.encoder, router.norm, torch.zeros(16))
    got = op(case.x, case.norm, still, tile=TILE)
    assert torch.equal(got.weight, torch.full((9,), 0.5))
    assert not got.run.any()


@pytest.mark.parametrize("op", [route.route, reference_routes.route])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_of_a_row_does_not_depend_on_its_number_or_place(op: object, dtype: torch.dtype) -> None:
    case = Case(96, 18, 32, dtype)
    router = case.router(prepared=op is route.route)
    weight = op(case.x, case.norm, router, tile=TILE).weight
    for rows in (torch.tensor([9]), torch.tensor([31, 0, 5]), torch.randperm(32)[:16], torch.arange(32).flip(0)):
        assert torch.equal(op(case.x[rows], case.norm, router, tile=TILE).weight, weight[rows])


@pytest.mark.parametrize("op", [route.route, reference_routes.route])
def test_an_inactive_row_neither_runs_nor_is_skipped(op: object) -> None:
    case = Case(48, 16, 11, torch.float32)
    router = case.router(prepared=op is route.route)
    free = op(case.x, case.norm, router, tile=TILE)
    assert free.run.any()
    assert free.skip.any()
    active = torch.arange(11) % 3 > 0
    got = op(case.x, case.norm, router, tile=TILE, active=active)
    assert torch.equal(got.weight, free.weight)
    assert torch.equal(got.run, free.run & active)
    assert torch.equal(got.skip, free.skip & active)


@pytest.mark.parametrize("rows", [1, 7, 16, 144, 2500])
@pytest.mark.parametrize("op", [route.row_map, reference_routes.row_map])
def test_row_map_gathers_active_rows_in_order(op: object, rows: int) -> None:
    active = torch.rand(10, rows, generator=torch.Generator().manual_seed(rows)) < 0.4
    active[2], active[6] = False, True
    active = active[::2]
    got = op(active)
    assert got.row.dtype == got.count.dtype == torch.int32
    assert got.row.shape == active.shape
    for layer in range(5):
        expected = torch.nonzero(active[layer]).flatten().tolist()
        assert int(got.count[layer]) == len(expected)
        assert got.row[layer].tolist() == expected + [-1] * (rows - len(expected))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [576, 2048, 4096, 40])
def test_route_rule_fixes_the_order_of_a_sum(columns: int, itemsize: int) -> None:
    rules = [route_rule(columns // 16, columns, rows, 8, itemsize, 90) for rows in (1, 8, 16, 32, 64)]
    assert len(set(rules)) == 1
