"""CALM: exits, tokens and scores by transformers with hooks, batches, rounds of the device, and what is not run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipjack import Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.runtime.errors import RequestError
from skipjack.runtime.request import Output

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 31)), [400, 3, 3, 17, 250, 8]]
LAYERS = 8
METHODS = [
    "calm:threshold=0.95,least=2",
    "calm:threshold=0.9,least=1,interval=3",
    "calm:threshold=0.05,measure=softmax,least=1",
    "calm:threshold=0.97,decay=4,length=16,least=1",
]


class Oracle:
    """A model of transformers in float64 whose tokens from `prompt` on leave it where the method says.

    What left a layer for the last time is handed on by the later ones, which take their keys and values from it: the
    state propagation of the paper, for layer by layer all tokens are there at once.
    """

    def __init__(self, model: Any, prompt: int, **options: str) -> None:
        self.model, self.prompt = model, prompt
        self.least, self.interval = int(options.get("least", LAYERS // 2)), int(options.get("interval", 1))
        self.threshold, self.softmax = float(options.get("threshold", 0.99)), options.get("measure") == "softmax"
        self.decay, self.length = float(options.get("decay", 0)), int(options.get("length", 128))
        self.nearest = math.inf
        for number, layer in enumerate(model.model.layers, 1):
            layer.register_forward_hook(self._left(number))

    def __call__(self, tokens: list[int]) -> tuple[Tensor, list[int]]:
        """Logits [T, V] and the layers each token ran."""
        self.ran = torch.full((len(tokens),), LAYERS)
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0]
        return logits, self.ran.tolist()

    def _left(self, number: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, entered: tuple[Tensor, ...], left: Tensor) -> Tensor:
            going = self.ran == LAYERS
            left = torch.where(going[None, :, None], left, entered[0])
            if number >= self.least and (number - self.least) % self.interval == 0 and number < LAYERS:
                for token in range(self.prompt, len(self.ran)):
                    sure, limit = self._sure(entered[0][0, token], left[0, token]), self._limit(token - self.prompt)
                    if going[token]:
                        self.nearest = min(self.nearest, abs(sure - limit))
                        self.ran[token] = number if sure >= limit else LAYERS
            return left

        return hook

    def _sure(self, entered: Tensor, left: Tensor) -> float:
        if not self.softmax:
            return float(entered @ left / (entered.norm() * left.norm()))
        first, second = self.model.lm_head(self.model.model.norm(left)).softmax(-1).sort(descending=True).values[:2]
        return float(first - second)

    def _limit(self, token: int) -> float:
        if not self.decay:
            return self.threshold
        return min(1, max(0, 0.9 * self.threshold + 0.1 * math.exp(-self.decay * token / self.length)))


@pytest.mark.parametrize("method", METHODS)
def test_exits_and_scores_are_those_of_transformers(tmp_path: Path, method: str) -> None:
    transformers = pytest.importorskip("transformers")
    write_synthetic(tmp_path / "m", "tiny-llama", 0, 0.3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64).eval()
    prompt, options = PROMPTS[2], dict(item.split("=") for item in method.partition(":")[2].split(","))
    oracle = Oracle(model, len(prompt), **options)
    with Engine.load(tmp_path / "m") as engine:
        output = engine.generate(prompt, SamplingParams(max_tokens=24, ignore_eos=True), method=method)
        (scored,) = engine.score([prompt], [output.token_ids], method=method)
    logits, ran = oracle(prompt + output.token_ids[:-1])
    assert oracle.nearest > 1e-6, "a confidence as near its threshold could go either way in float32"
    assert output.stats.layers_per_token == (LAYERS, *ran[len(prompt) :])
    assert len({*ran[len(prompt) :]}) > 1
    own = logits[len(prompt) - 1 :]
    assert output.token_ids == own.argmax(-1).tolist()
    expected = own.log_softmax(-1).gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0)
    assert output.stats.executed_skips == sum(2 * (LAYERS - layers) for layers in ran[len(prompt) :])
    assert not output.stats.lossless


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_batches_are_their_members_alone(
    synthetic: Callable[..., Engine], method: str, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    engine = synthetic("tiny-llama", dtype, max_sequences=3)
    params = SamplingParams(max_tokens=16, stop_token_ids=range(0, 512, 9), **fields)
    together = engine.generate(PROMPTS, params, method=method)
    alone = [engine.generate(prompt, params, method=method) for prompt in PROMPTS]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [layers(output) for output in together] == [layers(output) for output in alone]


def layers(output: Output) -> tuple[float, ...]:
    return output.stats.layers_per_token


def test_later_layers_do_not_run_and_no_hole_is_read(
    synthetic: Callable[..., Engine], audit: Callable[..., Any]
) -> None:
    engine = synthetic("tiny-llama", torch.float32, 0.3)
    watched = audit(engine)
    output = engine.generate(PROMPTS[2], SamplingParams(max_tokens=24, ignore_eos=True), method=METHODS[0])
    own = [sublayer for sublayer, rows in watched.ran if rows == 1]
    assert own == [sublayer for count in layers(output)[1:] for sublayer in range(2 * int(count))]
    assert len({*layers(output)[1:]}) > 1
    assert watched.reads > 100


@pytest.mark.parametrize("graphs", [False, True])
def test_no_head_is_read_for_a_token_that_has_left(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    with Engine(config, synthetic_weights(config, 0, torch.float32, 0.3), graphs=graphs) as engine:
        model, asked = engine._loaded()[0], 0
        predict = model.predict

        def watched(x: Tensor, top_k: int | None = None, **options: Any) -> Any:
            nonlocal asked
            active = options.get("active")
            asked += top_k == 2 and (len(x) if active is None else int(active.sum()))
            return predict(x, top_k, **options)

        monkeypatch.setattr(model, "predict", watched)
        params = SamplingParams(max_tokens=18, ignore_eos=True)
        output = engine.generate(PROMPTS[2], params, method="calm:threshold=0.05,measure=softmax,least=1")
    ran = layers(output)[1:]
    assert len({*ran}) > 1
    expected = sum(min(count, LAYERS - 1) for count in ran)
    # The device asks the first layer of everyone, also of those whom it runs beyond their last token.
    assert expected <= asked <= expected + (len(ran) if graphs else 0)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_rounds_of_the_device_are_those_of_the_host(
    told: Callable[[Output], Any], audit: Callable[..., Any], method: str, fields: dict[str, Any]
) -> None:
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    weights = synthetic_weights(config, 0, torch.float32, 0.3)
    host, device = (Engine(config, weights, graphs=alone) for alone in (False, True))
    audit(device)
    params = SamplingParams(max_tokens=14, stop_token_ids=range(0, 512, 13), **fields)
    for one, other in zip(*(engine.generate(PROMPTS, params, method=method) for engine in (device, host)), strict=True):
        assert told(one) == told(other)
        assert one.token_ids == other.token_ids
        assert one.stats.graph_rounds == one.stats.rounds
        assert (other.stats.rounds > 0, other.stats.graph_rounds) == (True, 0)


def test_a_threshold_that_nothing_reaches_leaves_the_model_whole(synthetic: Callable[..., Engine]) -> None:
    engine, params = synthetic("tiny-llama"), SamplingParams(max_tokens=8, ignore_eos=True)
    output = engine.generate(PROMPTS[0], params, method="calm:measure=softmax,threshold=1")
    assert output.token_ids == engine.generate(PROMPTS[0], params).token_ids
    assert output.stats.notes == ("nothing was skipped: every layer ran for every token",)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("threshold=1.5", "option threshold expects 0 to 1, got 1.5"),
        ("measure=entropy", "option measure expects state or softmax, got 'entropy'"),
        ("least=8", "option least expects 0 to 7, got 8"),
        ("interval=0", "option interval expects 1 to"),
        ("decay=-1", "option decay expects 0 to 1000, got -1.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(synthetic: Callable[..., Engine], options: str, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        synthetic("tiny-llama").generate([1], method=f"calm:{options}")
