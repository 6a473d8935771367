"""The sampling kernel against the PyTorch op, and its noise and logarithm against their definitions."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from skipjack.kernels import launch, noise, partials, probabilities
from skipjack.kernels import sample as sample_kernel
from skipjack.kernels.reference import verify as reference_verify
from skipjack.kernels.sample import sample
from skipjack.kernels.sampling_rule import sampling_rule
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
def poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(sample_kernel)
    poison(partials)


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
        (64, torch.float16, 10),
        (65, torch.bfloat16, 10),
        (1023, torch.float32, 10),
        (1025, torch.bfloat16, 10),
        (2048, torch.float16, 10),
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
            assert token[2].eq(-1).all()
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
    drawn = reference_verify.sample(view.contiguous(), *rule, *seeds(4))
    assert torch.equal(sample(view, *rule, *seeds(4)), drawn)
    assert torch.equal(sample(wide.T.contiguous().T[:, 16:49], *rule, *seeds(4)), drawn)


def test_greedy_ties_go_to_the_lowest_id_and_hopeless_rows_give_none() -> None:
    scores = torch.zeros(3, 50, device=DEVICE)
    scores[1] = -torch.inf
    scores[2, [7, 33]] = 4.0
    zero = torch.zeros(3, device=DEVICE)
    token = sample(scores, zero, zero.long(), zero + 1, zero, *seeds(3))
    assert token.tolist() == [0, -1, 7]


def expected(scores: Tensor, rule: tuple[Tensor, ...], rows: int, **options: int) -> Tensor:
    return reference_verify.sample(scores, *rule, *seeds(rows), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1e-6, 0, 1.0, 0.0),
        (1e4, 0, 1.0, 0.0),
        (1e4, 3, 1.0, 0.0),
        (30.0, 0, 0.03, 0.0),
        (30.0, 700, 0.9, 0.0),
        (3.0, 2500, 1.0, 0.0),
        (3.0, 0, 1.0, 0.9),
        (3.0, 40, 0.95, 0.02),
        (1e-6, 5, 0.9, 0.5),
    ],
)
def test_likely_ids_may_lie_in_every_block(
    temperature: float, top_k: int, top_p: float, min_p: float, dtype: torch.dtype
) -> None:
    """Values decided by the noise, by the scores, and limits that the first winner does not meet."""
    rows, size = 4, 3000
    generator = torch.Generator().manual_seed(11)
    scores = torch.randn(rows, size, generator=generator) * torch.tensor([[1.0], [4.0], [100.0], [0.01]])
    scores = scores.to(DEVICE, dtype)
    rule = tuple(torch.full((rows,), given, device=DEVICE) for given in (temperature, top_k, top_p, min_p))
    for count in (None, 4):
        token = sample(scores, *rule, *seeds(rows), count=count)
        assert torch.equal(token, expected(scores, rule, rows, count=count))


def test_ties_at_a_threshold_stay_in_whatever_block_they_lie() -> None:
    rows, size = 30, 2500
    scores = torch.full((rows, size), -40.0, device=DEVICE)
    tied = [5, 700, 1024, 1999, 2048, 2499]
    scores[:, tied] = 1.0
    scores[:, 1500] = 2.0
    scores[1::2, 1500] = 1.0
    one = torch.ones(rows, device=DEVICE)
    for rule in (
        (one * 2, one.long() * 2, one, one * 0),
        (one * 2, one.long() * 0, one * 0.3, one * 0),
        (one * 2, one.long() * 0, one, one * 0.5),
    ):
        token = sample(scores, *rule, *seeds(rows))
        assert torch.equal(token, expected(scores, rule, rows))
        assert set(token.tolist()) == {*tied, 1500}


def test_more_siblings_than_are_left() -> None:
    rows, size = 3, 2100
    scores = scores_of(rows, size, torch.bfloat16, 4)
    scores[:, [3, 1030, 2099]] = torch.tensor([11.0, 10.0, 12.0], device=DEVICE, dtype=torch.bfloat16)
    one = torch.ones(rows, device=DEVICE)
    token = sample(scores, one, one.long() * 3, one, one * 0, *seeds(rows), count=6)
    assert torch.equal(token, expected(scores, (one, one.long() * 3, one, one * 0), rows, count=6))
    assert token[:, :3].sort(dim=1).values.tolist() == [[3, 1030, 2099]] * rows
    assert token[:, 3:].eq(token[:, :1]).all()


def test_hopeless_rows_and_scores_that_are_no_numbers() -> None:
    """NaN counts as −∞, and a row without a possible id has none."""
    scores = scores_of(8, 1100, torch.float32, 6)
    scores[2] = -torch.inf
    scores[3] = torch.nan
    scores[4:, ::3] = torch.nan
    scores[6] = -torch.inf
    scores[6, 1050] = -3.0
    clean = torch.where(scores.isnan(), -torch.inf, scores)
    for rule in (rules(8), tuple(field.flip(0) for field in rules(8))):
        for count in (1, 3):
            token = sample(scores, *rule, *seeds(8), count=count)
            hopeful = torch.tensor([0, 1, 4, 5, 6, 7], device=DEVICE)
            assert torch.equal(token[hopeful], expected(clean, rule, 8, count=count)[hopeful])
            assert token[2:4].eq(-1).all()


def test_a_large_row_draws_the_same_in_any_batch() -> None:
    scores, rule, (seed, position) = scores_of(10, 3000, torch.bfloat16, 2), rules(10), seeds(10)
    together = sample(scores, *rule, seed, position, count=3)
    for row in range(10):
        part = slice(row, row + 1)
        alone = sample(scores[part], *(field[part] for field in rule), seed[part], position[part], count=3)
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [7, 1024, 4500])
def test_thresholds_and_masses(size: int, dtype: torch.dtype, poison: Callable[[ModuleType], None]) -> None:
    """Against sorting in float64; no two sums of these scores are as close as they are rounded."""
    poison(probabilities)
    generator = torch.Generator().manual_seed(size)
    table = [
        (k, p, m, spread)
        for k, spread in ((0, 0.3), (0, 6.0), (1, 0.3), (60, 0.3), (60, 6.0), (size - 1, 6.0), (size + 1, 0.3))
        for p, m in ((1.0, 0.0), (0.5, 0.0), (0.95, 0.0), (1.0, 0.05), (0.9, 0.02), (0.0, 0.0), (1.0, 1.0))
    ]
    k, p, m, spread = (torch.tensor(column) for column in zip(*table, strict=True))
    scores = (torch.randn(len(table), size, generator=generator) * spread[:, None]).to(dtype)
    temperature = torch.rand(len(table), generator=generator) + 0.5
    rule = [field.to(DEVICE) for field in (temperature, k, p.float(), m.float())]
    arrivals = torch.full((len(table),), 7, dtype=torch.int32, device=DEVICE)
    warping, best = probabilities.warping_of(scores.to(DEVICE)[:, None], rule, arrivals)
    assert arrivals.eq(0).all()
    assert best.eq(-1).all()
    ordered = scores.double().sort(dim=1, descending=True).values
    for row in range(len(table)):
        x, t = ordered[row], temperature[row].double()
        weight = ((x - x[0]) / t).exp()
        left = torch.ones(size, dtype=torch.bool)
        if m[row] > 0:
            left &= weight >= m[row].double() * (1 - 1e-6)
        if 0 < k[row] < size:
            left &= x >= x[k[row] - 1]
        if p[row] < 1:
            inside = weight * left
            before = inside.cumsum(0) - inside
            reached = x[int((before < p[row].float().double() * inside.sum()).sum().clamp(min=1)) - 1]
            left &= x >= reached
        highest, threshold, mass = warping[row, 0].cpu().double()
        assert highest == x[0]
        assert torch.equal(x >= threshold, left)
        assert mass == pytest.approx(float((weight * left).sum()), rel=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nucleus_may_end_anywhere(dtype: torch.dtype, poison: Callable[[ModuleType], None]) -> None:
    """Among scores that several programs look for, too many to keep, too far down to be told apart, and at one score.

    The program that samples looks for it alone.
    """
    poison(probabilities)
    size, generator = 40000, torch.Generator().manual_seed(3)
    assert sampling_rule(size).parts > 1
    spread, temperature, top_p = zip(
        (2.5, 1.0, 0.9),
        (0.01, 1.0, 0.5),
        (1.0, 1e-7, 0.9),
        (30.0, 8.0, 0.4),
        (3.0, 0.7, 0.0),
        (0.0, 1.0, 0.3),
        strict=True,
    )
    scores = torch.randn(len(spread) + 1, size, generator=generator)
    scores[:-1] *= torch.tensor(spread)[:, None]
    scores[-1] = -17.0 - torch.randint(8, (size,), generator=generator) / 8
    scores[-1, 777] = 0.0
    scores = scores.to(dtype)
    t, p = torch.tensor([*temperature, 1.0]), torch.tensor([*top_p, 0.9995])
    rule = [t, torch.zeros(len(t), dtype=torch.int64), p, torch.zeros(len(t))]
    arrivals = torch.empty(len(t), dtype=torch.int32, device=DEVICE)
    warping, _ = probabilities.warping_of(scores.to(DEVICE)[:, None], [field.to(DEVICE) for field in rule], arrivals)
    for row in range(len(t)):
        x = scores[row].double()
        weight = ((x - x.max()) / t[row].double()).exp()
        ordered, order = x.sort(descending=True)
        inside = weight[order]
        reached = ordered[int((inside.cumsum(0) - inside < p[row].double() * inside.sum()).sum().clamp(min=1)) - 1]
        highest, threshold, mass = warping[row, 0].cpu().double()
        assert highest == x.max()
        assert torch.equal(x >= threshold, x >= reached)
        assert mass == pytest.approx(float(weight[x >= reached].sum()), rel=1e-5)
    token = sample(scores.to(DEVICE), *(field.to(DEVICE) for field in rule), *seeds(len(t)))
    assert torch.equal(token, expected(scores.to(DEVICE), tuple(field.to(DEVICE) for field in rule), len(t)))


def test_blocks_and_segments_are_fixed_by_the_size_of_a_row() -> None:
    assert sampling_rule(1) == sampling_rule(64) == (1, 64, 64, 64, 1, 1, 64, 1)
    assert sampling_rule(65) == (1, 128, 64, 128, 1, 2, 128, 1)
    assert sampling_rule(128256) == (126, 1024, 64, 2048, 8, 2048, 16384, 8)
    assert sampling_rule(250880) == (245, 1024, 64, 2048, 8, 4096, 16384, 8)


def test_a_row_is_walked_in_blocks_fixed_by_its_size() -> None:
    assert launch.vocabulary_rule(1) == launch.vocabulary_rule(16) == (16, 1)
    assert launch.vocabulary_rule(4099) == launch.vocabulary_rule(151936) == (8192, 16)
