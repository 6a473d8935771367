"""Penalties, bias, minimum length and logprobs in rounds of the device: those of the host, and of a loop."""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import select
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.methods import registry
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.recipe import Recipe
from skipjack.runtime.request import Output, TokenLogprob
from skipjack.runtime.round import State, device_round, device_steps
from skipjack.runtime.sequence import Sequence
from skipjack.runtime.stepwise import at_once

pytestmark = pytest.mark.usefixtures("whole_drafts")

PROMPTS = [[5, 9, 11, 30], [7], list(range(20, 50)), [2, 2, 61, 2]]
FIXED = "swift:skip_attention=2+3,num_draft_tokens=4"
LOSSLESS = [
    "autoregressive",
    f"{FIXED},threshold=0",
    f"{FIXED},threshold=0.1",
    f"{FIXED},threshold=0,draft_vocab=48",
    f"{FIXED},threshold=0.1,tree=true,max_nodes=9",
    "quantized:threshold=0.1,skip_mlp=3",
    "layerskip:exit_layer=5",
    "layerskip:exit_layer=5,threshold=0.05",
    "layerskip:exit_layer=5,reuse=false",
    "kangaroo:adapter=untrained,exit_layer=5,threshold=0.1",
]
REJECTION = [
    f"{FIXED},threshold=0.1,acceptance=rejection",
    f"{FIXED},threshold=0.1,acceptance=rejection,tree=true,max_nodes=9",
    "layerskip:exit_layer=5,acceptance=rejection",
    "kangaroo:adapter=untrained,exit_layer=5,threshold=0.1,acceptance=rejection",
]
LOSSY = ["unified:speedup=2", "layerskip:exit_layer=3,verify=false"]
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.6}
BIAS = {"logit_bias": {3: 4.0, 17: -100.0, 60: 1.5}, "min_tokens": 9, "stop_token_ids": tuple(range(0, 96, 3))}
CHOICES: dict[str, dict[str, Any]] = {
    "penalties": PENALTIES,
    "bias": BIAS,
    "logprobs": {"logprobs": 3},
    "no likely ones": {"logprobs": 0},
    "all sampled": {"temperature": 0.9, "top_p": 0.95, "n": 2, "logprobs": 5, **PENALTIES, **BIAS},
}
Told = Callable[[Output], Any]


@cache
def pair(shape: str) -> tuple[Engine, Engine]:
    """A model of few tokens, so that they recur, with rounds the host steers and with rounds of the device."""
    method = {"tiny": "autoregressive", "tiny-dmtd": "dmtd", "routed-tiny": "flexidepth"}[shape]
    split = {"num_encoding_layers": 0, "num_thinking_layers": 6} if method == "dmtd" else {}
    config = ModelConfig.parse(synthetic_config(shape) | split | {"vocab_size": 96}, shape)
    weights = synthetic_weights(config, 0, torch.float32, 1.0 if method == "dmtd" else 0.1)
    host, device = (Engine(config, weights, method=method, graphs=alone) for alone in (False, True))
    return host, device


def choices(outputs: list[Output]) -> list[Any]:
    return [[(c.token_ids, c.finish_reason, c.logprobs) for c in output.choices] for output in outputs]


def same(told: Told, method: str, params: SamplingParams, shape: str = "tiny") -> list[Output]:
    host, device = pair(shape)
    expected = host.generate(PROMPTS, params, method=method)
    outputs = device.generate(PROMPTS, params, method=method)
    assert choices(outputs) == choices(expected)
    assert [told(output) for output in outputs] == [told(output) for output in expected]
    assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs)
    assert any(output.stats.rounds for output in outputs)
    assert not any(output.stats.graph_rounds for output in expected)
    return outputs


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("method", [*LOSSLESS, *REJECTION, *LOSSY])
def test_rounds_of_the_device_are_those_of_the_host(told: Told, method: str, choice: str) -> None:
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True, **CHOICES[choice])
    outputs = same(told, method, params)
    if method in LOSSLESS:
        plain = pair("tiny")[0].generate(PROMPTS, params)
        assert choices(outputs) == choices(plain)
    if params.logprobs is not None:
        for made in (c for output in outputs for c in output.choices):
            assert [entry.token_id for entry in made.logprobs or []] == made.token_ids
            assert {len(entry.top) for entry in made.logprobs or []} == {params.logprobs}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("shape", "method"),
    [("tiny-dmtd", "dmtd:horizon=3"), ("tiny-dmtd", "dmtd:phase=absolute"), ("routed-tiny", "flexidepth")],
)
def test_steps_of_the_device_are_those_of_the_host(told: Told, shape: str, method: str, choice: str) -> None:
    same(told, method, SamplingParams(max_tokens=14, seed=3, ignore_eos=True, **CHOICES[choice]), shape)


@pytest.mark.parametrize("method", ["autoregressive", f"{FIXED},threshold=0", "layerskip:exit_layer=5"])
def test_every_greedy_token_is_that_of_a_loop_over_the_models_probabilities(method: str) -> None:
    """The whole text is read anew for each token, and its penalties are counted in float64."""
    host, device = pair("tiny")
    penalties = {"presence_penalty": 0.8, "frequency_penalty": 0.5, "logit_bias": {7: 1.5, 30: -2.0}}
    params = SamplingParams(max_tokens=30, min_tokens=12, stop_token_ids=range(0, 96, 5), ignore_eos=True, **penalties)
    unlike = 0
    for prompt in PROMPTS:
        got = device.generate(prompt, params, method=method).token_ids
        answer: list[int] = []
        while len(answer) < 30 and (len(answer) < 12 or answer[-1] % 5):
            whole = SamplingParams(max_tokens=1, logprobs=96, ignore_eos=True)
            entry = (host.generate([*prompt, *answer], whole).choices[0].logprobs or [])[0]
            scores = dict(entry.top)
            for token, bias in params.logit_bias.items():
                scores[token] += bias
            for token in range(0, 96, 5) if len(answer) < 12 else ():
                scores[token] = -torch.inf
            for token in answer:
                scores[token] -= 0.5
            for token in set(answer):
                scores[token] -= 0.8
            answer.append(max(scores, key=lambda token: scores[token]))
            unlike += answer[-1] != entry.token_id
        assert got == answer
    assert unlike > 20, "the parameters change the text"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("method", [f"{FIXED},threshold=0", "layerskip:exit_layer=5", "unified:speedup=2"])
def test_the_minimum_is_reached_anywhere_in_a_draft(told: Told, method: str, temperature: float) -> None:
    free = SamplingParams(max_tokens=14, temperature=temperature, seed=5, ignore_eos=True)
    ends = set(pair("tiny")[0].generate(PROMPTS[2], free, method=method).token_ids)
    sizes: list[int] = []
    for least in range(1, 12):
        params = SamplingParams(
            max_tokens=14,
            min_tokens=least,
            stop_token_ids=sorted(ends),
            temperature=temperature,
            seed=5,
            ignore_eos=True,
        )
        outputs = same(told, method, params)
        assert all(len(output.token_ids) >= least for output in outputs)
        assert all(not ends & set(output.token_ids[:least]) for output in outputs)
        sizes.append(len(outputs[2].token_ids))
        if not method.startswith("unified"):
            assert choices(outputs) == choices(pair("tiny")[0].generate(PROMPTS, params))
    assert len(set(sizes)) > 2


def mixed(monkeypatch: pytest.MonkeyPatch, engine: Engine, own: list[dict[str, Any]]) -> None:
    """Give every prompt of a request parameters of its own."""
    honest = engine._sequence

    def sequence(index: int, choice: int, ids: list[int], params: SamplingParams, seed: int) -> Sequence:
        given = {field.name: getattr(params, field.name) for field in fields(params)}
        return honest(index, choice, ids, SamplingParams(**given | own[index]), seed)

    monkeypatch.setattr(engine, "_sequence", sequence)


@pytest.mark.parametrize("method", [*LOSSLESS[:3], "layerskip:exit_layer=5", "unified:speedup=2"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sequences_that_ask_for_different_things_share_rounds(
    told: Told, monkeypatch: pytest.MonkeyPatch, method: str, temperature: float
) -> None:
    own = [{}, PENALTIES | {"logprobs": 2}, {"temperature": 0.9, "logprobs": 6, "max_tokens": 12}, BIAS]
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=9, ignore_eos=True)
    alone = [
        pair("tiny")[0].generate(prompt, SamplingParams(**vars(params) | mine), method=method)
        for prompt, mine in zip(PROMPTS, own, strict=True)
    ]
    for engine in pair("tiny"):
        mixed(monkeypatch, engine, own)
    outputs = same(told, method, params)
    if not method.startswith("unified"):
        assert [c[0][:2] for c in choices(outputs)] == [c[0][:2] for c in choices(alone)]
    told_of = [output.choices[0].logprobs for output in outputs]
    assert [None if told is None else {len(entry.top) for entry in told} for told in told_of] == [None, {2}, {6}, None]


def test_a_graph_keeps_nothing_of_the_sequences_before(told: Told) -> None:
    """The same graph serves requests of other parameters one after the other."""
    _, device = pair("tiny")
    graphs = device._open().graphs
    assert graphs is not None
    first = SamplingParams(max_tokens=12, ignore_eos=True, **PENALTIES, **BIAS)
    same(told, FIXED, first)
    captured = graphs.captured
    for changed in ({"presence_penalty": 0.1}, {"logit_bias": {4: 2.0}}, {"min_tokens": 3}, PENALTIES | BIAS):
        same(told, FIXED, SamplingParams(max_tokens=12, ignore_eos=True, **changed))
    assert graphs.captured == captured


def test_recipes_tell_a_power_of_two_of_likely_tokens() -> None:
    plan = LayerPlan.full(2)

    def recipe(vocabulary: int, *asked: dict[str, Any]) -> Recipe:
        params = [SamplingParams(**fields) for fields in asked]
        made = [Sequence(0, 0, [1], own, 0, frozenset(), 9, None) for own in params]
        return Recipe(plan, plan).choosing(made, vocabulary)

    assert recipe(96, {}) == Recipe(plan, plan)
    assert recipe(96, {}, {"temperature": 1.0}) == Recipe(plan, plan, sampled=True)
    assert recipe(96, {}, {"min_tokens": 1}) == Recipe(plan, plan, sampled=True, reshaped=True)
    told = [recipe(96, {"logprobs": top}, {}) for top in (0, 1, 2, 3, 20, 90)]
    assert [own.logprobs for own in told] == [0, 1, 2, 4, 32, 96]
    assert all(own.sampled and not own.reshaped for own in told)


def test_what_nobody_asks_for_takes_no_memory() -> None:
    model, _ = pair("tiny")[0]._loaded()
    plan = LayerPlan.full(model.config.num_layers)
    state = State.empty(model, Recipe(plan, plan, 4), 16, 1)
    assert (state.reshaping, state.logprobs) == (None, None)


def test_logprobs_of_a_stream_come_with_its_tokens() -> None:
    host, device = pair("tiny")
    params = SamplingParams(max_tokens=16, logprobs=2, ignore_eos=True)
    seen: list[list[TokenLogprob]] = []
    for engine in (host, device):
        stream = engine.stream(PROMPTS[0], params, method=f"{FIXED},threshold=0")
        for _ in range(3):
            next(stream)
        stream.close()
        seen.append(stream.outputs[0].choices[0].logprobs or [])
    assert seen[0] == seen[1]
    assert len(seen[0]) >= 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("method", "choice"),
    [
        ("layerskip:exit_layer=1,num_draft_tokens=2", PENALTIES | {"min_tokens": 3, "logprobs": 3}),
        ("kangaroo:adapter=untrained,exit_layer=1,num_draft_tokens=2,threshold=0.05", {"temperature": 0.8}),
        ("swift:skip_mlp=1,num_draft_tokens=2,threshold=0.05", PENALTIES | {"temperature": 0.8, "logprobs": 0}),
    ],
)
def test_kernels_give_the_bits_of_the_host_and_the_tokens_of_the_torch_table(
    told: Told, method: str, choice: dict[str, Any]
) -> None:
    pytest.importorskip("triton")
    config = ModelConfig.parse(synthetic_config("tiny-llama") | {"num_hidden_layers": 2, "vocab_size": 64}, "small")
    weights = synthetic_weights(config, 0, torch.float32, 0.1)
    params = SamplingParams(max_tokens=7, seed=2, stop_token_ids=[3, 9], ignore_eos=True, **choice)
    made: list[list[Output]] = []
    for backend, alone in (("torch", False), ("triton", False), ("triton", True)):
        with Engine(config, weights, backend=backend, cache_tokens=512, graphs=alone) as engine:
            made.append(engine.generate([[5, 9, 11], [7]], params, method=method))
    table, host, device = made
    assert choices(device) == choices(host)
    assert [told(output) for output in device] == [told(output) for output in host]
    assert all(output.stats.graph_rounds == output.stats.rounds > 0 for output in device)
    for one, other in zip(device, table, strict=True):
        assert one.token_ids == other.token_ids
        for mine, theirs in zip(one.choices[0].logprobs or [], other.choices[0].logprobs or [], strict=True):
            assert list(mine.top) == list(theirs.top)
            values = [mine.logprob, *mine.top.values()]
            assert values == pytest.approx([theirs.logprob, *theirs.top.values()], abs=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "method",
    [
        "swift:skip_mlp=1,num_draft_tokens=2,threshold=0.1",
        "layerskip:exit_layer=1,num_draft_tokens=2",
        "layerskip:exit_layer=1,num_draft_tokens=2,acceptance=rejection",
        "kangaroo:adapter=untrained,exit_layer=1,num_draft_tokens=2,threshold=0.1",
        "unified:speedup=2",
    ],
)
@torch.inference_mode()
def test_a_round_asks_the_host_nothing(questions: Any, method: str, temperature: float) -> None:
    pytest.importorskip("triton")
    fields = synthetic_config("tiny-llama") | {"num_hidden_layers": 4, "vocab_size": 64}
    config = ModelConfig.parse(fields, "tiny-llama")
    model = Model(config, synthetic_weights(config, 0, torch.float32, 0.1), select("triton"))
    params = SamplingParams(max_tokens=20, temperature=temperature, min_tokens=4, logprobs=3, **PENALTIES)
    sequence = Sequence(0, 0, [5], params, 0, frozenset([3]), 64, None)
    made = registry.parse(method).build(config)
    at_once(made.prepare(model, None))
    recipe = made.recipe([sequence])
    assert recipe is not None
    recipe, cache = recipe.choosing([sequence], config.vocab_size), model.new_cache(4)
    state = State.empty(model, recipe, 2, 1)
    assert state.reshaping is not None
    assert state.logprobs is not None
    state.allow(torch.tensor([9, 0]))
    state.block_table[0, 0] = 1
    state.logprobs.values.fill_(torch.nan)
    with questions:
        if recipe.steps:
            device_steps(model, cache, state, recipe.steps, recipe.sampled)
        else:
            device_round(model, cache, state, recipe)
    assert questions.asked == []
    taken = 9 - int(state.progress.left[0])
    assert state.reshaping.times.sum(dim=1).tolist() == [taken, 0]
    assert state.logprobs.values[0, :taken].isfinite().all()
