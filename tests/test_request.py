"""Sampling parameters and method options out of range are refused by name."""

from collections.abc import Callable

import pytest

from skipjack import Engine, RequestError, SamplingParams


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
    ],
)
def test_sampling_parameters_out_of_range_are_named(fields: dict[str, object], name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}"):
        SamplingParams(**fields)


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
