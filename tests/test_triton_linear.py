"""Norms and products against float64, each row against itself among other rows, and the launch rules."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from skipjack.kernels import launch, product_rules
from skipjack.kernels.linear import linear, logits, prepare, prepare_stack
from skipjack.kernels.norm import normalise
from skipjack.kernels.product_rules import (
    ENOUGH_PROGRAMS,
    LIGHT_RUN,
    ROOM,
    SHARED_BYTES,
    ProductRule,
    product_rule,
    projection_rule,
)
from skipjack.kernels.triton_ops import TRITON
from skipjack.kernels.values import Matrix, Norm

TILE = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RTOL = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MODELS = {
    "llama-8b": (4096, 14336, 32, 8, 128, 128256),
    "llama-1b": (2048, 8192, 32, 8, 64, 128256),
    "qwen-4b": (2560, 9728, 32, 8, 128, 151936),
    "smollm-135m": (576, 1536, 9, 3, 64, 49152),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not written is NaN."""
    empty = torch.empty

    def nan(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(torch, "empty", nan)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(DEVICE)


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).norm() / expected.norm()
    assert error < RTOL[got.dtype], f"relative error {error:.2e}"


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    x = x.double()
    if norm is None:
        return x
    if norm.bias is None:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def activated(y: Tensor, activation: str | None) -> Tensor:
    if activation == "silu_gate":
        gate, up = y.chunk(2, -1)
        return gate / (1 + (-gate).exp()) * up
    if activation == "gelu_tanh":
        return 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
    return y


def a_norm(columns: int, kind: str | None, dtype: torch.dtype) -> Norm | None:
    if kind is None:
        return None
    weight = 1 + randn(columns, seed=11) / 4
    bias = randn(columns, dtype=dtype, seed=12) if kind == "layer" else None
    return Norm(weight.to(dtype), bias, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("columns", [1, 7, 40, 576])
def test_normalise_is_the_formula(columns: int, kind: str, dtype: torch.dtype) -> None:
    x = (randn(5, columns + 3, dtype=dtype) + 1)[:, :columns]
    norm = a_norm(columns, kind, dtype)
    assert norm is not None
    assert_near(normalise(x, norm), normed(x, norm))


def test_prepare_pads_columns_with_zeros_and_copies_only_then() -> None:
    fits, odd = randn(6, 32), randn(6, 33)
    assert prepare(fits).data.data_ptr() == fits.data_ptr()
    matrix = prepare(odd)
    assert (matrix.rows, matrix.columns, matrix.packed, matrix.data.shape) == (6, 33, False, (6, 48))
    assert torch.equal(matrix.data[:, :33], odd)
    assert not matrix.data[:, 33:].any()
    assert prepare(randn(32, 6).T).data.is_contiguous()


def light(weight: Tensor) -> tuple[Matrix, Tensor]:
    """A weight in eight bits, and what that is: float64 [N, K]."""
    matrix = TRITON.quantise(prepare(weight))
    assert matrix.scale is not None
    return matrix, matrix.data[:, : weight.shape[1]].double() * matrix.scale.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_are_the_nearest_multiples_of_a_rows_greatest_magnitude(dtype: torch.dtype) -> None:
    weight = randn(9, 40, dtype=dtype)
    weight[3] = 0
    matrix, values = light(weight)
    assert (matrix.data.dtype, matrix.data.shape, matrix.columns) == (torch.int8, (9, 48), 40)
    assert matrix.scale is not None
    assert matrix.scale.dtype == torch.float32
    assert not matrix.data[:, 40:].any()
    greatest = weight.double().abs().amax(1)
    torch.testing.assert_close(matrix.scale.double(), greatest / 127, rtol=1e-6, atol=0)
    assert ((weight.double() - values).abs() <= greatest[:, None] / 127 * 0.5001).all()
    assert torch.equal(matrix.data.abs().amax(1), torch.where(greatest > 0, 127, 0))


def test_rows_of_a_weight_in_eight_bits_are_the_weight_of_these_rows() -> None:
    weight, rows = randn(9, 40), torch.tensor([1, 4, 8], device=DEVICE)
    taken, expected = TRITON.take_rows(light(weight)[0], rows), light(weight[rows])[0]
    assert (taken.rows, taken.columns, taken.packed) == (3, 40, False)
    assert taken.scale is not None
    assert expected.scale is not None
    assert torch.equal(taken.data, expected.data)
    assert torch.equal(taken.scale, expected.scale)


@pytest.mark.parametrize("columns", [32, 33])
def test_a_stack_is_one_tensor_and_its_layers(columns: int) -> None:
    weight = randn(3, 5, columns)
    stack = prepare_stack(weight)
    assert stack.data is not None
    assert stack.data.is_contiguous()
    assert len(stack) == 3
    for layer in range(3):
        assert stack[layer].data.data_ptr() == stack.data[layer].data_ptr()
        assert torch.equal(stack[layer].data[:, :columns], weight[layer])


CASES = [
    # rows, columns, weight rows, activation, norm, bias, residual, scale, dtype
    (1, 576, 576, None, None, False, True, False, torch.float32),
    (9, 1536, 70, None, None, True, True, False, torch.float32),
    (11, 40, 33, None, "rms", True, True, True, torch.float32),
    (3, 33, 7, None, "layer", True, False, False, torch.float32),
    (5, 7, 5, None, "rms", False, False, True, torch.float32),
    (2, 12, 1, None, "rms", False, False, False, torch.float32),
    (16, 576, 206, "silu_gate", "rms", True, False, False, torch.float32),
    (4, 33, 10, "silu_gate", "layer", False, True, True, torch.float32),
    (7, 80, 66, "gelu_tanh", "layer", True, False, False, torch.float32),
    (3, 576, 192, None, "rms", True, True, False, torch.bfloat16),
    (9, 33, 130, "silu_gate", "rms", True, False, False, torch.bfloat16),
    (2, 1536, 40, "gelu_tanh", "layer", True, True, True, torch.bfloat16),
    (3, 576, 40, "silu_gate", "rms", False, False, False, torch.float16),
    (3, 40, 40, None, "layer", True, True, False, torch.float16),
]


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_linear_is_the_formula(
    case: tuple[int, int, int, str | None, str | None, bool, bool, bool, torch.dtype], eight_bits: bool
) -> None:
    rows, columns, weight_rows, activation, kind, has_bias, has_residual, has_scale, dtype = case
    width = weight_rows // 2 if activation == "silu_gate" else weight_rows
    x, weight = randn(rows, columns, dtype=dtype), randn(weight_rows, columns, seed=1).div(columns**0.5).to(dtype)
    norm = a_norm(columns, kind, dtype)
    bias = randn(weight_rows, dtype=dtype, seed=2) if has_bias else None
    residual = randn(rows, width, dtype=dtype, seed=3) if has_residual else None
    scale = randn(rows, seed=4) if has_scale else None
    matrix, values = light(weight) if eight_bits else (prepare(weight), weight.double())
    expected = normed(x, norm) @ values.T + (0 if bias is None else bias.double())
    expected = activated(expected, activation)
    expected *= 1 if scale is None else scale.double()[:, None]
    expected += 0 if residual is None else residual.double()
    got = linear(
        x,
        matrix,
        tile=TILE,
        norm=norm,
        bias=bias,
        activation=activation,
        residual=residual,
        scale=scale,
    )
    assert got is residual or residual is None
    assert_near(got, expected)


@pytest.mark.parametrize("rows", [1, 3, 9, 33, 70])
def test_without_a_tile_the_formula_is_the_same(rows: int) -> None:
    x, weight, residual = randn(rows, 576), prepare(randn(70, 576, seed=1) / 24), randn(rows, 70, seed=2)
    norm = a_norm(576, "rms", torch.float32)
    expected = residual.double() + normed(x, norm) @ weight.data.double().T
    assert_near(linear(x, weight, tile=None, norm=norm, residual=residual), expected)


def test_logits_are_the_normed_product() -> None:
    x, weight, norm = randn(3, 40), randn(223, 40, seed=1), Norm(randn(40, seed=2), None, 1e-5)
    assert_near(logits(x, norm, prepare(weight), tile=TILE), normed(x, norm) @ weight.double().T)


def test_rows_may_be_spaced() -> None:
    x, residual, weight = randn(5, 48)[:, :40], randn(5, 64, seed=1), randn(33, 40, seed=2)
    before = residual.clone()
    got = linear(x, prepare(weight), tile=TILE, residual=residual[:, 8:41])
    assert_near(got, before[:, 8:41].double() + x.double() @ weight.double().T)
    assert torch.equal(residual[:, :8], before[:, :8])
    assert torch.equal(residual[:, 41:], before[:, 41:])


def test_large_activations_do_not_overflow_before_the_norm() -> None:
    x, weight = randn(2, 64, dtype=torch.float16) * 8000, randn(16, 64, dtype=torch.float16, seed=1)
    norm = Norm(torch.full((64,), 50.0, dtype=torch.float16, device=DEVICE), None, 1e-5)
    assert_near(linear(x, prepare(weight), tile=TILE, norm=norm), normed(x, norm) @ weight.double().T)


@pytest.mark.parametrize("rows", [3, 70])
def test_a_prompt_of_weights_in_eight_bits_is_the_formula(rows: int) -> None:
    x, (matrix, values) = randn(rows, 80, dtype=torch.bfloat16), light(randn(70, 80, dtype=torch.bfloat16, seed=1))
    norm = a_norm(80, "rms", torch.bfloat16)
    assert_near(linear(x, matrix, tile=64, norm=norm), normed(x, norm) @ values.T)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("has_scale", [False, True])
def test_inactive_rows_keep_their_residual_and_disturb_no_other(has_scale: bool, eight_bits: bool) -> None:
    x, weight, residual = randn(19, 40), prepare(randn(70, 40, seed=1)), randn(19, 70, seed=2)
    weight = TRITON.quantise(weight) if eight_bits else weight
    norm, scale = Norm(randn(40, seed=3), None, 1e-5), randn(19, seed=4) if has_scale else None
    active = torch.zeros(38, dtype=torch.bool, device=DEVICE)[::2]
    active[[0, 3, 18]] = True
    whole = linear(x, weight, tile=TILE, norm=norm, residual=residual.clone(), scale=scale)
    masked = torch.where(active[:, None], x, math.nan)
    got = linear(masked, weight, tile=TILE, norm=norm, residual=residual.clone(), scale=scale, active=active)
    assert torch.equal(got[active], whole[active])
    assert torch.equal(got[~active], residual[~active])


@pytest.mark.parametrize("eight_bits", [False, True])
def test_nothing_active_reads_no_weight(eight_bits: bool) -> None:
    weight = prepare(torch.full((16, 40), math.nan, device=DEVICE))
    weight = TRITON.quantise(weight) if eight_bits else weight
    residual = randn(9, 16)
    before = residual.clone()
    linear(randn(9, 40), weight, tile=TILE, residual=residual, active=torch.zeros(9, dtype=torch.bool, device=DEVICE))
    assert torch.equal(residual, before)


def test_everything_active_changes_no_bit() -> None:
    x, weight, residual = randn(9, 576), prepare(randn(40, 576, seed=1)), randn(9, 40, seed=2)
    active = torch.ones(9, dtype=torch.bool, device=DEVICE)
    expected = linear(x, weight, tile=TILE, residual=residual.clone())
    assert torch.equal(linear(x, weight, tile=TILE, residual=residual.clone(), active=active), expected)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(
    ("columns", "weight_rows", "activation", "counts"),
    [
        (33, 40, None, [*range(1, 17), 32, 64, 144]),
        (40, 34, "silu_gate", [*range(2, 17, 3), 32]),
        (576, 72, None, [2, 3, 8, 9, 16]),
        (1536, 66, "silu_gate", [2, 9]),
    ],
)
def test_linear_rows_do_not_depend_on_their_number_or_place(
    columns: int, weight_rows: int, activation: str | None, counts: list[int], eight_bits: bool
) -> None:
    last = max(counts)
    width = weight_rows if activation is None else weight_rows // 2
    x, residual = randn(last, columns), randn(last, width, seed=1)
    matrix, norm = prepare(randn(weight_rows, columns, seed=2) / 8), a_norm(columns, "rms", torch.float32)
    matrix = TRITON.quantise(matrix) if eight_bits else matrix

    def run(part: slice) -> Tensor:
        return linear(x[part], matrix, tile=TILE, norm=norm, activation=activation, residual=residual[part].clone())

    rows = [row for row in (0, 1, 5, 7, 8, 15, 31, 63, 100, 143) if row < last]
    alone = {row: run(slice(row, row + 1))[0] for row in rows}
    for count in counts:
        for start in {0, last - count}:
            together = run(slice(start, start + count))
            for row in rows:
                if start <= row < start + count:
                    assert torch.equal(together[row - start], alone[row])


def matrices(model: str) -> list[tuple[int, int]]:
    hidden, inner, heads, kv_heads, head_dim, vocabulary = MODELS[model]
    width = heads * head_dim
    return [
        ((heads + 2 * kv_heads) * head_dim, hidden),
        (hidden, width),
        (2 * inner, hidden),
        (hidden, inner),
        (vocabulary, hidden),
    ]


@pytest.mark.parametrize("tile", [8, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("model", MODELS)
def test_product_rules_fit_every_matrix_and_round_alike(model: str, arch: int, itemsize: int, tile: int) -> None:
    for weight_rows, columns in [*matrices(model), (33, 7), (5, 40)]:
        every = [*range(1, 19), 32, 33, 64, 144]
        both = [
            [product_rule(weight_rows, columns, rows, tile, itemsize, arch, normed=normed) for rows in every]
            for normed in (True, False)
        ]
        assert all(len({(rule.block_k, rule.parts) for rule in rules}) == 1 for rules in both)
        for rule in (rule for rules in both for rule in rules):
            assert rule.parts == 1 or (rule.block_k // rule.parts >= 16 and rule.warps <= rule.parts)
            assert rule.block_k & (rule.block_k - 1) == 0
            assert rule.block_k < 2 * launch.padded(columns), "a step that another half as long would hold"
            assert rule.block_k % rule.chunk == 0
            assert rule.chunk // rule.parts % 16 == 0
            assert rule.rows & (rule.rows - 1) == 0
            most = {2: {8: 64, 64: 128}, 4: {8: 16, 64: 64}}[itemsize][tile]
            assert rule.rows == tile or (arch and tile <= rule.rows <= most)
            # The first chunk is held in registers; a weight of one step needs no buffer for another.
            buffers = min(rule.stages, -(-launch.padded(columns) // rule.chunk)) - 1
            room = ROOM.get(arch, SHARED_BYTES)
            assert buffers * (rule.block_n + rule.rows) * rule.chunk * itemsize <= room or arch == 0
            assert rule.stages >= (2 if arch else 1)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
@pytest.mark.parametrize("model", MODELS)
def test_rules_of_eight_bits_round_alike_and_have_as_much_on_its_way(model: str, arch: int, itemsize: int) -> None:
    _, _, heads, kv_heads, head_dim, _ = MODELS[model]
    every = [*range(1, 19), 32, 33, 64, 144]

    def rules(weight_rows: int, columns: int) -> list[list[ProductRule]]:
        given = (weight_rows, columns)
        return [
            *(
                [product_rule(*given, rows, 8, itemsize, arch, short=short, summed=summed) for rows in every]
                for short in (False, True)
                for summed in (False, True)
            ),
            *(
                [projection_rule(head_dim, whole, *given, rows, 8, itemsize, arch) for rows in every]
                for whole in (False, True)
            ),
        ]

    shapes = [*matrices(model), (33, 7), (5, 40), ((heads + 2 * kv_heads) * head_dim, 576)]
    for (_, columns), group in ((shape, group) for shape in shapes for group in rules(*shape)):
        mine = [rule.light(columns, itemsize) for rule in group]
        assert len({(rule.block_k, rule.parts) for rule in mine}) == 1
        for rule, other in zip(mine, group, strict=True):
            assert (rule.block_n, rule.warps, rule.parts) == (other.block_n, other.warps, other.parts)
            assert rule.rows in (other.rows, other.rows // 2)
            assert rule.rows >= 8
            assert rule.parts == 1 or rule.chunk // rule.parts >= LIGHT_RUN
            assert rule.block_k % rule.chunk == 0
            buffers, before = rule.stages - 1, other.stages - 1
            taken = buffers * (rule.block_n + rule.rows * itemsize) * rule.chunk
            anyway = before * (other.block_n + other.rows) * other.chunk * itemsize
            assert buffers == 1 or taken <= max(SHARED_BYTES, anyway)
            assert buffers * rule.chunk <= 2 * before * other.chunk or buffers == 1


def test_a_weight_in_eight_bits_has_more_of_its_steps_on_their_way() -> None:
    for shape, stages in (((28672, 4096), 3), ((4096, 14336), 4), ((128256, 2048), 5)):
        plain = product_rule(*shape, 1, 8, 2, 90, normed=shape[1] == 4096)
        rule = plain.light(shape[1], 2)
        assert (rule.block_k, rule.stages) == (plain.block_k, stages)
        assert rule.stages > plain.stages
    short = product_rule(49152, 576, 1, 8, 2, 90, summed=True)
    assert (short.block_k, short.light(576, 2).block_k) == (64, 128), "sixteen columns of a part are too few"


def test_beside_many_sums_less_is_widened_or_in_more_registers() -> None:
    rule = product_rule(128256, 2048, 32, 8, 2, 90, summed=True)
    mine = rule.light(2048, 2)
    assert (rule.registers, mine.registers, mine.rows) == (128, launch.PRODUCT_REGISTERS, rule.rows)
    many = product_rule(28672, 4096, 64, 8, 2, 90)
    assert (many.rows, many.light(4096, 2).rows) == (64, 32), "18 registers are spilled otherwise"
    few = product_rule(16384, 2048, 32, 8, 2, 90)
    assert few.light(2048, 2).registers == few.registers == 128
    whole = [projection_rule(128, True, 6144, 2560, rows, 8, 2, 90) for rows in (8, 16)]
    assert [(rule.rows, rule.light(2560, 2).rows) for rule in whole] == [(8, 8), (16, 8)]


def test_a_small_weight_is_one_step_where_a_program_has_the_shared_memory_for_it() -> None:
    for arch, step in ((80, 2048), (86, 1024), (89, 1024), (90, 2048), (100, 2048), (120, 1024)):
        for rows in (1, 16, 64):
            rule = product_rule(2048, 2048, rows, 8, 2, arch)
            assert (rule.block_k, rule.parts, rule.warps) == (step, 8, 8 if rows > 8 or step == 2048 else 4)
    for weight_rows, columns, itemsize in ((2128, 2048, 2), (2048, 1024, 2), (2048, 2048, 4)):
        assert product_rule(weight_rows, columns, 1, 8, itemsize, 90).block_k <= 1024


def test_programs_with_a_processor_each_have_twice_the_step_on_its_way() -> None:
    one, nine, many = (product_rule(2048, 8192, rows, 8, 2, 90, normed=False) for rows in (1, 9, 40))
    assert (one.block_k, one.chunk, one.warps) == (2048, 2048, 8)
    assert (nine.block_k, nine.chunk, nine.warps) == (2048, 1024, 8)
    assert (many.block_k, many.chunk, many.warps) == (2048, 512, 8)


def test_programs_that_would_outnumber_processors_take_twice_the_weight_rows() -> None:
    for weight_rows, columns, block_n, block_k, stages in (
        (4096, 4096, 32, 1024, 3), (4096, 14336, 32, 1024, 3), (3072, 576, 32, 1024, 2), (2560, 4096, 16, 1024, 2),
    ):  # fmt: skip
        rule = product_rule(weight_rows, columns, 1, 8, 2, 90, normed=columns == 576)
        assert (rule.block_n, rule.block_k, rule.stages) == (block_n, block_k, stages)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_few_programs_read_the_activations_of_a_large_weight(arch: int) -> None:
    for weight_rows, columns, block_k in (
        (16384, 2048, 512),
        (28672, 4096, 512),
        (128256, 2048, 256),
        (128256, 4096, 512),
    ):
        for rows in (1, 8):
            rule = product_rule(weight_rows, columns, rows, 8, 2, arch)
            assert (rule.block_n, rule.block_k) == (64, block_k)
            assert (rule.stages - 1) * rule.block_n * rule.block_k * 2 == 64 * 1024, "in flight behind the first step"
    assert product_rule(16384, 1024, 1, 8, 2, arch).block_n == 32, "narrow"
    assert product_rule(16384, 2048, 1, 8, 4, arch).block_n == 32, "float32"


def test_a_step_is_mostly_past_a_weight_only_behind_a_norm() -> None:
    for columns, normed, step in ((576, True, 1024), (576, False, 512), (1536, False, 2048), (700, False, 1024)):
        assert product_rule(576, columns, 1, 8, 2, 90, normed=normed).block_k == step


@pytest.mark.parametrize("weight_rows", [1000, 4096, 9000, 128256])
def test_sums_over_weight_rows_do_not_follow_the_rows_of_a_pass(weight_rows: int) -> None:
    rules = [product_rule(weight_rows, 2048, rows, 8, 2, 90, summed=True) for rows in (1, 8, 16, 17, 64, 144)]
    assert len({rule.block_n for rule in rules}) == 1


def test_more_rows_take_wider_programs_until_these_are_full() -> None:
    widths = [product_rule(4096, 4096, rows, 8, 2, 90).rows for rows in (1, 8, 9, 16, 17, 32, 33, 144)]
    assert widths == [8, 8, 16, 16, 32, 32, 64, 64]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_many_rows_read_a_large_weight_from_memory_once(arch: int) -> None:
    """What programs share with each other comes from the L2 cache, as little of it as registers allow."""
    for rows, most in ((17, 2.1), (32, 2.1), (33, 5.1), (64, 5.1), (128, 10.1)):
        rule = product_rule(28672, 4096, rows, 8, 2, arch)
        assert moved(rule, rows) <= most
        assert rule.block_n * rule.rows * rule.parts <= 128 * 32 * rule.warps, "registers of the sums"
        assert rule.norm_apart


def test_a_processor_holds_two_wide_programs_of_a_large_weight() -> None:
    large, small, narrow = (
        product_rule(*shape, 8, 2, 90) for shape in ((28672, 1536, 16), (4096, 1536, 16), (28672, 1536, 8))
    )
    assert (large.warps, large.parts, large.registers) == (8, 8, 128)
    assert 2 * 32 * large.warps * large.registers <= 65536, "registers of a processor"
    assert (small.warps, small.parts, small.registers) == (8, 8, launch.PRODUCT_REGISTERS)
    assert (narrow.warps, narrow.parts, narrow.registers) == (4, 8, launch.PRODUCT_REGISTERS)
    assert product_rule(28672, 1536, 16, 8, 2, 100) == large._replace(registers=launch.PRODUCT_REGISTERS)
    assert product_rule(49152, 576, 16, 8, 2, 90)[3:4] == (4,), "of four parts, as steps of 64 columns have"


@pytest.mark.parametrize("shape", [(16384, 2048), (28672, 4096), (19456, 2560)])
def test_a_processor_holds_two_programs_of_a_large_weight_up_to_32_rows(shape: tuple[int, int]) -> None:
    for rows in (1, 8, 9, 16, 32):
        rule = product_rule(*shape, rows, 8, 2, 90)
        assert (rule.warps, rule.registers) == ((8, 128) if rows > 8 else (4, launch.PRODUCT_REGISTERS))
        one = (rule.stages - 1) * (rule.block_n + rule.rows) * rule.chunk * 2
        assert 2 * one <= 200 * 1024, "shared memory of a processor"
        assert rule.block_n == (64 if rows <= 8 else 32)
    assert product_rule(*shape, 64, 8, 2, 90).registers == launch.PRODUCT_REGISTERS


@pytest.mark.parametrize(("rows", "wide"), [(9, 16), (32, 32), (33, 64), (64, 64), (144, 64)])
@pytest.mark.parametrize("columns", [2048, 4096])
def test_a_head_is_read_once_for_up_to_64_rows(columns: int, rows: int, wide: int) -> None:
    rule = product_rule(128256, columns, rows, 8, 2, 90, summed=True)
    assert (rule.block_n, rule.rows) == (64, wide)
    assert rule.stages == 3, "two chunks on the way"
    assert (rule.stages - 1) * (rule.block_n + rule.rows) * rule.chunk * 2 <= 200 * 1024
    assert rule.block_n * rule.rows * rule.parts <= 256 * 32 * rule.warps, "registers of the sums"


def moved(rule: ProductRule, rows: int) -> float:
    """Bytes the programs of a product read for every byte of weights, activations included."""
    return -(-rows // rule.rows) + rows / rule.block_n


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("model", MODELS)
def test_fast_numerics_takes_the_products_of_exact_numerics(model: str, arch: int, itemsize: int) -> None:
    for weight_rows, columns in matrices(model):
        for rows in (1, 3, 8, 9, 16, 17, 33, 64, 65, 100, 144, 512, 1024):
            tile = 8 if rows <= 64 else 64
            exact, fast = (product_rule(weight_rows, columns, rows, t, itemsize, arch) for t in (tile, None))
            assert fast == exact


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("model", MODELS)
def test_prompts_take_blocks_as_large_as_leave_work_for_every_processor(model: str, arch: int) -> None:
    for weight_rows, columns in matrices(model):
        rules = {rows: product_rule(weight_rows, columns, rows, 64, 2, arch) for rows in (5, 64, 65, 512, 4096)}
        assert len({(rule.block_k, rule.parts) for rule in rules.values()}) == 1
        for rows, rule in rules.items():
            padded = max(64, 1 << (rows - 1).bit_length())
            assert weight_rows // rule.block_n * padded // rule.rows >= ENOUGH_PROGRAMS or rule.block_n == 64
            assert rule.rows <= padded
            assert rule.stages * (rule.block_n + rule.rows) * rule.block_k * 2 <= 99 * 1024
        assert moved(rules[4096], 4096) == 64


@pytest.mark.parametrize("block_k", [32, 64, 128, 256])
@pytest.mark.parametrize(("norm", "dtype"), [("rms", torch.float32), ("rms", torch.float16), ("layer", torch.float32)])
def test_the_last_step_may_reach_past_the_weight(
    monkeypatch: pytest.MonkeyPatch, block_k: int, norm: str, dtype: torch.dtype
) -> None:
    """Weights lie in memory of other values, so that a column too many is not a zero."""
    rule = product_rule
    monkeypatch.setattr(
        product_rules,
        "product_rule",
        lambda *given, **options: rule(*given, **options)._replace(block_k=block_k, most_parts=8),
    )
    rows, columns, outputs = 9, 80, 33
    x = (torch.randn(rows, columns) + 0.5).to(dtype)
    around = torch.full((outputs + 4, columns), 1e4, dtype=dtype)
    around[:outputs] = torch.randn(outputs, columns).to(dtype)
    weight = Matrix(around[:outputs], outputs, columns, packed=False)
    scale, bias = torch.rand(columns).to(dtype) + 0.5, torch.randn(columns).to(dtype) if norm == "layer" else None
    got = linear(x, weight, tile=8, norm=Norm(scale, bias, 1e-5))
    wide = x.double() - (x.double().mean(1, keepdim=True) if norm == "layer" else 0)
    wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5) * scale.double()
    wide = wide if bias is None else wide + bias.double()
    expected = wide @ around[:outputs].double().T
    error = (got.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(("columns", "block_k"), [(208, 128), (256, 64), (200, 256), (80, 16)])
def test_a_step_in_chunks_is_summed_as_the_step_is(monkeypatch: pytest.MonkeyPatch, columns: int, block_k: int) -> None:
    """Each part adds its groups of 16 columns in order, step after step; then parts are added in pairs.

    A group has one column that is not zero, so that its own sum has one order.
    """
    rule = product_rule
    monkeypatch.setattr(
        product_rules,
        "product_rule",
        lambda *given, **options: rule(*given, **options)._replace(block_k=block_k, run=16),
    )
    groups = -(-columns // 16)
    kept = torch.tensor([16 * group + group % 8 for group in range(groups)])
    x = torch.zeros(9, columns).index_copy_(1, kept, torch.randn(9, groups) * 10 ** torch.randn(groups))
    weight = torch.randn(33, columns)
    parts = 4 if block_k >= 64 else 1
    sums = torch.zeros(parts, 9, 33)
    for group in range(groups):
        column = kept[group]
        sums[16 * group % block_k // (block_k // parts)] += x[:, column, None] * weight[:, column]
    while len(sums) > 1:
        sums = sums[::2] + sums[1::2]
    assert torch.equal(linear(x, prepare(weight), tile=8), sums[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("columns", [40, 208])
def test_a_norm_apart_has_the_bits_of_the_norm_inside(columns: int, kind: str, dtype: torch.dtype) -> None:
    x, weight = randn(40, columns, dtype=dtype), prepare(randn(33, columns, dtype=dtype))
    norm = a_norm(columns, kind, dtype)
    inside = torch.cat([linear(x[start : start + 8], weight, tile=8, norm=norm) for start in range(0, 40, 8)])
    assert torch.equal(linear(x, weight, tile=8, norm=norm), inside)


def test_what_is_asked_ahead_is_a_whole_number_of_pieces_of_a_weight_where_a_kernel_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not launch.asks(90), "not in the interpreter"
    monkeypatch.setattr(launch, "_nvidia", lambda: True)
    assert (launch.asks(80), launch.asks(90)) == (False, True), "no kernel of sm_80 waits"
    assert launch.ahead_bytes(4096 * 4096 * 2) == 8 << 20
    assert launch.ahead_bytes(576 * 576 * 2) == 40 * 16384 <= 576 * 576 * 2
    assert launch.ahead_bytes(64 * 64 * 2) == launch.ahead_bytes(0) == 0
    assert launch.ahead_bytes(2 * 14336 * 4096 * 2) == 0, "so long a weight keeps memory busy by itself"
    monkeypatch.setattr(launch, "AHEAD_BYTES", 0)
    assert not launch.asks(90)


@pytest.mark.parametrize(("columns", "width"), [(576, 576), (4096, 4096), (33, 48), (1, 16), (16, 16)])
def test_padded_columns_keep_rows_aligned(columns: int, width: int) -> None:
    assert launch.padded(columns) == width
