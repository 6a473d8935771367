"""Activations that leave the range after the prompt: that request ends with an error, those beside it do not notice."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from skipjack import Chunk, Engine, RequestError, SamplingParams, Stream
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
CHOICES = {
    "greedy": GREEDY,
    "drawn": SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8, top_p=0.9, seed=3),
    "reshaped": SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=1.1, logprobs=2),
}
METHODS = [
    "autoregressive",
    "lookup",
    "lookup:acceptance=rejection",
    "lookup:choose=likeliest,tree=true,num_draft_tokens=12",
    "swift:skip_attention=2+3,num_draft_tokens=4,threshold=0",
    "swift:skip_attention=2,tree=true",
    "swift:skip_attention=2,num_draft_tokens=3,acceptance=rejection",
    "layerskip:exit_layer=4",
    "clasp",
    "auto",
    "static:skip=3",
    "unified:speedup=2",
]
PROMPT, OTHER = [5, 6, 7, 5, 6, 7, 5, 6], [11, 12]


@pytest.fixture(scope="module")
def weights() -> Any:
    config = ModelConfig.parse(synthetic_config("tiny") | {"tie_word_embeddings": False}, "test")
    return config, synthetic_weights(config, 0, torch.float32, 0.3)


def poisoned(weights: Any, params: SamplingParams, method: str, *, graphs: bool) -> tuple[Engine, list[int]]:
    """An engine that cannot go on after a token that comes late in the answer to PROMPT, and the answer up to it."""
    config, whole = weights
    with Engine(config, whole, method=method, graphs=graphs) as healthy:
        answer = healthy.generate(PROMPT, params).token_ids
        spared = {*PROMPT, *OTHER, *healthy.generate(OTHER, params).token_ids}
    at = next(i for i, token in enumerate(answer) if i > 2 and token not in {*answer[:i], *spared})
    embedding = whole.embedding.clone()
    embedding[answer[at]] = torch.inf
    return Engine(config, replace(whole, embedding=embedding), method=method, graphs=graphs), answer[: at + 1]


def drained(stream: Stream) -> list[int]:
    """The tokens it gives before it raises."""
    chunks = list[Chunk]()
    with pytest.raises(RequestError, match=r"^request: the model's activations leave the range of float32: expected"):
        chunks.extend(stream)
    assert all(chunk.finish_reason is None for chunk in chunks)
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("method", METHODS)
def test_a_request_that_leaves_the_range_ends_with_an_error(
    weights: Any, method: str, choice: str, graphs: bool
) -> None:
    params = CHOICES[choice]
    engine, answer = poisoned(weights, params, method, graphs=graphs)
    with engine:
        stream = engine.stream(PROMPT, params)
        assert drained(stream) == answer
        (output,) = stream.outputs
        assert (output.token_ids, output.finish_reason) == (answer, "abort")
        stats = output.stats
        assert stats.completion_tokens == 1 + stats.accepted + stats.bonus == len(answer)
        metrics = engine.metrics()
        assert (metrics.requests_failed, metrics.requests_running, metrics.pages_leaked) == (1, 0, 0)
        assert metrics.pages_free == metrics.pages
        with pytest.raises(RequestError, match="leave the range"):
            engine.generate([OTHER, PROMPT], params)


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("leader", ["lost", "other"])
@pytest.mark.parametrize("method", ["autoregressive", "swift:skip_attention=2+3,num_draft_tokens=4,threshold=0"])
def test_a_request_that_shares_its_rounds_is_not_harmed(weights: Any, method: str, leader: str, graphs: bool) -> None:
    """Whoever runs the round in which nothing can be chosen for one of them."""
    engine, answer = poisoned(weights, GREEDY, method, graphs=graphs)
    with engine:
        alone = engine.generate(OTHER, GREEDY).token_ids
        lost, other = engine.stream(PROMPT, GREEDY), engine.stream(OTHER, GREEDY)
        first, second = next(lost), next(other)
        if leader == "lost":
            tokens = [*first.token_ids, *drained(lost)]
            rest = [token for chunk in other for token in chunk.token_ids]
        else:
            rest = [token for chunk in other for token in chunk.token_ids]
            tokens = [*first.token_ids, *drained(lost)]
        assert tokens == answer
        assert [*second.token_ids, *rest] == alone
        assert other.outputs[0].finish_reason == "length"
        metrics = engine.metrics()
        assert (metrics.requests_failed, metrics.requests_finished) == (1, 2)
        assert metrics.pages_free == metrics.pages


@pytest.mark.parametrize("method", ["shortgpt", "shortgpt:rule=official", "adaskip"])
def test_no_layer_is_chosen_by_texts_that_leave_the_range(weights: Any, method: str) -> None:
    """Of NaN any would be as good; the request itself would be served."""
    config, whole = weights
    embedding = whole.embedding.clone()
    embedding[100:] = torch.inf
    with Engine(config, replace(whole, embedding=embedding)) as engine:
        for _ in range(2):
            with pytest.raises(RequestError, match=r"^calibration: the model's activations leave the range of float32"):
                engine.generate(OTHER, SamplingParams(max_tokens=1), method=method)
        assert engine.generate(OTHER, SamplingParams(max_tokens=1)).token_ids


def test_an_event_loop_and_a_score_are_told_as_well(weights: Any) -> None:
    engine, answer = poisoned(weights, GREEDY, "autoregressive", graphs=False)

    async def read() -> list[int]:
        found = list[int]()
        async with engine.astream(PROMPT, GREEDY) as stream:
            async for chunk in stream:
                found += chunk.token_ids
                if len(found) == len(answer):
                    with pytest.raises(RequestError, match="leave the range"):
                        await anext(stream)
        return found

    with engine:
        assert asyncio.run(read()) == answer
        with pytest.raises(RequestError, match="leave the range"):
            engine.score([PROMPT], [[*answer, 5]])
        assert len(engine.score([PROMPT], [answer])[0].chosen) == len(answer)


def test_the_first_token_may_be_none_already(weights: Any) -> None:
    """A prompt with such a token is told by its own words, and a lossy method's too."""
    engine, answer = poisoned(weights, GREEDY, "autoregressive", graphs=False)
    with engine:
        for method in ("autoregressive", "static:skip=3"):
            with pytest.raises(RequestError, match=r"^prompt: the model's activations leave the range of float32"):
                engine.generate([*PROMPT, answer[-1]], GREEDY, method=method)
        assert engine.metrics().requests_failed == 2
