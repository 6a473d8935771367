"""Draft trees and rejection sampling through the engine: the same text, or the same distribution."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from skipjack import Engine, RequestError, SamplingParams
from skipjack.runtime.methods.drafting import WIDEST
from skipjack.runtime.rows import Lineage, one_sequence

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 90)), [400, 3, 3, 17, 250, 8]]
TREE = "swift:skip_attention=1+3+5,skip_mlp=2,tree=true,threshold=0.0"


def test_lineage_is_that_of_a_walk_up_the_parents() -> None:
    random = np.random.default_rng(0)
    parents = np.array([[random.integers(0, j + 1) for j in range(9)] for _ in range(20)])
    lineage = Lineage.of(torch.from_numpy(parents))
    for s, row in product(range(20), range(10)):
        walk = [row]
        while walk[0]:
            walk.insert(0, int(parents[s, walk[0] - 1]))
        assert int(lineage.depth[s, row]) == len(walk) - 1
        path = lineage.path[s, row].numpy()
        assert list(path[: len(walk)]) == walk
        assert (path[len(walk) :] == row).all()


@pytest.mark.parametrize("shape", ["tiny", "tiny-mistral", "tiny-bloom", "tiny-smollm3"])
@pytest.mark.parametrize("nodes", [3, 32])
def test_a_tree_gives_the_tokens_of_plain_decoding(synthetic: Callable[..., Engine], shape: str, nodes: int) -> None:
    engine = synthetic(shape, torch.bfloat16 if nodes == 32 else torch.float32)
    for params in (
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=16, temperature=1.2, seed=4, repetition_penalty=1.3, presence_penalty=0.5),
    ):
        plain = [output.token_ids for output in engine.generate(PROMPTS, params)]
        outputs = engine.generate(PROMPTS, params, method=f"{TREE},max_nodes={nodes},num_draft_tokens=5")
        assert [output.token_ids for output in outputs] == plain
        for output in outputs:
            found = output.stats
            assert 1 + found.accepted + found.bonus == found.completion_tokens
            assert found.drafted <= nodes * found.rounds
            assert all(map(np.greater_equal, found.drafted_per_position, found.accepted_per_position))
            assert len(found.drafted_per_position) <= 5


def test_a_tree_across_pages(synthetic: Callable[..., Engine]) -> None:
    prompt = torch.randint(3, 500, (236,), generator=torch.Generator().manual_seed(1)).tolist()
    engine, params = synthetic("tiny"), SamplingParams(max_tokens=60, ignore_eos=True)
    assert engine.generate(prompt, params, method=TREE).token_ids == engine.generate(prompt, params).token_ids


def test_siblings_save_rounds(synthetic: Callable[..., Engine]) -> None:
    """Where the draft's first choice is often wrong, its next ones are often right."""
    engine, params = synthetic("tiny", torch.float32, 0.3), SamplingParams(max_tokens=200, ignore_eos=True)
    rounds = [
        engine.generate(PROMPTS[0], params, method=method).stats.rounds
        for method in (TREE, TREE.replace("tree=true", "tree=false"))
    ]
    assert rounds[0] < 0.9 * rounds[1]


def test_greedy_rejection_is_greedy(synthetic: Callable[..., Engine]) -> None:
    engine, params = synthetic("tiny"), SamplingParams(max_tokens=40, ignore_eos=True)
    plain = engine.generate(PROMPTS[0], params).token_ids
    for method in (f"{TREE},acceptance=rejection", "lookup:acceptance=rejection", "layerskip:acceptance=rejection"):
        assert engine.generate(PROMPTS[0], params, method=method).token_ids == plain


KANGAROO = "kangaroo:adapter=untrained,exit_layer=5,threshold=0.2"


@pytest.mark.parametrize(
    "method", [TREE, TREE.replace("tree=true", "num_draft_tokens=2"), "layerskip", "lookup", KANGAROO]
)
def test_rejection_draws_from_the_full_model(synthetic: Callable[..., Engine], method: str) -> None:
    """The second and third token after a prompt, all pairs, against their probability by the full model (G-test)."""
    vocab, temperature, top_k, prompt = 8, 1.3, 6, [5, 1, 5, 1, 5]
    engine = synthetic("tiny", torch.float32, 0.6, vocab)
    method += ",acceptance=rejection" if ":" in method else ":acceptance=rejection"
    counts = np.zeros((vocab,) * 2)
    for seed in range(8):
        params = SamplingParams(
            max_tokens=4, temperature=temperature, top_k=top_k, seed=1000 * seed, ignore_eos=True, n=128
        )
        output = engine.generate(prompt, params, method=method)
        for choice in output.choices:
            counts[tuple(choice.token_ids[1:3])] += 1
        if "swift" in method or "kangaroo" in method:
            assert 0 < output.stats.accepted < output.stats.drafted
    expected = exact(engine, prompt, temperature, top_k).sum(axis=0) * counts.sum()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    rest = expected[~common].sum()
    observed = np.append(counts[common], counts[~common].sum() if rest else [])
    ideal = np.append(expected[common], rest if rest else [])
    assert (
        stats.power_divergence(observed, ideal * observed.sum() / ideal.sum(), lambda_="log-likelihood").pvalue > 1e-3
    )


def exact(engine: Engine, prompt: list[int], temperature: float, top_k: int) -> np.ndarray:
    """The probability of every three tokens after `prompt`, from teacher-forced logits: [V, V, V]."""
    model, cache = engine._loaded()
    vocab = engine.config.vocab_size

    def after(tokens: list[int]) -> np.ndarray:
        pages = cache.reserve(len(tokens))
        rows = one_sequence(tokens, 0, pages, model.ops.prefill_tile, model.device)
        logits = model.logits(model.forward(rows, cache, model.full)[-1:])[0].double() / temperature
        cache.release(pages)
        lowest = logits.topk(top_k).values[-1]
        return functional.softmax(logits.masked_fill(logits < lowest, -torch.inf), dim=-1).numpy()

    with torch.inference_mode():
        p = after(prompt)[:, None, None] * np.ones((vocab,) * 3)
        for a in range(vocab):
            p[a] *= after([*prompt, a])[:, None]
            for b in range(vocab):
                p[a, b] *= after([*prompt, a, b])
    return p


@pytest.mark.parametrize("method", ["swift", "layerskip", "lookup", "auto"])
def test_an_unknown_acceptance_is_named(synthetic: Callable[..., Engine], method: str) -> None:
    with pytest.raises(RequestError, match=f"method {method}: option acceptance expects coupled or rejection"):
        synthetic("tiny").generate([5], method=f"{method}:acceptance=always")


def test_repeated_siblings_are_left_out(synthetic: Callable[..., Engine]) -> None:
    """With fewer tokens to choose from than siblings, a depth has as many as there are tokens."""
    params = SamplingParams(max_tokens=20, temperature=1.0, top_k=2, seed=1, ignore_eos=True)
    found = synthetic("tiny").generate([5, 6], params, method=f"{TREE},num_draft_tokens=1").stats
    assert WIDEST > 2
    assert found.drafted <= 2 * found.rounds


def test_siblings_are_no_more_than_the_tokens_of_a_small_vocabulary(synthetic: Callable[..., Engine]) -> None:
    engine, params = synthetic("tiny"), SamplingParams(max_tokens=12, ignore_eos=True)
    output = engine.generate([5, 6], params, method=f"{TREE},draft_vocab=3,num_draft_tokens=1")
    assert output.token_ids == engine.generate([5, 6], params).token_ids
    assert 0 < output.stats.drafted <= 4 * output.stats.rounds
