"""Verification of drafts: greedy walks and cache moves against Python, rejection sampling against its distribution."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor

from skipjack.kernels.reference import verify as reference_verify
from skipjack.kernels.reference.verify import compact, verify
from skipjack.kernels.values import Verdict

VOCABULARY = 16
DRAWS = 200_000
REDUCED = torch.tensor([0, 2, 3, 5, 6, 9, 11])
BUSH = [0, 0, 0, 1, 1]
GENERATOR = torch.Generator().manual_seed(8)
TARGET = torch.randn(VOCABULARY, VOCABULARY, generator=GENERATOR) * 1.5
DRAFTER = TARGET + torch.randn(VOCABULARY, VOCABULARY, generator=GENERATOR)


Op = Callable[..., Verdict]


class Setting(NamedTuple):
    parent: list[int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    draft: str = "whole"


SETTINGS = [
    Setting([0]),
    Setting([0, 1, 2], temperature=0.7),
    Setting([0, 1, 2, 3, 4], top_k=5),
    Setting([0, 1], top_p=0.8),
    Setting([0, 1, 2, 3], temperature=1.5, min_p=0.1),
    Setting(BUSH),
    Setting(BUSH, temperature=0.8, top_k=7, top_p=0.9, min_p=0.02),
    Setting([0, 1], draft="reduced"),
    Setting(BUSH, top_p=0.9, draft="reduced"),
    Setting([0, 1, 2], top_k=6, draft="certain"),
    Setting(BUSH, draft="certain"),
]
# Bonferroni over the settings.
P_VALUE = 0.001 / len(SETTINGS)


def warped(logits: Tensor, setting: Setting) -> Tensor:
    """The distribution after temperature, min-p, top-k and top-p, id by id in float64."""
    p = (logits.double() / setting.temperature).softmax(0)
    kept = [i for i in p.argsort(descending=True).tolist() if p[i] >= setting.min_p * p.max()]
    kept = kept[: setting.top_k or None]
    total, nucleus = sum(float(p[i]) for i in kept), []
    for i in kept:
        if sum(float(p[j]) for j in nucleus) < setting.top_p * total:
            nucleus.append(i)
    result = torch.zeros_like(p)
    result[nucleus] = p[nucleus] / p[nucleus].sum()
    return result


def drafted(q: Tensor, parent: list[int], newest: int) -> Tensor:
    """Tokens of rows 0 to k, int64 [DRAWS, k + 1]: siblings drawn from q[token of their row] without replacement."""
    tokens = torch.full((DRAWS, len(parent) + 1), newest)
    generator = torch.Generator().manual_seed(3)
    for row in range(len(parent)):
        children = [j + 1 for j, follows in enumerate(parent) if follows == row]
        if children:
            race = q[tokens[:, row]] / torch.empty(DRAWS, VOCABULARY).exponential_(generator=generator)
            tokens[:, children] = race.topk(len(children)).indices
    return tokens


@pytest.fixture(params=["torch", "compiled"])
def verify_rejection(request: pytest.FixtureRequest) -> Op:
    if request.param == "torch":
        return reference_verify.verify_rejection
    pytest.importorskip("numba", reason="numba is not installed")
    from skipjack.kernels.cpu.rejection import verify_rejection

    return verify_rejection


def rejection(op: Op, setting: Setting, tree: bool) -> tuple[Verdict, Tensor]:
    """One round of every sequence from token 0, id 0 included in what is drafted, and the tokens of its rows."""
    table = DRAFTER if setting.draft != "reduced" else torch.full_like(DRAFTER, -torch.inf)
    if setting.draft == "reduced":
        table[:, REDUCED] = DRAFTER[:, REDUCED]
    q = torch.stack([warped(row, setting) for row in table]).float()
    tokens = drafted(q, setting.parent, 0)
    k = len(setting.parent)

    def of(value: float) -> Tensor:
        return torch.full((DRAWS,), value)

    verdict = op(
        TARGET[tokens],
        tokens[:, 1:],
        None if setting.draft == "certain" else table[tokens[:, :k]],
        of(k),
        of(100),
        of(setting.temperature),
        of(setting.top_k),
        of(setting.top_p),
        of(setting.min_p),
        torch.arange(DRAWS) - DRAWS // 2,
        parent=torch.tensor(setting.parent).expand(DRAWS, k) if tree else None,
    )
    return verdict, tokens


def transitions(verdict: Verdict, tokens: Tensor) -> Tensor:
    """How often token b came after token a, [V, V]."""
    on_path = tokens.gather(1, verdict.path)
    counts = torch.zeros(VOCABULARY * VOCABULARY, dtype=torch.int64)
    for depth in range(tokens.shape[1]):
        there = verdict.accepted >= depth
        following = on_path[:, min(depth + 1, tokens.shape[1] - 1)]
        following = torch.where(verdict.accepted > depth, following, verdict.token)
        counts += torch.bincount((on_path[:, depth] * VOCABULARY + following)[there], minlength=len(counts))
    return counts.view(VOCABULARY, VOCABULARY)


def p_value(counts: Tensor, expected: Tensor) -> float:
    """G-test of every row of transitions, rare ones pooled; one that cannot happen and does is a failure."""
    if counts[expected == 0].sum() > 0:
        return 0.0
    statistic, freedom = 0.0, 0
    for observed, p in zip(counts.double(), expected, strict=True):
        mean = p * observed.sum()
        rare = mean < 10
        parts = torch.cat([mean[~rare], mean[rare].sum()[None]])
        seen = torch.cat([observed[~rare], observed[rare].sum()[None]])
        if parts[-1] < 10:
            parts, seen = parts[:-1], seen[:-1]
        if len(parts) > 1:
            scaled = parts * seen.sum() / parts.sum()
            statistic += float(stats.power_divergence(seen, scaled, lambda_="log-likelihood").statistic)
            freedom += len(parts) - 1
    assert freedom > 0
    return float(stats.chi2.sf(statistic, freedom))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rejection_sampling_keeps_the_targets_distribution(verify_rejection: Op, setting: Setting) -> None:
    chain = setting.parent == list(range(len(setting.parent)))
    verdict, tokens = rejection(verify_rejection, setting, tree=not chain)
    counts = transitions(verdict, tokens)
    assert torch.equal(counts.sum(), verdict.accepted.sum() + DRAWS)
    assert float(verdict.accepted.double().mean()) > 0.1
    expected = torch.stack([warped(row, setting) for row in TARGET])
    assert p_value(counts, expected) > P_VALUE

    biased = expected.clone()
    high, low = expected[0].argsort(descending=True)[:2]
    biased[0, high] += 0.01
    biased[0, low] -= 0.01
    assert p_value(counts, biased) < P_VALUE


def test_a_chain_is_the_tree_of_one_branch(verify_rejection: Op) -> None:
    chain, tree = (rejection(verify_rejection, SETTINGS[3], tree=tree)[0] for tree in (False, True))
    assert all(map(torch.equal, chain, tree))


def test_rejection_at_temperature_zero_is_greedy(verify_rejection: Op) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (40, 6, 16), generator=generator).float()
    target = scores.argmax(-1)
    draft, count, length = target[:, [0, 1, 2, 3, 4]].clone(), torch.arange(40) % 6, torch.arange(40)
    draft[::3, 2] = (draft[::3, 2] + 1) % 16
    zero = torch.zeros(40)
    rule = (zero, zero.long(), zero + 1, zero, torch.arange(40))
    expected = verify(target, draft, count, length)
    for draft_scores in (None, scores[:, :5], scores[:, :5].flip(-1)):
        got = verify_rejection(scores, draft, draft_scores, count, length, *rule)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_siblings_their_drafter_hardly_gives_keep_the_targets_distribution(verify_rejection: Op) -> None:
    """Cold trees: once the first sibling is rejected, what is left of the drafter's probability rounds to nothing."""
    size, draws, temperature = 64, 20_000, 0.05
    p, q = torch.full((size,), -5.0), torch.full((size,), -1.0)
    p[:3], q[:3] = torch.tensor([5.0, 4.92, 4.99]), torch.tensor([10.0, 5.0, 4.4])
    draft = torch.tensor([0, 1]).expand(draws, 2)
    one = torch.ones(draws)
    verdict = verify_rejection(
        p.expand(draws, 3, size), draft, q.expand(draws, 1, size), one.long() * 2, one.long(), one * temperature,
        one.long() * 0, one, one * 0, torch.arange(draws) * 7919,
        parent=torch.zeros(draws, 2, dtype=torch.int64), drawn=torch.tensor([0, 1, 1]).expand(draws, 3),
    )  # fmt: skip
    chosen = draft.gather(1, (verdict.path[:, 1:2] - 1).clamp(min=0))[:, 0]
    counts = torch.bincount(torch.where(verdict.accepted > 0, chosen, verdict.token), minlength=size)
    expected = (p.double() / temperature).softmax(0)
    assert counts[3:].sum() == 0
    assert stats.chisquare(counts[:3], expected[:3] / expected[:3].sum() * draws).pvalue > 0.001


def test_the_token_after_a_whole_accepted_draft_is_warped_too(verify_rejection: Op) -> None:
    scores = torch.full((4000, 2, 16), -10.0)
    scores[:, 0, 0] = 50.0
    scores[:, 1, :8] = torch.tensor([1.0, 1.0, 0.5, -5.0, -6.0, -7.0, -8.0, -9.0])
    one = torch.ones(4000)
    verdict = verify_rejection(
        scores, one.long()[:, None] * 0, None, one.long(), one.long(), one, one.long() * 0, one * 0.9, one * 0,
        torch.arange(4000),
    )  # fmt: skip
    assert verdict.accepted.eq(1).all()
    counts = torch.bincount(verdict.token, minlength=16)
    p = scores[0, 1, :3].double().softmax(0)
    assert counts[3:].sum() == 0
    assert stats.chisquare(counts[:3], p * 4000).pvalue > 0.001


def test_verify_accepts_the_longest_common_prefix() -> None:
    target = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 9, 7, 8], [0, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 3]])
    draft = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [0, 0, 0], [4, 6, 7], [0, 0, 0]])
    count, length = torch.tensor([3, 2, 3, 0, 3, 2]), torch.tensor([10, 0, 7, 1, 2, 4])
    verdict = verify(target, draft, count, length)
    assert verdict.accepted.tolist() == [3, 2, 1, 0, 0, 2]
    assert verdict.token.tolist() == [8, 7, 9, 0, 5, 0]
    assert verdict.length.tolist() == [14, 3, 9, 2, 3, 7]
    assert verdict.path.tolist() == [[0, 1, 2, 3], [0, 1, 2, 2], [0, 1, 1, 1], [0] * 4, [0] * 4, [0, 1, 2, 2]]
    empty = verify(target[:, :1], draft[:, :0], count * 0, length)
    assert empty.accepted.tolist() == [0] * 6
    assert empty.token.tolist() == target[:, 0].tolist()
    assert empty.path.tolist() == [[0]] * 6


def test_verify_walks_trees() -> None:
    generator = torch.Generator().manual_seed(0)
    for k in (1, 4, 12):
        draft = torch.randint(0, 3, (50, k), generator=generator)
        parent = (torch.rand(50, k, generator=generator) * torch.arange(1, k + 1)).long()
        # A later sibling of the same token is never reached: give it a token nobody chooses.
        for s in range(50):
            seen = set()
            for j in range(k):
                node = (int(parent[s, j]), int(draft[s, j]))
                draft[s, j] = -1 if node in seen else draft[s, j]
                seen.add(node)
        target = torch.randint(0, 3, (50, k + 1), generator=generator)
        count = torch.randint(0, k + 1, (50,), generator=generator)
        verdict = verify(target, draft, count, torch.arange(50), parent)
        for s in range(50):
            path = [0]
            while True:
                children = [j + 1 for j in range(int(count[s])) if int(parent[s, j]) == path[-1]]
                chosen = [row for row in children if draft[s, row - 1] == target[s, path[-1]]]
                if not chosen:
                    break
                path += chosen
            assert int(verdict.accepted[s]) == len(path) - 1
            assert int(verdict.token[s]) == int(target[s, path[-1]])
            assert int(verdict.length[s]) == s + len(path)
            assert verdict.path[s].tolist() == path + [path[-1]] * (k + 1 - len(path))


def test_compact_moves_accepted_rows_and_nothing_else() -> None:
    keys = torch.randn(3, 9, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    values, before = keys + 1, keys.clone()
    table = torch.tensor([[8, 1, 3], [2, 7, 5]], dtype=torch.int32)
    path, accepted, length = torch.tensor([[0, 2, 3, 6], [0, 1, 5, 5]]), torch.tensor([3, 2]), torch.tensor([2, 5])
    compact(keys, values, table, path, accepted, length)
    expected = before.clone()
    for s in range(2):
        for d in range(1, int(accepted[s]) + 1):
            source, target = int(length[s] + path[s, d]), int(length[s]) + d
            expected[:, table[s, target // 4], :, target % 4] = before[:, table[s, source // 4], :, source % 4]
    assert torch.equal(keys, expected)
    assert torch.equal(values, expected + 1)
