"""The sampling kernel against the PyTorch op, and its noise and logarithm against their definitions."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from skipjack.kernels import launch, noise, reference_verify
from skipjack.kernels import sample as sample_kernel
from skipjack.kernels.sample import sample
from skipjack.kernels.warping import log, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _log_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = log(tl.load(x_ptr + offs))
    tl.store(y_ptr + offs, y)
    tl.store(z_ptr + offs, log(-y))


@triton.jit
def _uniform_kernel(seed_ptr, position_ptr, out_ptr, start, SIZE: tl.constexpr, STREAM: tl.constexpr):
    row = tl.program_id(0)
    u = uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row), start, SIZE, STREAM)
    tl.store(out_ptr + row * SIZE + tl.arange(0, SIZE), u)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token the kernel does not write is −1."""

    class Torch:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, *shape: object, **kwargs: object) -> Tensor:
            return torch.empty(*shape, **kwargs).fill_(-1)

    monkeypatch.setattr(sample_kernel, "torch", Torch())


def test_logarithm_of_every_uniform_and_of_its_logarithm() -> None:
    block = 1 << 18
    for chunk in torch.arange(2**23).split(1 << 20):
        x = ((chunk.float() + 0.5) * 2.0**-23).to(DEVICE)
        y, z = torch.empty_like(x), torch.empty_like(x)
        _log_kernel[(len(x) // block,)](x, y, z, BLOCK=block)
        for argument, got in ((x, y), (-y, z)):
            exact = argument.double().log()
            relative = ((got.double() - exact).abs() / exact.abs().clamp_min(1e-300)).masked_fill(exact == 0, 0)
            assert relative.max() < 2.0**-23
            assert got[exact == 0].eq(0).all()


def test_noise_is_that_of_the_reference() -> None:
    seed = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, -81985529216486896], device=DEVICE)
    position = torch.tensor([0, 5, 2**31 - 1, 131072, 1, 77], device=DEVICE)
    for start, stream in ((0, 0), (0, 1), (0, 2), (64, 0)):
        out = torch.empty(len(seed), 64, device=DEVICE)
        _uniform_kernel[(len(seed),)](seed, position, out, start, SIZE=64, STREAM=stream)
        assert torch.equal(out, noise.uniform(seed, position, 128, stream)[:, start : start + 64])


def rules(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy, every rule alone, and combinations; more rules than there are sizes they are limits of."""
    table = [
        (1.0, 0, 1.0, 0.0),
        (0.0, 3, 0.5, 0.1),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.05),
        (1.0, 1, 1.0, 0.0),
        (1.0, 10**6, 1.0, 1.0),
        (2.0, 0, 1e-9, 0.0),
        (0.9, 6, 0.9, 0.02),
        (5.0, -1, 0.999, 0.0),
    ]
    columns = zip(*(table[row % len(table)] for row in range(rows)), strict=True)
    temperature, top_k, top_p, min_p = (torch.tensor(column, device=DEVICE) for column in columns)
    return temperature, top_k, top_p, min_p


def scores_of(rows: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows with ties, of which a fifth of the ids cannot occur; the first id is often the best."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(rows, size, generator=generator) * 2.5 * 8).round() / 8
    scores[:, 4::5] = -torch.inf
    scores[::3, 0] = 9.0
    return scores.to(DEVICE, dtype)


def seeds(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return seed.to(DEVICE), torch.randint(0, 5000, (rows,), generator=generator).to(DEVICE)


@pytest.mark.parametrize(
    ("size", "dtype", "rows"),
    [
        (12, torch.float32, 10),
        (1000, torch.bfloat16, 10),
        (4099, torch.float16, 10),
        (8192, torch.bfloat16, 10),
        (33, torch.bfloat16, 16),
        (49152, torch.float32, 3),
        (1, torch.float32, 2),
    ],
)
def test_sample_draws_the_reference_tokens(size: int, dtype: torch.dtype, rows: int) -> None:
    scores, rule = scores_of(rows, size, dtype, size), rules(rows)
    token = sample(scores, *rule, *seeds(rows))
    assert torch.equal(token, reference_verify.sample(scores, *rule, *seeds(rows)))


@pytest.mark.parametrize(
    ("size", "dtype", "rows", "count"),
    [
        (12, torch.float32, 10, 5),
        (3, torch.float32, 4, 5),
        (4099, torch.float16, 5, 4),
        (1000, torch.bfloat16, 4, 1),
        (33, torch.bfloat16, 1, 32),
        (20000, torch.float32, 1, 3),
    ],
)
def test_siblings_are_those_of_the_reference(size: int, dtype: torch.dtype, rows: int, count: int) -> None:
    scores, rule = scores_of(rows, size, dtype, size), rules(rows)
    token = sample(scores, *rule, *seeds(rows), stream=7, count=count)
    assert torch.equal(token, reference_verify.sample(scores, *rule, *seeds(rows), stream=7, count=count))
    assert torch.equal(token[:, 0], reference_verify.sample(scores, *rule, *seeds(rows), stream=7))


def test_greedy_siblings_are_in_order_and_ids_that_cannot_occur_repeat_the_first() -> None:
    scores = torch.full((3, 50), -torch.inf, device=DEVICE)
    scores[0] = 0.0
    scores[0, [7, 33]] = 4.0
    scores[1, [40, 9]] = 1.0
    for temperature in (0.0, 1e-4):
        rule = torch.full((3,), temperature, device=DEVICE), *(field[:3] for field in rules(1)[1:])
        for op in (sample, reference_verify.sample):
            token = op(scores, *(field.expand(3) for field in rule), *seeds(3), count=4)
            assert sorted(token[0, :2].tolist()) == [7, 33]
            assert sorted(token[1, :2].tolist()) == [9, 40]
            assert token[1, 2:].eq(token[1, 0]).all()
            assert token[2].eq(0).all()
            if temperature == 0:
                assert token[:2].tolist() == [[7, 33, 0, 1], [9, 40, 9, 9]]


def test_what_is_drawn_does_not_depend_on_the_batch() -> None:
    scores, rule, (seed, position) = scores_of(10, 100, torch.bfloat16, 2), rules(10), seeds(10)
    for op in (sample, reference_verify.sample):
        together = op(scores, *rule, seed, position)
        order = torch.tensor([7, 2, 8], device=DEVICE)
        some = op(scores[order], *(field[order] for field in rule), seed[order], position[order])
        assert torch.equal(some, together[order])


def test_sample_takes_rows_of_wider_tensors() -> None:
    wide, rule = scores_of(4, 80, torch.float32, 3), rules(4)
    view = wide[:, 16:49]
    expected = reference_verify.sample(view.contiguous(), *rule, *seeds(4))
    assert torch.equal(sample(view, *rule, *seeds(4)), expected)
    assert torch.equal(sample(wide.T.contiguous().T[:, 16:49], *rule, *seeds(4)), expected)


def test_greedy_ties_go_to_the_lowest_id_and_hopeless_rows_give_an_id() -> None:
    scores = torch.zeros(3, 50, device=DEVICE)
    scores[1] = -torch.inf
    scores[2, [7, 33]] = 4.0
    zero = torch.zeros(3, device=DEVICE)
    token = sample(scores, zero, zero.long(), zero + 1, zero, *seeds(3))
    assert token.tolist() == [0, 0, 7]


def test_a_row_is_walked_in_blocks_fixed_by_its_size() -> None:
    assert launch.vocabulary_rule(1) == launch.vocabulary_rule(16) == (16, 1)
    assert launch.vocabulary_rule(4099) == launch.vocabulary_rule(151936) == (8192, 16)
