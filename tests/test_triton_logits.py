"""Penalties, bias, minimum length and log-probabilities: the kernels and the PyTorch ops against plain loops."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from collections.abc import Callable

from skipjack.kernels import logits as logits_module
from skipjack.kernels.logits import logprobs, reshape_logits
from skipjack.kernels.reference import logits as reference_logits
from skipjack.kernels.values import Reshaping

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of no multiple of anything, and of two blocks.
SIZES = [203, 8300]
RESHAPE = pytest.mark.parametrize("op", [reshape_logits, reference_logits.reshape_logits], ids=["triton", "torch"])
LOGPROBS = pytest.mark.parametrize("op", [logprobs, reference_logits.logprobs], ids=["triton", "torch"])


@pytest.fixture(autouse=True)
def poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(logits_module)


class Asked(NamedTuple):
    """What one sequence asks for, its tokens, and the draft tokens of each of its rows."""

    repetition: float
    presence: float
    frequency: float
    bias: dict[int, float]
    forbidden: list[int]
    minimum: int
    prompt: list[int]
    answer: list[int]
    drafts: list[list[int]]


def batch(size: int) -> list[Asked]:
    """One sequence that changes nothing, one for each change, and one with all of them."""
    ids = torch.randint(0, size, (40,), generator=torch.Generator().manual_seed(size)).tolist()
    drafts = [[], [ids[0]], [ids[0], ids[1]], [ids[0], ids[1], ids[0]]]
    nothing = Asked(1.0, 0.0, 0.0, {}, [], 0, ids[:6], ids[5:12], drafts)
    penalties = {"repetition": 1.3, "presence": 0.7, "frequency": 0.45}
    bias, ends = {ids[3]: 1.5, size - 1: -100.0, ids[0]: -0.3}, [0, ids[1], size - 1]
    return [
        nothing,
        *(nothing._replace(**{name: value}) for name, value in penalties.items()),
        nothing._replace(repetition=0.8, presence=-1.1),
        nothing._replace(bias=bias),
        # Crossed by the third row.
        nothing._replace(forbidden=ends, minimum=9),
        nothing._replace(**penalties, bias=bias, forbidden=ends, minimum=40, answer=[*ids[:3], *ids[:3], ids[0]]),
    ]


def tensors(asked: list[Asked], size: int) -> tuple[Reshaping, Tensor, Tensor]:
    bias, times = torch.zeros(len(asked), size), torch.zeros(len(asked), size, dtype=torch.int32)
    forbidden, prompt = (torch.zeros(len(asked), size, dtype=torch.bool) for _ in range(2))
    width = max(len(draft) for own in asked for draft in own.drafts)
    for s, own in enumerate(asked):
        for token, value in own.bias.items():
            bias[s, token] = value
        for token in own.answer:
            times[s, token] += 1
        forbidden[s, own.forbidden], prompt[s, own.prompt] = True, True
    draft = [[[*draft, *[-1] * (width - len(draft))] for draft in own.drafts] for own in asked]
    factors = [torch.tensor([own[i] for own in asked]) for i in range(3)]
    least = torch.tensor([len(own.prompt) + own.minimum for own in asked])
    how = Reshaping(*factors, bias, forbidden, least, prompt, times)
    length = torch.tensor([len(own.prompt) + len(own.answer) - 1 for own in asked])
    return Reshaping(*(part.to(DEVICE) for part in how)), length.to(DEVICE), torch.tensor(draft, device=DEVICE)


def exact(row: Tensor, own: Asked, draft: list[int]) -> Tensor:
    """The row in float64 as vLLM's processors change it, one after the other."""
    row, output = row.double(), [*own.answer, *draft]
    for token, value in own.bias.items():
        row[token] += value
    if len(output) < own.minimum:
        row[own.forbidden] = -torch.inf
    for token in {*own.prompt, *output}:
        row[token] = row[token] / own.repetition if row[token] > 0 else row[token] * own.repetition
    for token in output:
        row[token] -= own.frequency
    for token in set(output):
        row[token] -= own.presence
    return row


@RESHAPE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_penalties_bias_and_minimum_length_are_the_formulas(
    op: Callable[..., Tensor], size: int, dtype: torch.dtype
) -> None:
    asked = batch(size)
    how, length, draft = tensors(asked, size)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(len(asked) * 4, size, generator=generator) * 3).to(DEVICE, dtype)
    before, counted = logits.clone(), how.times.clone()
    got = op(logits, how, length, draft)
    assert got.dtype == torch.float32
    for s, own in enumerate(asked):
        for j, drafted in enumerate(own.drafts):
            expected = exact(logits[4 * s + j].cpu(), own, drafted)
            torch.testing.assert_close(got[4 * s + j].cpu().double(), expected, rtol=3e-7, atol=1e-6)
    assert torch.equal(got[:4], logits[:4].float()), "nothing is asked for"
    assert got.isneginf().sum() == 3 * 2 + 3 * 4, "two rows of one sequence and four of another may not end"
    assert torch.equal(logits, before)
    assert torch.equal(how.times, counted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_rounds_as_pytorch_does(size: int, dtype: torch.dtype) -> None:
    asked = batch(size)
    how, length, draft = tensors(asked, size)
    logits = (torch.randn(len(asked) * 4, size, generator=torch.Generator().manual_seed(2)) * 3).to(DEVICE, dtype)
    assert torch.equal(
        reshape_logits(logits, how, length, draft), reference_logits.reshape_logits(logits, how, length, draft)
    )


@RESHAPE
def test_a_row_is_the_same_alone(op: Callable[..., Tensor]) -> None:
    """Among other sequences and rows, with a draft or with its tokens in the answer."""
    asked = batch(203)
    how, length, draft = tensors(asked, 203)
    logits = torch.randn(len(asked) * 4, 203, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    together = op(logits, how, length, draft)
    for s, own in enumerate(asked):
        for j, drafted in enumerate(own.drafts):
            one, at, none = tensors([own._replace(answer=[*own.answer, *drafted], drafts=[[]])], 203)
            assert torch.equal(op(logits[4 * s + j][None], one, at, none)[0], together[4 * s + j])


@RESHAPE
def test_what_cannot_be_chosen_stays_so(op: Callable[..., Tensor]) -> None:
    """As outside a draft's vocabulary: no penalty or bias makes a number of −∞."""
    asked = batch(203)
    how, length, draft = tensors(asked, 203)
    got = op(torch.full((len(asked) * 4, 203), -torch.inf, device=DEVICE), how, length, draft)
    assert got.isneginf().all()


@LOGPROBS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "top"), [(203, 0), (203, 1), (203, 7), (8300, 32), (16, 16), (5, 3)])
def test_log_probabilities_are_those_of_the_softmax(
    op: Callable[..., tuple[Tensor, Tensor]], size: int, top: int, dtype: torch.dtype
) -> None:
    """Values so coarse that many are equal: those are told lowest id first."""
    generator = torch.Generator().manual_seed(size)
    logits = ((torch.randn(5, size, generator=generator) * 8).round() / 4).to(DEVICE, dtype)
    logits[0] *= 20
    token = torch.randint(0, size, (5,), generator=generator).to(DEVICE)
    active = torch.arange(5, device=DEVICE) != 3
    token[3] = 2**40
    values, ids = op(logits, token, active, top=top)
    assert (values.shape, ids.shape, ids.dtype) == ((5, 1 + top), (5, top), torch.int32)
    for row in (0, 1, 2, 4):
        expected = logits[row].double().log_softmax(-1).cpu()
        ranked = sorted(range(size), key=lambda i, row=row: (-float(logits[row, i]), i))[:top]
        assert ids[row].tolist() == ranked
        wanted = expected[[int(token[row]), *ranked]]
        torch.testing.assert_close(values[row].cpu().double(), wanted, rtol=2e-6, atol=2e-6)
    if op is logprobs:
        assert values[3].isnan().all(), "nothing is written of a row that is not active"


@LOGPROBS
@pytest.mark.parametrize("size", SIZES)
def test_log_probabilities_of_a_row_do_not_depend_on_others(
    op: Callable[..., tuple[Tensor, Tensor]], size: int
) -> None:
    logits = torch.randn(9, size, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    token, active = torch.arange(9, device=DEVICE) * 11, torch.ones(9, dtype=torch.bool, device=DEVICE)
    values, ids = op(logits, token, active, top=8)
    for row in range(9):
        for top in (0, 3, 8):
            alone = slice(row, row + 1)
            one, best = op(logits[alone].clone(), token[alone], active[alone], top=top)
            assert torch.equal(one[0], values[row, : 1 + top])
            assert torch.equal(best[0], ids[row, :top])
