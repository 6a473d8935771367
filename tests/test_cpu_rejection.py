"""Rejection as it is compiled for a CPU against the reference; its distribution is tested in `test_verify`."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="numba is not installed")

from skipjack.kernels.cpu import rejection as cpu_rejection
from skipjack.kernels.cpu.rejection import verify_rejection
from skipjack.kernels.reference import verify as reference_verify
from skipjack.kernels.values import Verdict

CHAIN, BUSH = [0, 1, 2, 3, 4], [0, 0, 0, 1, 1, 4]
RULES = [(1.0, 0, 1.0, 0.0), (0.0, 0, 0.5, 0.0), (0.8, 6, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.4, 0, 1.0, 0.05)]
RULES += [(1.1, 30, 0.8, 0.01), (1.0, 10**9, 1.0, 0.0)]


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable[[ModuleType], None]) -> None:
    poison(cpu_rejection)


def case(
    parent: list[int], width: int, dtype: torch.dtype, drafter: str, seed: int
) -> tuple[list[Any], dict[str, Any]]:
    """One round of a sequence for every rule, and one more whose draft has tokens that its drafter cannot give."""
    generator, sequences, k = torch.Generator().manual_seed(seed), len(RULES) + 1, len(parent)
    scores = torch.randn(sequences, k + 1, width, generator=generator) * 3
    scores[:, :, 3::7] = -torch.inf
    proposals = scores[:, :k] + torch.randn(sequences, k, width, generator=generator) * 0.7
    ids = torch.randperm(width, generator=generator)[: width // 2 + 3].sort().values if drafter == "reduced" else None
    if ids is not None:
        proposals = torch.full_like(proposals, -torch.inf).index_copy_(2, ids, proposals[:, :, ids])
    proposals = proposals.to(dtype)
    draft = torch.zeros(sequences, k, dtype=torch.int64)
    for row in range(k):
        children = [j for j in range(k) if parent[j] == row]
        race = proposals[:, row].float() - torch.rand(proposals.shape[::2], generator=generator).log().neg().log()
        if children:
            draft[:, children] = race.topk(len(children)).indices
    draft[-1] = torch.arange(k) * 7 + 3
    count = torch.full((sequences,), k)
    count[0] = 1
    rules = [torch.tensor(column) for column in zip(*RULES, RULES[0], strict=True)]
    seeds = torch.randint(-(2**63), 2**63 - 1, (sequences,), generator=generator)
    given = [scores.to(dtype), draft, None if drafter == "certain" else proposals, count, torch.arange(sequences) * 31]
    tree = None if parent == CHAIN else torch.tensor(parent).expand(sequences, k)
    return [*given, *rules, seeds], {"parent": tree}


def same(got: Verdict, expected: Verdict) -> None:
    assert all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("drafter", ["whole", "reduced", "certain"])
@pytest.mark.parametrize("parent", [CHAIN, BUSH], ids=["chain", "tree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [48, 4096])
def test_verdicts_are_those_of_the_reference(width: int, dtype: torch.dtype, parent: list[int], drafter: str) -> None:
    lengths: set[int] = set()
    for seed in range(12):
        given, options = case(parent, width, dtype, drafter, seed)
        got = verify_rejection(*given, **options)
        same(got, reference_verify.verify_rejection(*given, **options))
        lengths |= set(got.accepted.tolist())
    assert len(lengths) > (1 if drafter == "certain" else 2)


@pytest.mark.parametrize("parent", [CHAIN, BUSH], ids=["chain", "tree"])
def test_a_sequence_has_the_verdict_it_has_alone_on_any_thread(parent: list[int]) -> None:
    given, options = case(parent, 4096, torch.float32, "whole", 1)
    together, threads = verify_rejection(*given, **options), torch.get_num_threads()
    tree = options["parent"]
    for s in range(len(given[0])):
        own = [part[s : s + 1] for part in given]
        same(
            verify_rejection(*own, parent=None if tree is None else tree[s : s + 1]),
            Verdict(*(part[s : s + 1] for part in together)),
        )
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            same(verify_rejection(*given, **options), together)
    finally:
        torch.set_num_threads(threads)


def test_scores_may_be_given_once_for_every_depth() -> None:
    given, _ = case(BUSH, 48, torch.float32, "whole", 2)
    depth = [0, 1, 1, 1, 2, 2, 3]
    parent, drawn = (torch.tensor(part).expand(len(given[0]), -1) for part in (BUSH, depth))
    proposals = given[2][:, :3]
    got = verify_rejection(*given[:2], proposals, *given[3:], parent=parent, drawn=drawn)
    same(got, verify_rejection(*given[:2], given[2][:, [0, 1, 1, 1, 2, 2]], *given[3:], parent=parent))
    same(got, reference_verify.verify_rejection(*given[:2], proposals, *given[3:], parent=parent, drawn=drawn))


@pytest.mark.parametrize(("width", "dtype"), [(47, torch.float32), (48, torch.float64)])
def test_what_has_no_kernel_is_the_references(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given, options = case(CHAIN, width, dtype, "whole", 0)
    monkeypatch.setattr(cpu_rejection, "judge", None)
    same(verify_rejection(*given, **options), reference_verify.verify_rejection(*given, **options))


def test_an_empty_draft_is_a_draw() -> None:
    given, _ = case(CHAIN, 48, torch.float32, "whole", 4)
    given = [given[0][:, :1], given[1][:, :0], None, given[3] * 0, *given[4:]]
    got: Tensor = verify_rejection(*given).token
    assert torch.equal(got, reference_verify.verify_rejection(*given).token)
