"""Sampling parameters and method options out of range are refused by name."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from skipjack import ConfigError, Engine, RequestError, SamplingParams


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
    ],
)
def test_arguments_are_refused_before_a_model_is_looked_for(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine.load("nowhere", **options)


def test_a_method_of_another_type_is_refused(synthetic: Callable[..., Engine]) -> None:
    with pytest.raises(RequestError, match=r"^method: expected a name"):
        synthetic("tiny").generate([1], method=5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "medusa",
            "unknown method 'medusa', expected one of auto, autoregressive, clasp, del",
        ),
        ("swift:depth=3", "unknown option 'depth'"),
        ("swift:window=x", "option window expects int"),
        ("swift:skip_mlp=1+b", "integers joined with"),
        ("swift:num_draft_tokens=0", "expects 1 to 64"),
        ("swift:skip_mlp=8", "expected 0 to 7, got 8"),
        ("swift:seed", "expected seed=VALUE"),
    ],
)
def test_methods_that_do_not_parse_are_refused(synthetic: Callable[..., Engine], method: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        synthetic("tiny").generate([1], method=method)
