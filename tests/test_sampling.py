"""Sampled tokens against the exact distribution, and against transformers' logits processors."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.kernels.noise import gumbel
from skipjack.kernels.reference.logits import reshape_logits
from skipjack.kernels.reference.verify import Rule, sample, warp
from skipjack.runtime.batch import Batch
from skipjack.runtime.reshaping import reshaping
from skipjack.runtime.sampling import choose
from skipjack.runtime.sequence import Sequence

transformers = pytest.importorskip("transformers")

VOCABULARY = 12
DRAWS = 200_000
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4)) * 1.5
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.02},
]
# Bonferroni over the settings.
P_VALUE = 0.001 / len(SETTINGS)


def exact(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The warped distribution by transformers' processors, in the order the engine documents."""
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if min_p:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    scores = LOGITS[None].clone()
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].double().softmax(-1)


def draw(rows: int, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Counts over the vocabulary of one draw each at positions 0 to rows - 1."""
    rule = Rule(torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    warped = warp(LOGITS[None], rule)
    noise = gumbel(torch.full((rows,), 17), torch.arange(rows), VOCABULARY)
    return torch.bincount((warped + noise).argmax(-1), minlength=VOCABULARY)


def p_value(counts: Tensor, expected: Tensor) -> float:
    """G-test over the ids that can occur; an id that cannot and does is a failure."""
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return 0.0
    scaled = (expected[possible] / expected[possible].sum() * counts.sum()).numpy()
    return float(stats.power_divergence(counts[possible].numpy(), scaled, lambda_="log-likelihood").pvalue)


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_draws_follow_the_warped_distribution(fields: dict[str, float]) -> None:
    assert p_value(draw(DRAWS, **fields), exact(**fields)) > P_VALUE


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_a_planted_bias_of_one_percent_is_caught(fields: dict[str, float]) -> None:
    expected = exact(**fields)
    high, low = expected.argsort(descending=True)[:2]
    biased = expected.clone()
    biased[high] += 0.01
    biased[low] -= 0.01
    assert p_value(draw(DRAWS, **fields), biased) < P_VALUE


def test_sample_op_draws_each_row_by_its_own_rule() -> None:
    rows = len(SETTINGS) + 1
    fields = [{"temperature": 0.0}, *SETTINGS]
    position = torch.arange(100, 100 + rows)
    token = sample(
        LOGITS.repeat(rows, 1),
        torch.tensor([f["temperature"] for f in fields]),
        torch.tensor([f.get("top_k", 0) for f in fields]),
        torch.tensor([f.get("top_p", 1.0) for f in fields]),
        torch.tensor([f.get("min_p", 0.0) for f in fields]),
        torch.full((rows,), 5),
        position,
    )
    assert token[0] == LOGITS.argmax()
    noise = gumbel(torch.full((rows,), 5), position, VOCABULARY)
    for row, setting in enumerate(SETTINGS, start=1):
        expected = (exact(**setting).log() + noise[row]).argmax()
        assert token[row] == expected


def spread(rows: int, fields: dict[str, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One setting for all rows, as `sample` takes it."""
    return (
        torch.full((rows,), fields["temperature"]),
        torch.full((rows,), int(fields.get("top_k", 0))),
        torch.full((rows,), fields.get("top_p", 1.0)),
        torch.full((rows,), fields.get("min_p", 0.0)),
    )


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, *SETTINGS], ids=str)
def test_siblings_are_the_highest_sums_in_order(fields: dict[str, float]) -> None:
    rows, count = 50, 6
    seed, position = torch.full((rows,), 23), torch.arange(rows)
    token = sample(LOGITS.repeat(rows, 1), *spread(rows, fields), seed, position, stream=3, count=count).numpy()
    sums = LOGITS.numpy()[None].repeat(rows, 0)
    if fields["temperature"] > 0:
        sums = np.log(exact(**fields).numpy().clip(1e-300)) + gumbel(seed, position, VOCABULARY, 3).double().numpy()
        sums[:, exact(**fields).numpy() == 0] = -np.inf
    for row in range(rows):
        order = np.argsort(-sums[row], kind="stable")[:count]
        possible = np.isfinite(sums[row, order])
        assert token[row].tolist() == np.where(possible, order, order[0]).tolist()


def test_streams_draw_apart_and_the_first_sibling_is_the_token() -> None:
    rows = 200
    inputs = (LOGITS.repeat(rows, 1), *spread(rows, SETTINGS[0]), torch.full((rows,), 8), torch.arange(rows))
    drawn = [sample(*inputs, stream=stream) for stream in (0, 1, 2)]
    assert torch.equal(drawn[0], sample(*inputs))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    for stream in (0, 1, 2):
        assert torch.equal(sample(*inputs, stream=stream, count=5)[:, 0], drawn[stream])


def test_siblings_are_drawn_without_replacement() -> None:
    """Ordered triples of 4 ids against p(a)·p(b)/(1 − p(a))·p(c)/(1 − p(a) − p(b))."""
    rows, size = 50_000, 4
    logits = LOGITS[:size]
    seed, position = torch.full((rows,), 31), torch.arange(rows)
    rule = spread(rows, {"temperature": 1.3})
    token = sample(logits.repeat(rows, 1), *rule, seed, position, stream=2, count=3).numpy()
    p = (logits.double() / 1.3).softmax(-1).numpy()
    triples = list(permutations(range(size), 3))
    expected = np.array([p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in triples]) * rows
    observed = np.array([(token == triple).all(axis=1).sum() for triple in triples])
    assert observed.sum() == rows
    assert expected.min() > 5
    assert stats.chisquare(observed, expected).pvalue > 0.001


def test_speculative_sampling_follows_the_models_distribution(synthetic: Callable[..., Engine]) -> None:
    """The second and third token of 2 000 seeds, drafted and verified, against the exact conditional mixture."""
    engine = synthetic("tiny", torch.float32, 0.3, vocab=6)
    prompt, seeds = [1, 2, 3, 4], 2000
    model, cache = engine._loaded()
    method = "swift:skip_mlp=2+5,skip_attention=4,num_draft_tokens=3,threshold=0.0"
    params = SamplingParams(max_tokens=3, temperature=1.0, seed=0, n=250, ignore_eos=True)
    ids: list[list[int]] = []
    accepted = 0
    for start in range(0, seeds, 250):
        output = engine.generate(prompt, SamplingParams(**{**vars(params), "seed": start}), method=method)
        ids += [choice.token_ids for choice in output.choices]
        accepted += output.stats.accepted
    assert accepted > seeds / 4

    def next_distribution(tokens: list[int]) -> np.ndarray:
        from skipjack.runtime.rows import one_sequence

        pages = cache.reserve(len(tokens))
        with torch.inference_mode():
            x = model.forward(one_sequence(tokens, 0, pages, 64, model.device), cache, model.full)
            row = model.logits(x[-1:])[0].double().softmax(-1).numpy()
        cache.release(pages)
        return row

    joint = np.zeros((6, 6, 6))
    first = next_distribution(prompt)
    for a in range(6):
        second = next_distribution([*prompt, a])
        for b in range(6):
            joint[a, b] = first[a] * second[b] * next_distribution([*prompt, a, b])
    counts = np.zeros_like(joint)
    for a, b, c in ids:
        counts[a, b, c] += 1
    common = joint.ravel() * seeds > 5
    observed = np.append(counts.ravel()[common], counts.ravel()[~common].sum())
    expected = np.append(joint.ravel()[common], joint.ravel()[~common].sum()) * seeds
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.001


def sequence(**fields: object) -> Sequence:
    params = SamplingParams(max_tokens=50, **fields)
    return Sequence(0, 0, [1, 2, 2, 5], params, 0, frozenset([3]), 100, None)


def reshaped(made: Sequence, history: list[int], drafted: int = 0) -> Tensor:
    """LOGITS after penalties and bias, the last `drafted` tokens of the history being a draft."""
    made.tokens = history[: len(history) - drafted]
    draft = torch.tensor([[[*history[len(made.tokens) :], -1]]])
    how = reshaping([made], VOCABULARY, torch.device("cpu"))
    return reshape_logits(LOGITS[None], how, torch.tensor([made.cached]), draft)[0]


@pytest.mark.parametrize("drafted", [0, 1, 3])
def test_repetition_penalty_is_transformers(drafted: int) -> None:
    history = [1, 2, 2, 5, 7, 7, 9]
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([history]), LOGITS[None].clone())[0]
    got = reshaped(sequence(repetition_penalty=1.4), history, drafted)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("drafted", [0, 1, 3])
def test_presence_and_frequency_count_the_output_only(drafted: int) -> None:
    got = reshaped(sequence(presence_penalty=0.5, frequency_penalty=0.25), [1, 2, 2, 5, 7, 7, 9], drafted)
    expected = LOGITS.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("drafted", [0, 1])
def test_bias_and_minimum_length(drafted: int) -> None:
    short = sequence(logit_bias={4: 2.0}, min_tokens=2, stop_token_ids=[6])
    got = reshaped(short, [1, 2, 2, 5, 7], drafted)
    assert got[4] == LOGITS[4] + 2.0
    assert got[[3, 6]].isneginf().all()
    assert torch.equal(reshaped(sequence(min_tokens=2), [1, 2, 2, 5, 7, 8], drafted), LOGITS)


@pytest.mark.parametrize(("drafted", "processor"), [(d, p) for d in (0, 2) for p in ("bias", "least")])
def test_bias_and_minimum_length_are_those_of_transformers(drafted: int, processor: str) -> None:
    history = [1, 2, 2, 5, 7, 7]
    for least in range(5) if processor == "least" else (0,):
        made = sequence(min_tokens=least) if least else sequence(logit_bias={4: 2.0, 7: -3.5})
        if processor == "bias":
            theirs = transformers.SequenceBiasLogitsProcessor({(4,): 2.0, (7,): -3.5})
        else:
            theirs = transformers.MinNewTokensLengthLogitsProcessor(4, least, [3], device="cpu")
            made = sequence(min_tokens=least)
        expected = theirs(torch.tensor([history]), LOGITS[None].clone())[0]
        assert torch.equal(reshaped(made, history, drafted), expected)


def test_whole_numbers_reach_the_ops_as_floats() -> None:
    params = SamplingParams(temperature=1, top_p=1, min_p=0)
    sequence = Sequence(0, 0, [3, 4], params, 0, frozenset(), 64, None, pages=[1])
    rule = Batch.of([sequence], 8, torch.device("cpu")).sampling()
    assert {rule.temperature.dtype, rule.top_p.dtype, rule.min_p.dtype} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_chooses_the_token_and_leaves_the_models_own_probability(synthetic, dtype: torch.dtype) -> None:
    model, _ = synthetic("tiny", dtype)._loaded()
    params = SamplingParams(logit_bias={5: 100.0}, logprobs=1)
    batch = Batch.of([Sequence(0, 0, [3, 4], params, 0, frozenset(), 64, None, pages=[1])], 8, torch.device("cpu"))
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen = choose(model, hidden, batch, batch.last[:, None], confidence=True)
    logits = model.logits(hidden).double()
    assert chosen.token.item() == 5
    assert chosen.probability.item() == pytest.approx(logits.softmax(-1)[0, 5].item(), rel=1e-4)
    assert torch.equal(chosen.logits[0].double(), logits)
