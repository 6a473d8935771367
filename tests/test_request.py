"""Sampling parameters and method options out of range are refused by name."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from time import process_time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from skipjack import ConfigError, Engine, RequestError, SamplingParams
from skipjack.kernels import environment
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.commands import cli
from skipjack.runtime.commands.options import read_prompt
from skipjack.runtime.methods import registry


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"temperature": 10**400}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"min_tokens": 200}, "min_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"stop": [""]}, "stop"),
        ({"n": 0}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": {3: 1000.0}}, "logit_bias"),
        ({"stop": 5}, "stop: expected strings"),
        ({"stop": b"ab"}, "stop: expected strings"),
        ({"stop": [5]}, "stop: expected at most 64 non-empty strings"),
        ({"stop": ["a", " " * 1025]}, "stop: expected strings of at most 1024 characters, got one of 1025"),
        ({"stop": np.array("a")}, "stop: expected strings, got array"),
        ({"stop_token_ids": torch.tensor(5)}, r"stop_token_ids: expected token ids, got tensor\(5\)"),
        ({"stop_token_ids": 5}, "stop_token_ids: expected token ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids: expected token ids"),
        ({"stop_token_ids": [[1]]}, "stop_token_ids: expected an integer"),
        ({"logit_bias": [1]}, "logit_bias: expected a mapping"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: expected an integer"),
        ({"max_tokens": None}, "max_tokens"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty"),
        ({"repetition_penalty": 1e39}, "repetition_penalty"),
        ({"ignore_eos": "no"}, "ignore_eos: expected True or False"),
        ({"ignore_eos": None}, "ignore_eos: expected True or False"),
    ],
)
def test_sampling_parameters_out_of_range_are_named(fields: dict[str, object], name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}"):
        SamplingParams(**fields)


def test_numbers_of_numpy_are_numbers(synthetic: Callable[..., Engine]) -> None:
    given = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        seed=np.uint64(2**63),
        stop_token_ids=np.array([7]),
        logit_bias={np.int32(3): np.float64(1.5)},
    )
    assert given == SamplingParams(max_tokens=3, temperature=0.5, seed=2**63, stop_token_ids=[7], logit_bias={3: 1.5})
    assert {type(value) for value in (given.max_tokens, given.seed, *given.stop_token_ids, *given.logit_bias)} == {int}
    engine, ids = synthetic("tiny"), [5, 6, 7]
    expected = engine.generate(ids, given).token_ids
    for prompt in (np.array(ids), list(np.array(ids, dtype=np.uint16)), tuple(ids)):
        output = engine.generate(prompt, given)
        assert output.token_ids == expected
        assert json.dumps([output.prompt_ids, output.token_ids])
    assert [output.token_ids for output in engine.generate([np.array(ids), ids], given)] == [expected, expected]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([1.5]), "prompt: expected a token id at place 0, got 1.5"),
        (np.array([[1], [2]]), r"prompt: expected a token id at place 0, got \[1\]"),
        (np.array([True]), "prompt: expected a token id at place 0, got True"),
        (np.array([], dtype=int), "prompt: expected at least one token"),
        ([np.int64(10**6)], "prompt: token 1000000 at place 0 is outside the vocabulary"),
    ],
)
def test_arrays_that_are_no_ids_are_refused(synthetic: Callable[..., Engine], prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        synthetic("tiny").generate(prompt)


def test_a_numpy_truth_is_no_number() -> None:
    with pytest.raises(RequestError, match=r"^max_tokens: expected an integer"):
        SamplingParams(max_tokens=np.bool_(True))


def test_every_token_may_end_a_text(synthetic: Callable[..., Engine]) -> None:
    """What is looked up for every token, or for every stop token, does not go through all of them."""
    start = process_time()
    params = SamplingParams(max_tokens=4, stop_token_ids=range(50_000))
    assert process_time() - start < 2
    with pytest.raises(RequestError, match=r"^stop_token_ids: token 512 is outside the vocabulary"):
        synthetic("tiny", vocab=512).generate([1], params)
    every = SamplingParams(max_tokens=4, stop_token_ids=range(512))
    output = synthetic("tiny", vocab=512).generate([1], every)
    assert (output.finish_reason, len(output.token_ids)) == ("stop", 1)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([], [], "score: expected a list of one prompt or more"),
        ([5, 6], [[1], [2]], "score: expected a list of one prompt or more"),
        ([[5]], [], "score: expected 1 continuations, got 0"),
        ([[5]], [" is blue"], r"continuations\[0\]: expected token ids, got text"),
        ([[5], [6]], [[1], []], r"continuations\[1\]: expected at least one token, got none"),
        ([[5]], None, "score: expected a list of continuations, got NoneType"),
        ([[5]], 7, "score: expected a list of continuations, got int"),
        ([[5]], ([6] for _ in range(1)), "score: expected a list of continuations, got generator"),
        ([[5]], "a", "score: expected a list of continuations, got str"),
        ([[5]], {0: [1]}, "score: expected a list of continuations, got dict"),
        ([[5]], [[10**6]], r"continuations\[0\]: token 1000000 at place 0 is outside the vocabulary"),
    ],
)
def test_what_cannot_be_scored_is_named(
    synthetic: Callable[..., Engine], prompts: object, continuations: object, message: str
) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        synthetic("tiny").score(prompts, continuations)


def test_text_that_is_no_unicode_is_the_callers(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = synthetic("tiny")
    monkeypatch.setattr(engine, "tokenizer", SimpleNamespace(render=None))
    with pytest.raises(RequestError, match=r"^prompt: expected valid Unicode, got a lone surrogate at 3"):
        engine.generate("abc\ud800")
    with pytest.raises(
        RequestError, match=r"^messages\[0\].content: expected valid Unicode, got a lone surrogate at 1"
    ):
        engine.generate([{"role": "user", "content": "a\udfff"}])
    with pytest.raises(RequestError, match=r"^prompt: expected valid Unicode, got a lone surrogate at 0"):
        read_prompt("\udcff", None, None)


def test_none_is_nothing() -> None:
    """vLLM's own defaults, as its callers write them."""
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()


def test_equal_parameters_have_one_hash() -> None:
    one, other = (SamplingParams(stop=["a"], logit_bias={3: 1.0, 4: 2.0}, stop_token_ids=[7]) for _ in range(2))
    assert len({one, other, SamplingParams(), SamplingParams(logit_bias={3: 1.0})}) == 3
    assert replace(one, n=2).logit_bias == copy.deepcopy(one).logit_bias == one.logit_bias


@pytest.mark.parametrize("params", [{}, {"max_tokens": 3}, 5])
def test_parameters_of_another_type_are_refused(synthetic: Callable[..., Engine], params: object) -> None:
    with pytest.raises(RequestError, match=r"^params: expected SamplingParams, got"):
        synthetic("tiny").generate([1], params)


@pytest.mark.parametrize("model", [None, 5, b"demo", ["demo"]])
def test_a_model_of_another_type_is_refused(model: object) -> None:
    with pytest.raises(ConfigError, match=r"^MODEL: expected a model folder, .*, got"):
        Engine.load(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_tokens": "a"}, "^cache_tokens: expected an integer of at least 1, got 'a'"),
        ({"cache_tokens": 1.5}, "^cache_tokens: expected an integer"),
        ({"cache_tokens": True}, "^cache_tokens: expected an integer"),
        ({"method": None}, "^method: expected a name"),
        ({"method": 5}, "^method: expected a name"),
        ({"device": None}, "^device"),
        ({"dtype": 5}, "^dtype"),
        ({"backend": []}, "^backend"),
        ({"strict": "no"}, "^strict: expected True or False, got 'no'"),
        ({"graphs": "no"}, "^graphs: expected True, False or None, got 'no'"),
    ],
)
def test_arguments_are_refused_before_a_model_is_looked_for(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine.load("nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": "3"}, "warm_up: sequences: expected an integer from 1 to 16, got '3'"),
        ({"sequences": 2.5}, "warm_up: sequences: expected an integer from 1 to 16, got 2.5"),
        ({"context": "3"}, "warm_up: context: expected an integer from 1 to 1024, got '3'"),
        ({"methods": 5}, "warm_up: methods: expected a method or several, got 5"),
        ({"methods": [5]}, "method: expected a name and options as text, got 5"),
    ],
)
def test_a_warm_up_of_another_type_is_refused(
    synthetic: Callable[..., Engine], options: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        synthetic("tiny").warm_up(**options)


def test_switches_of_an_engine_that_are_none_are_refused(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    weights = synthetic_weights(engine.config, 0, torch.float32)
    for name in ("strict", "graphs"):
        with pytest.raises(RequestError, match=f"^{name}: expected True"):
            Engine(engine.config, weights, **{name: 1})


def test_a_method_of_another_type_is_refused(synthetic: Callable[..., Engine]) -> None:
    with pytest.raises(RequestError, match=r"^method: expected a name"):
        synthetic("tiny").generate([1], method=5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "medusa",
            "unknown method 'medusa', expected one of adaskip, auto, autoregressive, calm, clasp, conflayers",
        ),
        ("swift:depth=3", "unknown option 'depth'"),
        ("lookup:method=3", "unknown option 'method', known options: num_draft_tokens, max_ngram"),
        ("swift:window=x", "option window expects an integer, got 'x'"),
        ("swift:skip_mlp=1+b", "integers joined with"),
        ("swift:skip_attention=2+2", r"different integers joined with \+, got '2\+2'"),
        ("swift:num_draft_tokens=65", "expects 0 to 64"),
        ("swift:skip_mlp=8", "expected 0 to 7, got 8"),
        ("swift:seed", "expected seed=VALUE"),
    ],
)
def test_methods_that_do_not_parse_are_refused(synthetic: Callable[..., Engine], method: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        synthetic("tiny").generate([1], method=method)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SKIPJACK_AHEAD_MIB", "abc", "SKIPJACK_AHEAD_MIB: expected a whole number of MiB below 100000, got 'abc'"),
        ("SKIPJACK_AHEAD_MIB", "-1", "SKIPJACK_AHEAD_MIB: expected a whole number"),
        ("SKIPJACK_CPU_KERNELS", "foo", "SKIPJACK_CPU_KERNELS: expected one of torch, pairs, got 'foo'"),
        ("SKIPJACK_PDL", "off", "SKIPJACK_PDL: expected one of 1, 0, got 'off'"),
    ],
)
def test_a_variable_of_the_environment_that_means_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RequestError, match=f"^{message}"):
        Engine.load("demo")
    assert cli.run(["doctor"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setenv(variable, "")
    environment.check()


@pytest.mark.parametrize(
    ("method", "least"),
    [("clasp", 2), ("clasp:keep_outer=true", 3), ("conflayers", 4), ("del", 2), ("layerskip", 2), ("shortgpt", 2)],
)
def test_a_model_of_too_few_layers_is_named(method: str, least: int) -> None:
    spec = registry.parse(method)
    fields = synthetic_config("tiny")
    spec.build(ModelConfig.parse(fields | {"num_hidden_layers": least}, "tiny"))
    message = f"^method {spec.name}: expected a model of at least {least} layers, got {least - 1}$"
    with pytest.raises(RequestError, match=message):
        spec.build(ModelConfig.parse(fields | {"num_hidden_layers": least - 1}, "tiny"))


def test_a_stop_string_that_no_text_can_have_is_named() -> None:
    with pytest.raises(RequestError, match="stop: expected valid Unicode, got a lone surrogate at 1"):
        SamplingParams(stop=["a\ud800"])
