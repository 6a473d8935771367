"""Lossy policies on the device alone: the tokens and counts of the passes the host steers, and nothing asked of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import select
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import round_graph
from skipjack.runtime.influence import Change
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.adaskip import AdaSkip
from skipjack.runtime.methods.dmtd import Cycles
from skipjack.runtime.model import Model
from skipjack.runtime.request import Output
from skipjack.runtime.round import State, device_steps
from skipjack.runtime.round_graph import AHEAD

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 31)), [400, 3, 3, 17, 250, 8]]
CYCLES = [
    *(f"prefill={a},phase={b}" for a, b in product(("plain", "readd", "cyclic"), ("prompt", "absolute"))),
    "history=shadow",
    "history=shadow,phase=absolute,horizon=3",
    "horizon=1",
    "horizon=2,phase=absolute",
    "horizon=6",
]
Told = Callable[[Output], Any]


def of_cycles(encoding: int) -> ModelConfig:
    split = {"num_encoding_layers": encoding, "num_thinking_layers": 6 - encoding}
    return ModelConfig.parse(synthetic_config("tiny-dmtd") | split, "tiny-dmtd")


@cache
def pair(shape: str, encoding: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Engine, Engine]:
    """The same model with rounds the host steers and with rounds of the device."""
    method = {"tiny-dmtd": "dmtd", "tiny-mindskip": "mindskip", "routed-tiny": "flexidepth"}[shape]
    config = of_cycles(encoding) if method == "dmtd" else ModelConfig.parse(synthetic_config(shape), shape)
    weights = synthetic_weights(config, 1, dtype, 1.0 if method == "dmtd" else 0.3)
    host, device = (Engine(config, weights, method=method, graphs=alone, **options) for alone in (False, True))
    return host, device


def check(told: Told, host: Engine, device: Engine, params: SamplingParams, method: str | None = None) -> list[Output]:
    expected = host.generate(PROMPTS, params, method=method)
    outputs = device.generate(PROMPTS, params, method=method)
    for one, other in zip(outputs, expected, strict=True):
        assert told(one) == told(other)
        assert [choice.token_ids for choice in one.choices] == [choice.token_ids for choice in other.choices]
        assert one.stats.graph_rounds == one.stats.rounds
        assert (other.stats.rounds > 0, other.stats.graph_rounds) == (True, 0)
    assert device._loaded()[1].free_pages == device._loaded()[1].total_pages
    return outputs


@pytest.mark.parametrize("case", ["dmtd-1", "dmtd-2", "mindskip-1", "mindskip-2"])
def test_golden_cases(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())
    method = case.split("-", maxsplit=1)[0]
    with Engine.load(golden / case, method=method, dtype="float32", graphs=True) as engine:
        for run in expected["runs"]:
            options = ",".join(f"{key}={value}" for key, value in run.get("options", {}).items())
            params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
            output = engine.generate(run["prompt_ids"], params, method=f"{method}:{options}" if options else method)
            assert output.token_ids == run["token_ids"], options
            assert output.stats.graph_rounds == output.stats.rounds > 0


@pytest.mark.parametrize(("encoding", "options"), [*product([0], CYCLES), *product([2], CYCLES[:2]), (2, CYCLES[-2])])
def test_cycles_of_the_device_are_those_of_the_host(
    told: Told, audit: Callable[..., Any], encoding: int, options: str
) -> None:
    host, device = pair("tiny-dmtd", encoding)
    watched = audit(device)
    greedy = SamplingParams(max_tokens=15, ignore_eos=True)
    for params in (greedy, replace(greedy, temperature=0.8, top_p=0.9, seed=3)):
        check(told, host, device, params, f"dmtd:{options}")
    assert watched.reads > 1000


def test_a_sequence_ends_anywhere_in_a_cycle(told: Told) -> None:
    host, device = pair("tiny-dmtd")
    for count in range(1, 11):
        check_one = SamplingParams(max_tokens=count, ignore_eos=True)
        one, other = (engine.generate(PROMPTS[2], check_one) for engine in (device, host))
        assert told(one) == told(other)
        assert len(one.token_ids) == count
    known = host.generate(PROMPTS[2], SamplingParams(max_tokens=11, ignore_eos=True)).token_ids
    for stop in dict.fromkeys(known):
        params = SamplingParams(max_tokens=11, ignore_eos=True, stop_token_ids=[stop])
        one, other = (engine.generate(PROMPTS[2], params) for engine in (device, host))
        assert told(one) == told(other)
        assert one.finish_reason == "stop"


@pytest.mark.parametrize("method", ["dmtd", "dmtd:phase=absolute,horizon=3", "dmtd:history=shadow"])
def test_sequences_join_and_leave_between_cycles(told: Told, audit: Callable[..., Any], method: str) -> None:
    host, device = pair("tiny-dmtd", 0, torch.bfloat16, max_sequences=2)
    audit(device)
    for fields in ({}, {"temperature": 1.0, "seed": 11, "n": 2}):
        params = SamplingParams(max_tokens=13, ignore_eos=True, stop_token_ids=range(0, 512, 9), **fields)
        outputs = [engine.generate(PROMPTS, params, method=method) for engine in (device, host)]
        ids = [[[choice.token_ids for choice in output.choices] for output in each] for each in outputs]
        assert ids[0] == ids[1]
        assert len({len(choice) for choices in ids[0] for choice in choices}) > 2
        assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs[0])


def test_a_cycle_at_the_end_of_the_context(told: Told) -> None:
    host, device = pair("tiny-dmtd")
    prompt = [(7 * i) % 500 + 3 for i in range(device.config.max_context - 6)]
    one, other = (engine.generate(prompt, SamplingParams(max_tokens=40, ignore_eos=True)) for engine in (device, host))
    assert told(one) == told(other)
    assert (len(one.token_ids), one.finish_reason) == (6, "length")


def test_given_tokens_are_scored_by_the_host() -> None:
    host, device = pair("tiny-dmtd")
    assert host.score(PROMPTS[:1], [[5, 6, 7]]) == device.score(PROMPTS[:1], [[5, 6, 7]])


def test_cycles_are_streamed_one_a_chunk_and_ahead_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = pair("tiny-dmtd")
    enqueued: list[int] = []

    def note(*given: Any) -> None:
        enqueued.append(given[3].count)
        device_steps(*given)

    monkeypatch.setattr(round_graph, "device_steps", note)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = device.generate(PROMPTS[0], params).token_ids
    enqueued.clear()
    stream = device.stream(PROMPTS[0], params)
    chunks = [next(stream) for _ in range(3)]
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 4, 4]
    assert [token for chunk in chunks for token in chunk.token_ids] == expected[:9]
    assert enqueued == [4] * (2 + AHEAD)
    stream.close()


def test_thinking_layers_run_once_a_cycle(audit: Callable[..., Any]) -> None:
    """One pass over the rows of a cycle, and nothing launched for the other tokens where heads coincide."""
    _, device = pair("tiny-dmtd")
    watched = audit(device)
    for method, thinking in (("dmtd", 1), ("dmtd:phase=absolute", 4)):
        watched.ran.clear()
        device.generate(PROMPTS[0], SamplingParams(max_tokens=2, ignore_eos=True), method=method)
        launched = [sublayer for sublayer, _ in watched.ran]
        cycles = 1 + AHEAD
        assert launched.count(15) == 1 + 4 * cycles
        assert launched.count(0) == 1 + thinking * cycles


def test_decisions_of_a_prompt_hold_on_the_device(told: Told, audit: Callable[..., Any]) -> None:
    host, device = pair("tiny-mindskip")
    audit(device)
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    outputs = check(told, host, device, greedy)
    assert len({tuple(output.stats.events[0]["skip_attention"]) for output in outputs}) > 1
    assert any(output.stats.executed_skips for output in outputs)
    check(told, host, device, replace(greedy, temperature=0.8, seed=3))
    ends = [outputs[0].token_ids[5], outputs[2].token_ids[8]]
    check(told, host, device, replace(greedy, stop_token_ids=ends))


@pytest.mark.parametrize("kv", ["own", "none"])
def test_layers_that_decide_for_themselves_decide_on_the_device(told: Told, kv: str) -> None:
    host, device = pair("routed-tiny")
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    outputs = check(told, host, device, greedy, f"flexidepth:kv={kv}")
    assert len(set(outputs[0].stats.layers_per_token)) > 1
    ends = [outputs[0].token_ids[5], outputs[2].token_ids[8]]
    host, device = pair("routed-tiny", max_sequences=3)
    check(told, host, device, replace(greedy, stop_token_ids=ends), f"flexidepth:kv={kv}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("method", ["dmtd:horizon=2", "dmtd:horizon=2,phase=absolute", "dmtd:history=shadow,horizon=2"])
@torch.inference_mode()
def test_a_cycle_asks_the_host_nothing(questions: Any, method: str, sampled: bool) -> None:
    pytest.importorskip("triton")
    layers = {"num_encoding_layers": 0, "num_thinking_layers": 1, "num_decoding_layers": 1, "num_hidden_layers": 2}
    config = ModelConfig.parse(synthetic_config("tiny-dmtd") | layers | {"vocab_size": 64}, "tiny-dmtd")
    model = Model(config, synthetic_weights(config, 0, torch.float32), select("triton"))
    ask_nothing(questions, model, method, sampled, [3, 5])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("shape", "method"),
    [
        ("tiny-mindskip", "mindskip"),
        ("routed-tiny", "flexidepth"),
        ("routed-tiny", "flexidepth:kv=none"),
        ("tiny", "skipdecode"),
        ("tiny", "calm:decay=2"),
        ("tiny", "calm:measure=softmax,interval=2"),
        ("tiny", "adaskip:n=5,online=2"),
        ("tiny", "adaskip:n=5,online=2,phase=decode"),
    ],
)
@torch.inference_mode()
def test_a_step_asks_the_host_nothing(questions: Any, shape: str, method: str) -> None:
    pytest.importorskip("triton")
    config = ModelConfig.parse(synthetic_config(shape), shape)
    model = Model(config, synthetic_weights(config, 0, torch.float32), select("triton"))
    ask_nothing(questions, model, method, False, [3])


def ask_nothing(questions: Any, model: Model, method: str, sampled: bool, numbers: list[int]) -> None:
    """A round for a sequence that ends in it or not, and for a place that no sequence has."""
    made = registry.parse(method).build(model.config)
    if isinstance(made, AdaSkip):
        sublayers = 2 * model.config.num_layers
        made.learn(Change(torch.linspace(0, 1, sublayers), torch.linspace(1, 2, sublayers)), model.device)
    cache = model.new_cache(4)
    for recipe, left in product(made.recipes([]), numbers):
        steps = recipe.steps
        assert steps is not None
        state = State.empty(model, recipe, 2, 1)
        state.allow(torch.tensor([left - 2, 0]))
        state.block_table[0, 0] = 1
        with questions:
            device_steps(model, cache, state, steps, sampled)
        assert questions.asked == []
        taken = min(left - 2, steps.count)
        assert (state.progress.left.tolist(), state.progress.length.tolist()) == ([left - 2 - taken, 0], [taken, 0])
        assert [ran >= 0 for ran in state.report[:, 0, 0].tolist()] == [n < taken for n in range(steps.count)]
        assert state.report[:, 1, 0].tolist() == [-1] * steps.count, "a place no sequence has does not run"


def test_the_kernels_give_the_ids_of_the_torch_table(told: Told) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    split = {"num_encoding_layers": 1, "num_thinking_layers": 1, "num_decoding_layers": 1, "num_hidden_layers": 3}
    config = ModelConfig.parse(synthetic_config("tiny-dmtd") | split | {"vocab_size": 64}, "tiny-dmtd")
    weights = synthetic_weights(config, 3, torch.float32, 1.0)
    seen: list[object] = []
    for backend, alone in (("torch", False), ("triton", True)):
        with Engine(config, weights, method="dmtd:horizon=2", backend=backend, cache_tokens=512, graphs=alone) as table:
            outputs = table.generate([[5, 9, 11], [7]], SamplingParams(max_tokens=4, ignore_eos=True))
            seen.append([told(output) for output in outputs])
    assert seen[0] == seen[1]


def test_equal_cycles_share_their_graphs() -> None:
    config = of_cycles(0)
    recipes = [registry.parse(f"dmtd:{options}").build(config).recipe([]) for options in ("horizon=4", "horizon=4")]
    assert recipes[0] == recipes[1]
    assert isinstance(recipes[0].steps, Cycles)
