"""As many sequences together as an engine can be told: tokens are still those of each alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from skipjack import Engine, RequestError, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.company import Company
from skipjack.runtime.graphs import SIZES, Graphs
from skipjack.runtime.request import MOST_SEQUENCES

PROMPTS = [[3 + (7 * i + j) % 400 for j in range(1 + i % 5)] for i in range(MOST_SEQUENCES)]
METHODS = [
    "autoregressive",
    "swift:skip_attention=2+3,num_draft_tokens=4,threshold=0.1",
    "swift:skip_attention=2+3,tree=true,num_draft_tokens=4",
    "lookup:choose=likeliest",
    "layerskip:exit_layer=5",
    "conflayers",
    "quantized",
    "auto:search_budget=0",
    "unified:speedup=2",
    "skipdecode:length=9",
    "calm:threshold=0.9,least=2",
    "adaskip:n=5,online=3",
]


@pytest.fixture(scope="module", params=[False, True], ids=["host", "device"])
def engine(request: pytest.FixtureRequest, synthetic: Callable[..., Engine]) -> Engine:
    return synthetic(late_scale=0.1, graphs=request.param, max_sequences=MOST_SEQUENCES)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_each_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str, fields: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True, **fields)
    alone = [engine.generate(prompt, params, method=method).token_ids for prompt in PROMPTS[::3]]
    together, advance = set[int](), Company._advance

    def noted(company: Company, running: list[Any]) -> Any:
        together.add(len(running))
        return advance(company, running)

    monkeypatch.setattr(Company, "_advance", noted)
    assert [output.token_ids for output in engine.generate(PROMPTS, params, method=method)[::3]] == alone
    assert max(together) == MOST_SEQUENCES


def test_the_kernels_take_as_many() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    config = ModelConfig.parse(synthetic_config("tiny") | {"num_hidden_layers": 1, "vocab_size": 64}, "tiny")
    weights = synthetic_weights(config, 3, torch.float32, 1.0)
    prompts, params = [[i % 60 + 2] for i in range(17)], SamplingParams(max_tokens=3, ignore_eos=True)
    seen = []
    for backend, graphs in (("torch", False), ("triton", True)):
        with Engine(
            config, weights, backend=backend, cache_tokens=64 * 17, graphs=graphs, max_sequences=MOST_SEQUENCES
        ) as engine:
            seen.append([output.token_ids for output in engine.generate(prompts, params)])
    assert seen[0] == seen[1]


def test_no_more_run_together_than_was_said(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic(late_scale=0.1, graphs=False, max_sequences=3)
    stream = engine.stream(PROMPTS[:5], SamplingParams(max_tokens=3, ignore_eos=True))
    begun = [next(stream).index for _ in range(4)]
    assert sorted({*begun}) == [0, 1, 2]
    assert engine.max_sequences == 3
    with pytest.raises(RequestError, match="warm_up: sequences: expected an integer from 1 to 3, got 4"):
        engine.warm_up(sequences=4)


@pytest.mark.parametrize("given", [0, MOST_SEQUENCES + 1, True, 2.0, "16", None])
def test_other_numbers_are_refused(synthetic: Callable[..., Engine], given: Any) -> None:
    with pytest.raises(RequestError, match=f"max_sequences: expected an integer from 1 to {MOST_SEQUENCES}, got "):
        synthetic(max_sequences=given)
    with pytest.raises(RequestError, match="max_sequences: expected"):
        Engine.load("there is no such model", max_sequences=given)


def test_a_graph_for_every_number_of_sequences() -> None:
    assert (SIZES[0], SIZES[-1]) == (1, MOST_SEQUENCES)


def test_rounds_under_way_go_on_while_those_who_lead_are_among_them(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five requests where three run together: to take others along would read every graph out after one round."""
    begun, take = list[int](), Graphs.take

    def taken(graphs: Graphs, recipe: Any, sequences: list[Any]) -> Any:
        begun.append(len(sequences))
        return take(graphs, recipe, sequences)

    monkeypatch.setattr(Graphs, "take", taken)
    engine = synthetic(late_scale=0.1, graphs=True, max_sequences=3)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    alone = [engine.generate(prompt, params).token_ids for prompt in PROMPTS[:5]]
    begun.clear()
    streams = [engine.stream(prompt, params) for prompt in PROMPTS[:5]]
    found: list[list[int]] = [[] for _ in streams]
    while any(chunks := [next(stream, None) for stream in streams]):
        for tokens, chunk in zip(found, chunks, strict=True):
            tokens.extend(chunk.token_ids if chunk else [])
    assert found == alone
    rounds = sum(stream.outputs[0].stats.graph_rounds for stream in streams)
    assert len(begun) < rounds / 12
