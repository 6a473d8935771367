"""The LM head against float64 and, bit for bit, against the logits the product writes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from skipjack.kernels import launch
from skipjack.kernels.head import head
from skipjack.kernels.linear import logits, prepare
from skipjack.kernels.triton_ops import TRITON
from skipjack.kernels.values import Matrix, Norm, Prediction

TILE = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not written is NaN, or a candidate above every other."""
    empty = torch.empty

    def nan(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(2**63 - 1)

    monkeypatch.setattr(torch, "empty", nan)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(DEVICE)


def unit(columns: int, dtype: torch.dtype = torch.float32) -> Norm:
    return Norm(torch.ones(columns, dtype=dtype, device=DEVICE), None, 1e-5)


def assert_is_the_order_of(prediction: Prediction, scores: Tensor, top_k: int | None, ids: Tensor | None) -> None:
    """Exactly the stable order of the written logits, and their log-sum-exp."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order[:, 0] if top_k is None else order[:, :top_k]
    value = scores.gather(1, order.view(len(scores), -1)).view(order.shape)
    assert torch.equal(prediction.token, order if ids is None else ids[order])
    assert torch.equal(prediction.value, value)
    assert prediction.token.dtype == torch.int64
    assert prediction.value.dtype == scores.dtype
    assert prediction.log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(prediction.log_sum_exp.double(), scores.double().logsumexp(-1), rtol=1e-6, atol=2e-6)


CASES = [
    # rows, columns, vocabulary, top_k, ids, dtype
    (1, 576, 223, None, False, torch.float32),
    (11, 40, 70, None, True, torch.float32),
    (3, 33, 1100, 5, False, torch.float32),
    (2, 40, 130, 70, True, torch.float32),
    (2, 7, 5, 9, False, torch.float32),
    (2, 16, 1, None, False, torch.float32),
    (3, 40, 300, 4, True, torch.bfloat16),
    (9, 1536, 96, None, False, torch.bfloat16),
    (2, 40, 300, 3, False, torch.float16),
]


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_head_is_the_order_of_the_logits(
    case: tuple[int, int, int, int | None, bool, torch.dtype], eight_bits: bool
) -> None:
    rows, columns, vocabulary, top_k, has_ids, dtype = case
    x, weight = randn(rows, columns, dtype=dtype), randn(vocabulary, columns, seed=1).div(columns**0.5).to(dtype)
    norm = Norm((1 + randn(columns, seed=2) / 4).to(dtype), None, 1e-5)
    ids = torch.arange(vocabulary, device=DEVICE) * 3 + 2 if has_ids else None
    matrix, values = prepare(weight), weight.double()
    if eight_bits:
        matrix = TRITON.quantise(matrix)
        assert matrix.scale is not None
        values = matrix.data[:, :columns].double() * matrix.scale.double()[:, None]
    prediction = head(x, norm, matrix, tile=TILE, top_k=top_k, ids=ids)
    assert_is_the_order_of(prediction, logits(x, norm, matrix, tile=TILE), top_k, ids)

    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double() @ values.T
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    best = exact.max(-1).values if top_k is None else exact.topk(min(top_k, vocabulary)).values
    torch.testing.assert_close(prediction.value.double(), best, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(prediction.log_sum_exp.double(), exact.logsumexp(-1), rtol=tolerance, atol=tolerance)


def chosen(scores: list[float], top_k: int | None = None, dtype: torch.dtype = torch.float32) -> Prediction:
    """The head of a vocabulary with these logits."""
    weight = torch.zeros(len(scores), 16, dtype=dtype, device=DEVICE)
    weight[:, 0] = torch.tensor(scores, dtype=dtype)
    x = torch.ones(1, 16, dtype=dtype, device=DEVICE)
    return head(x, Norm(x[0], None, 1e-30), Matrix(weight, len(scores), 16, packed=False), tile=TILE, top_k=top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    scores = [-2.0] * 700
    scores[650] = scores[130] = scores[66] = scores[77] = -1.0
    assert chosen(scores, dtype=dtype).token.tolist() == [66]
    assert chosen(scores, 6, dtype).token.tolist() == [[66, 77, 130, 650, 0, 1]]


def test_zeros_of_either_sign_tie() -> None:
    scores = [-1.0] * 80
    scores[70], scores[3] = 0.0, -0.0
    assert chosen(scores, 3).token.tolist() == [[3, 70, 0]]


@pytest.mark.parametrize("vocabulary", [3, 65])
def test_rows_of_padding_are_never_chosen(vocabulary: int) -> None:
    prediction = chosen([-1000.0 - i for i in range(vocabulary)], vocabulary)
    assert prediction.token.tolist() == [list(range(vocabulary))]
    expected = -1000 + math.log(sum(math.exp(-i) for i in range(vocabulary)))
    assert math.isclose(prediction.log_sum_exp.item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("top_k", [None, 2])
def test_nan_is_no_logit(top_k: int | None) -> None:
    scores = [float(i) for i in range(150)]
    scores[72] = scores[149] = math.nan
    assert chosen(scores, top_k).token.tolist() == ([148] if top_k is None else [[148, 147]])
    prediction = chosen([math.nan] * 70, top_k)
    assert prediction.token.tolist() == ([-1] if top_k is None else [[-1, -1]])


def test_infinite_logits() -> None:
    infinite = chosen([0.0, math.inf, 1.0])
    assert (infinite.token.item(), infinite.value.item(), infinite.log_sum_exp.item()) == (1, math.inf, math.inf)
    some = chosen([-math.inf] * 70 + [2.0, -math.inf], 2)
    assert some.token.tolist() == [[70, -1]]
    assert some.value.tolist() == [[2.0, -math.inf]]
    assert some.log_sum_exp.item() == 2.0
    none = chosen([-math.inf] * 70)
    assert (none.token.item(), none.log_sum_exp.item()) == (-1, -math.inf)


def test_a_reduced_vocabulary_in_eight_bits_is_its_rows_of_the_whole() -> None:
    x, norm, matrix = randn(3, 40), unit(40), TRITON.quantise(prepare(randn(200, 40, seed=1)))
    ids = torch.arange(5, 200, 3, device=DEVICE)
    reduced = head(x, norm, TRITON.take_rows(matrix, ids), tile=TILE, top_k=4, ids=ids)
    whole = logits(x, norm, matrix, tile=TILE)[:, ids]
    assert_is_the_order_of(reduced, whole, 4, ids)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_rows_do_not_depend_on_their_number_or_place(eight_bits: bool) -> None:
    x, norm, matrix = randn(16, 40), unit(40), prepare(randn(200, 40, seed=1))
    matrix = TRITON.quantise(matrix) if eight_bits else matrix
    rows = (0, 6, 8, 15)
    alone = {i: head(x[i : i + 1], norm, matrix, tile=TILE, top_k=3) for i in rows}
    for start, count in ((0, 7), (6, 4), (8, 8), (0, 9), (0, 16)):
        together = head(x[start : start + count], norm, matrix, tile=TILE, top_k=3)
        for i in set(rows) & set(range(start, start + count)):
            for part, expected in zip(together, alone[i], strict=True):
                assert torch.equal(part[i - start], expected[0])


@pytest.mark.parametrize("eight_bits", [False, True])
def test_inactive_rows_read_no_weight_and_change_no_other(eight_bits: bool) -> None:
    x, norm, matrix = randn(16, 40), unit(40), prepare(randn(200, 40, seed=1))
    matrix = TRITON.quantise(matrix) if eight_bits else matrix
    active = torch.tensor([True, False, False, True, *[False] * 12], device=DEVICE)
    every, some = head(x, norm, matrix, tile=TILE), head(x, norm, matrix, tile=TILE, active=active)
    for part, expected in zip(some, every, strict=True):
        assert torch.equal(part[active], expected[active])
    gone = replace(matrix, data=matrix.data[:0], scale=None if matrix.scale is None else matrix.scale[:0])
    head(x, norm, gone, tile=TILE, active=torch.zeros_like(active))


@pytest.mark.parametrize("kept", [1, 8, 32])
@pytest.mark.parametrize("blocks", [1, 1536, 4008, 4748])
@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_merge_rules_hold_every_candidate_of_a_lane(arch: int, blocks: int, kept: int) -> None:
    rule = launch.merge_rule(blocks, kept, arch)
    assert rule.lanes & (rule.lanes - 1) == rule.share & (rule.share - 1) == 0
    assert rule.share >= -(-blocks // rule.lanes) * kept
