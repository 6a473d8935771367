"""Entering a pass, extending a draft and committing a round: the kernels and the PyTorch ops against plain loops."""

from collections.abc import Callable
from itertools import product
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime import interpreter

from skipjack import Engine, SamplingParams
from skipjack.kernels import attention, rounds
from skipjack.kernels import enter as enter_module
from skipjack.kernels.reference import rounds as reference_rounds
from skipjack.kernels.rounds import commit, extend
from skipjack.kernels.values import Entry, Progress, Rope
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import round_graph

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 4


@pytest.fixture(autouse=True)
def poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(enter_module)
    poison(rounds)


@pytest.mark.parametrize(("dtype", "hidden", "dim"), [(torch.float32, 40, 12), (torch.bfloat16, 1100, None)])
@pytest.mark.parametrize(("sequences", "width", "rows"), [(1, 1, 1), (3, 4, 16), (5, 1, 8), (2, 5, 10)])
@pytest.mark.parametrize("ahead", [0, 3])
def test_rows_are_those_of_a_loop_over_tokens(
    enter: Callable[..., Entry],
    dtype: torch.dtype,
    hidden: int,
    dim: int | None,
    sequences: int,
    width: int,
    rows: int,
    ahead: int,
) -> None:
    generator = torch.Generator().manual_seed(sequences * width)
    token = torch.randint(1, 30, (sequences, 2 * width), generator=generator)[:, ::2]
    first, count = torch.arange(sequences) * 5 % 7, torch.randint(0, width + 1, (sequences,), generator=generator)
    count[0] = width
    alive = torch.arange(sequences) != 1
    table = torch.randperm(40, generator=generator)[: sequences * 5].view(sequences, 5)
    embedding = torch.randn(30, hidden, generator=generator).to(dtype)
    rope = None if dim is None else Rope(*torch.randn(2, 20, 1, dim, generator=generator))
    for counts, living, drafted in product((count, None), (alive, None), (False, True)):
        own = token[:, :1] if drafted else token
        # Of a draft the tokens before it are not counted.
        numbers = counts if counts is None or not drafted else (counts - 1).clamp(min=0)
        inputs = [own, first, numbers, living, table, embedding]
        inputs = [None if given is None else given.to(DEVICE) for given in inputs]
        turned = None if rope is None else Rope(rope.cos.to(DEVICE), rope.sin.to(DEVICE))
        draft = token[:, 1:].to(DEVICE) if drafted else None
        got = enter(*inputs, turned, rows=rows, ahead=ahead, page_size=PAGE, kv_heads=3, draft=draft)
        assert got.arrivals is None or got.arrivals.tolist() == [0] * 3 * rows
        for row in range(rows):
            s, j = divmod(row, width)
            counted = s < sequences and (counts is None or j < counts[s] or (drafted and j == 0))
            real = counted and (living is None or bool(living[s]))
            position = int(first[s]) + ahead + j if real else 0
            entered = int(token[s, j]) if real else 0
            assert bool(got.real[row]) is bool(real)
            assert [int(part[row]) for part in got[:3]] == [entered, position, s if real else -1]
            page = int(table[s, position // PAGE]) if real else 0
            assert [int(part[row]) for part in got.slots] == [page, position % PAGE]
            assert torch.equal(got.x[row].cpu(), embedding[entered])
            if rope is not None:
                assert torch.equal(got.rope.cos[row].cpu(), rope.cos[position])
                assert torch.equal(got.rope.sin[row].cpu(), rope.sin[position])


@pytest.mark.parametrize("op", [extend, reference_rounds.extend], ids=["triton", "torch"])
@pytest.mark.parametrize("sequences", [1, 6, 40])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_draft_goes_on_while_it_has_room_and_is_likely(op: object, sequences: int, threshold: float | None) -> None:
    generator = torch.Generator().manual_seed(sequences)
    count, room = (torch.randint(0, 4, (sequences,), generator=generator) for _ in range(2))
    going = torch.rand(sequences, generator=generator) < 0.7
    token = torch.randint(1, 99, (sequences,), generator=generator)
    probability = torch.rand(sequences, generator=generator)
    total = torch.randn(sequences, generator=generator)
    least = None if threshold is None else torch.tensor(threshold, device=DEVICE)
    value = (probability.log() + total).to(DEVICE)
    for so_far in (count, None):
        given = (None if own is None else own.to(DEVICE) for own in (so_far, going, room, token))
        out = torch.full((sequences, 3), -7, device=DEVICE)
        got = op(*given, value, total.to(DEVICE), least, out[:, 1])
        for s in range(sequences):
            longer = int(going[s]) + (0 if so_far is None else int(count[s]))
            likely = threshold is None or float(probability[s]) >= threshold
            assert int(got.count[s]) == longer
            assert bool(got.going[s]) is (bool(going[s]) and longer < int(room[s]) and likely)
            assert out[s].tolist() == [-7, int(token[s]) if going[s] else 0, -7]


@pytest.mark.parametrize("op", [commit, reference_rounds.commit], ids=["triton", "torch"])
@pytest.mark.parametrize("k", [0, 1, 16, 17])
def test_a_verdict_moves_the_sequences_that_have_tokens_left(op: object, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    accepted, token = torch.tensor([0, k, min(1, k), 0]), torch.tensor([7, 8, 9, 10])
    count, draft = torch.full((4,), k), torch.randint(0, 99, (4, k), generator=generator)
    last, length, left = torch.arange(4) + 20, torch.arange(4) * 100, torch.tensor([1, k + 5, 0, 3])
    report = torch.full((3, 4, k + 4), -7, device=DEVICE)
    progress = Progress.of(*(given.clone().to(DEVICE) for given in (last, length, left)))
    progress.commits.copy_(torch.tensor([2, 3, 4, 5]))
    progress.room.fill_(-9)
    op(*(given.to(DEVICE) for given in (accepted, token, count, draft)), progress, report)
    for s in range(4):
        alive, new = int(left[s]) > 0, int(accepted[s]) + 1
        rest = int(left[s]) - (new if alive else 0)
        assert int(progress.last[s]) == (int(token[s]) if alive else int(last[s]))
        assert int(progress.length[s]) == int(length[s]) + (new if alive else 0)
        told = [int(own[s]) for own in progress[2:]]
        assert told == [rest, rest - 1, rest > 0, rest > 1, 3 + s]
        told = [int(accepted[s]) if alive else -1, k, k, int(token[s]), *draft[s].tolist()]
        slots = [[-7] * (k + 4)] * 3
        slots[(2 + s) % 3] = told
        assert report[:, s].tolist() == slots, "the others are of earlier rounds that the host may be reading"


@pytest.mark.parametrize("op", [commit, reference_rounds.commit], ids=["triton", "torch"])
def test_a_token_without_a_draft_needs_no_verdict(op: object) -> None:
    zeros, left = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([2, 0], device=DEVICE)
    progress, report = Progress.of(zeros.clone(), zeros + 5, left), torch.full((2, 2, 4), -7, device=DEVICE)
    token, ran = torch.tensor([8, 9], device=DEVICE), torch.tensor([12, 13], device=DEVICE)
    op(None, token, None, None, progress, report)
    op(None, token + 1, ran, None, progress, report)
    assert report.tolist() == [[[0, 0, 0, 8], [-1, 0, 0, 9]], [[0, 12, 12, 9], [-1, 13, 13, 10]]]
    assert [own.tolist() for own in progress] == [
        [9, 0], [7, 5], [0, 0], [-1, -1], [False, False], [False, False], [2, 2],
    ]  # fmt: skip


@pytest.mark.parametrize("op", [commit, reference_rounds.commit], ids=["triton", "torch"])
@pytest.mark.parametrize("reported", ["all", "one"])
@pytest.mark.parametrize("k", [0, 1, 16, 17])
def test_the_tokens_of_a_verdict_are_counted(op: object, k: int, reported: str) -> None:
    """Those that were accepted and the one after them, and as often as they occur."""
    generator = torch.Generator().manual_seed(k)
    accepted, token = torch.tensor([0, k, min(2, k), k]), torch.tensor([7, 1, 2**40, 5])
    draft, left = torch.randint(0, 3, (4, k), generator=generator), torch.tensor([1, k + 5, 0, k + 1])
    times = torch.randint(0, 4, (4, 19), generator=generator).to(torch.int32)
    expected = times.clone()
    for s in (0, 1, 3):
        for given in (*draft[s, : accepted[s]].tolist(), int(token[s])):
            expected[s, given] += 1
    zeros = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    progress, report = (
        Progress.of(zeros.clone(), zeros.clone(), left.to(DEVICE)),
        zeros.new_zeros(1, 4, 4 + (k if reported == "all" else min(1, k))),
    )
    times = times.to(DEVICE)
    op(*(given.to(DEVICE) for given in (accepted, token, zeros, draft)), progress, report, times=times)
    assert torch.equal(times.cpu(), expected)


class Launches(TorchDispatchMode):
    """Counts the operators that would be kernels on a GPU, but for those a kernel of ours calls in the interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self._inside = 0, 0
        honest = interpreter.GridExecutor.__call__

        def call(executor: object, *given: object, **named: object) -> object:
            self._inside += 1
            try:
                return honest(executor, *given, **named)
            finally:
                self._inside -= 1

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        # New memory is poisoned in tests by filling it.
        views = operator.is_view or name in ("detach", "alias", "lift_fresh", "fill_") or "empty" in name
        self.count += not self._inside and not views
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter does not launch")
@pytest.mark.parametrize(
    ("drafted", "confident", "options", "choice", "most"),
    [
        (0, False, "", {}, 0),
        (6, False, "", {}, 0),
        (6, True, "", {}, 0),
        (2, True, ",tree=true", {}, 14),
        (0, False, "", {"presence_penalty": 0.5}, 16),
        (2, False, "", {"temperature": 0.8}, 24),
        (2, False, "", {"presence_penalty": 0.5}, 30),
        (2, False, "", {"logprobs": 2}, 33),
    ],
)
def test_a_round_of_the_device_launches_little_besides_our_kernels(
    drafted: int,
    confident: bool,
    options: str,
    choice: dict[str, float],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ModelConfig.parse(
        synthetic_config("tiny-llama") | {"num_hidden_layers": 2, "vocab_size": 64}, "tiny-llama"
    )
    method = f"swift:skip_mlp=1,num_draft_tokens={drafted},search_budget=0,threshold={0.1 if confident else 0}"
    method += options
    counts: list[int] = []
    honest = round_graph.device_round

    def counted(*given: object) -> None:
        with Launches(monkeypatch) as launches:
            honest(*given)
        counts.append(launches.count)

    weights = synthetic_weights(config, 0, torch.float32, 0.3)
    monkeypatch.setattr(round_graph, "device_round", counted)
    with Engine(
        config, weights, method=method if drafted else "autoregressive", backend="triton", graphs=True
    ) as engine:
        engine.generate([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True, **choice))
    assert counts
    assert max(counts) <= most


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter does not launch")
@pytest.mark.parametrize(
    ("method", "shape", "most"),
    [
        ("mindskip", "tiny-mindskip", 4),
        ("dmtd", "tiny-dmtd", 50),
        ("flexidepth", "routed-tiny", 5),
        ("flexidepth:kv=none", "routed-tiny", 38),
    ],
)
def test_the_steps_of_a_policy_begin_with_one_launch(
    method: str, shape: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`enter` makes their rows: nothing looks for row groups, and rows made of several operators are few."""
    config = ModelConfig.parse(synthetic_config(shape) | {"vocab_size": 64}, shape)
    counts: list[int] = []
    honest = round_graph.device_steps

    def counted(*given: object) -> None:
        with monkeypatch.context() as patch, Launches(patch) as launches:
            patch.setattr(attention, "row_groups", lambda *given: pytest.fail("row groups are looked for"))
            honest(*given)
        counts.append(launches.count)

    monkeypatch.setattr(round_graph, "device_steps", counted)
    weights = synthetic_weights(config, 0, torch.float32, 0.3)
    with Engine(config, weights, method=method, backend="triton", graphs=True) as engine:
        engine.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))
    assert 0 < max(counts) <= most
