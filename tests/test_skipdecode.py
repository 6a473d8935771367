"""SkipDecode: how many layers run where, scores by transformers with layers left out, batches, rounds of the device."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods.skipdecode import Decay
from skipjack.runtime.request import Output

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 31)), [400, 3, 3, 17, 250, 8]]
METHOD = "skipdecode:most=7,least=2,length=9"


def ran(token: int, most: int, least: int, length: int) -> int:
    """On the line from (0, most) to (length, least), halves rounded up, and level beyond it."""
    return floor(most - Fraction((most - least) * min(token, length), length) + Fraction(1, 2))


@pytest.mark.parametrize(("most", "least", "length"), [(30, 15, 128), (8, 1, 5), (7, 7, 4), (5, 2, 1), (6, 1, 30)])
def test_layers_fall_on_a_line(most: int, least: int, length: int) -> None:
    steps, tokens = Decay(30, most, least, length, 1), range(2 * length + 3)
    layers = steps.layers(torch.tensor(tokens)).tolist()
    assert layers == [ran(token, most, least, length) for token in tokens]
    assert (layers[0], layers[length], layers[-1]) == (most, least, least)
    assert layers == sorted(layers, reverse=True)


def test_what_runs_are_the_first_layers_and_the_last() -> None:
    steps = Decay(8, 6, 2, 10, 2)
    for count in range(2, 9):
        own = [0, 1, *range(10 - count, 8)]
        assert torch.nonzero(steps.runs(torch.tensor([count]))[:, 0]).flatten().tolist() == own
        assert steps.plan(count).skipped_attention == steps.plan(count).skipped_mlp
        assert [*steps.plan(count).skipped_mlp] == [layer for layer in range(8) if layer not in own]


@pytest.mark.parametrize("options", ["", "most=7,least=2,length=9", "least=3,warm_up=3,length=1", "warm_up=0,length=4"])
def test_scores_are_those_of_transformers_without_the_layers(tmp_path: Path, options: str) -> None:
    """Hooks hand on what entered a layer for the tokens that leave it out; later ones alone would have read them."""
    transformers = pytest.importorskip("transformers")
    write_synthetic(tmp_path / "m", "tiny-llama", 0, 0.3)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64).eval()
    given = dict(item.split("=") for item in options.split(",") if item)
    most, warm_up, length = (
        int(given.get(key, value)) for key, value in (("most", 8), ("warm_up", 1), ("length", 128))
    )
    least = int(given.get("least", 4))
    prompt, text = PROMPTS[2], [(37 * i) % 500 + 3 for i in range(24)]
    counts = [8] * len(prompt) + [ran(token, most, least, length) for token in range(len(text) - 1)]

    def leaving(layer: int) -> Callable[..., Any]:
        runs = torch.tensor([layer < warm_up or layer >= 8 - count + warm_up for count in counts])[None, :, None]
        return lambda module, entered, left: torch.where(runs, left, entered[0])

    for number, layer in enumerate(oracle.model.layers):
        layer.register_forward_hook(leaving(number))
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + text[:-1]])).logits[0, len(prompt) - 1 :]
    with Engine.load(tmp_path / "m") as engine:
        (scored,) = engine.score([prompt], [text], method=f"skipdecode:{options}" if options else "skipdecode")
    expected = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0)
    assert scored.chosen == tuple(logits.argmax(-1).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_batches_are_their_members_alone_wherever_they_are(
    synthetic: Callable[..., Engine], dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    """Two at a time, of which some end early: those that run together are at different places of their texts."""
    engine = synthetic("tiny-llama", dtype, max_sequences=2)
    params = SamplingParams(max_tokens=16, stop_token_ids=range(0, 512, 9), **fields)
    together = engine.generate(PROMPTS, params, method=METHOD)
    alone = [engine.generate(prompt, params, method=METHOD) for prompt in PROMPTS]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [told_layers(output) for output in together] == [told_layers(output) for output in alone]
    assert len({len(output.token_ids) for output in alone}) > 1


def told_layers(output: Output) -> tuple[float, ...]:
    return output.stats.layers_per_token


def test_layers_that_are_left_out_do_not_run_and_no_hole_is_read(
    synthetic: Callable[..., Engine], audit: Callable[..., Any]
) -> None:
    engine = synthetic("tiny-llama", torch.float32, 0.5)
    watched = audit(engine)
    output = engine.generate(PROMPTS[0], SamplingParams(max_tokens=13, ignore_eos=True), method=METHOD)
    counts = [ran(token, 7, 2, 9) for token in range(12)]
    assert told_layers(output) == (8, *counts)
    assert output.stats.executed_skips == sum(2 * (8 - count) for count in counts)
    assert not output.stats.lossless
    own = [sublayer for sublayer, rows in watched.ran if rows == 1]
    layers = [[0, *range(9 - count, 8)] for count in counts]
    assert own == [sublayer for run in layers for layer in run for sublayer in (2 * layer, 2 * layer + 1)]
    assert watched.reads > 100


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("most", [2, 8], ids=["apart", "together"])
def test_rounds_of_the_device_are_those_of_the_host(
    told: Callable[[Output], Any], audit: Callable[..., Any], fields: dict[str, Any], most: int
) -> None:
    """Also of sequences that came later: who shares a pass with whom then differs, and what it reads a token."""
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    weights = synthetic_weights(config, 0, torch.float32, 0.3)
    host, device = (Engine(config, weights, graphs=alone, max_sequences=most) for alone in (False, True))
    audit(device)
    params = SamplingParams(max_tokens=14, stop_token_ids=range(0, 512, 13), **fields)
    for one, other in zip(*(engine.generate(PROMPTS, params, method=METHOD) for engine in (device, host)), strict=True):
        assert one.token_ids == other.token_ids
        assert told_layers(one) == told_layers(other)
        assert most == 2 or told(one) == told(other)
        assert one.stats.graph_rounds == one.stats.rounds
        assert (other.stats.rounds > 0, other.stats.graph_rounds) == (True, 0)


def test_a_text_that_ends_before_a_layer_falls_says_that_nothing_was_skipped(synthetic: Callable[..., Engine]) -> None:
    engine, params = synthetic("tiny-llama"), SamplingParams(max_tokens=4, ignore_eos=True)
    output = engine.generate(PROMPTS[0], params, method="skipdecode:length=1000")
    assert output.stats.notes == ("nothing was skipped: every layer ran for every token",)
    assert output.token_ids == engine.generate(PROMPTS[0], params).token_ids
    assert engine.generate(PROMPTS[0], replace(params, max_tokens=6), method=METHOD).stats.notes == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("most=9", "expected warm_up <= least <= most <= 8 layers, got 1, 5 and 9"),
        ("most=3,least=4", "got 1, 4 and 3"),
        ("least=2,warm_up=3", "got 3, 2 and 8"),
        ("length=0", "option length expects 1 to"),
        ("speed=2", "unknown option 'speed', known options: most, least, length, warm_up"),
    ],
)
def test_options_that_mean_nothing_are_refused(synthetic: Callable[..., Engine], options: str, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        synthetic("tiny-llama").generate([1], method=f"skipdecode:{options}")
