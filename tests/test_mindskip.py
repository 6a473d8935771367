"""MindSkip: the published decisions and tokens, once for every sequence, and attention that is really not computed."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from skipjack import Engine, SamplingParams
from skipjack.loaders.attention_routing import AttentionRouting
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import CheckpointError, ConfigError
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime import prefill
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods import mindskip
from skipjack.runtime.model import Model

CASES = ["mindskip-1", "mindskip-2"]
SHAPE = "tiny-mindskip"
PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50)), [400, 3, 3, 90, 41], [77, 78]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = ModelConfig.parse(synthetic_config(SHAPE), SHAPE)
    return Engine(config, synthetic_weights(config, 1, torch.float32), method="mindskip")


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_decisions_are_those_of_the_conformance_case(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())
    with Engine.load(golden / case, method="mindskip") as engine:
        for run in expected["runs"]:
            params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
            output = engine.generate(run["prompt_ids"], params)
            assert output.token_ids == run["token_ids"]
            (decided,) = output.stats.events
            assert decided["skip_attention"] == run["attention_skipped_layers"]
            assert decided["router_logits"] == pytest.approx(list(run["router_logits"].values()), abs=1e-4)
            layers = expected["model"]["num_hidden_layers"] - len(run["attention_skipped_layers"]) / 2
            assert output.stats.layers_per_token == (layers,) * run["max_new_tokens"]
            assert not output.stats.lossless


def teacher(engine: Engine, tokens: list[int], prompt: int) -> tuple[list[int], list[float], torch.Tensor]:
    """Skipped layers, router logits and logits [T, V], in float64 over all tokens at once, decided on the prompt's."""
    config = ModelConfig.parse(synthetic_config(SHAPE), SHAPE)
    weights = synthetic_weights(config, 1, torch.float32)
    w = {name: tensor.double() for name, tensor in vars(weights).items() if tensor is not None}
    heads, kv, dim, count = config.num_heads, config.num_kv_heads, config.head_dim, len(tokens)
    frequency = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(count, dtype=torch.float64), frequency)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x, skipped, logits = w["embedding"][tokens], list[int](), list[float]()
    assert config.attention_routing is not None
    for layer in range(config.num_layers):
        z, runs = norm(x, w["attention_norm"][layer]), True
        if layer in config.attention_routing.layers:
            place = config.attention_routing.layers.index(layer)
            logits.append(float(z[:prompt].mean(0) @ w["attention_router"][place, 0]))
            runs = logits[-1] >= 0
        if runs:
            q, k, v = (z @ w["qkv"][layer].T).view(count, -1, dim).split([heads, kv, kv], 1)
            k, v = (part.repeat_interleave(heads // kv, 1) for part in (turn(k), v))
            q, k, v = (part.transpose(0, 1) for part in (turn(q), k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(0, 1).flatten(1) @ w["output"][layer].T
        else:
            skipped.append(layer)
        gate, up = (norm(x, w["mlp_norm"][layer]) @ w["up"][layer].T).chunk(2, -1)
        x = x + (functional.silu(gate) * up) @ w["down"][layer].T
    return skipped, logits, norm(x, w["norm"]) @ w["head"].T


def test_a_float64_teacher_agrees(engine: Engine) -> None:
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))
    decisions: set[tuple[int, ...]] = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        skipped, logits, scores = teacher(engine, prompt + output.token_ids[:-1], len(prompt))
        (decided,) = output.stats.events
        assert decided["skip_attention"] == skipped
        assert decided["router_logits"] == pytest.approx(logits, abs=1e-4)
        assert scores[len(prompt) - 1 :].argmax(-1).tolist() == output.token_ids
        decisions.add(tuple(skipped))
    assert len(decisions) >= 3, "sequences of a batch must differ for this test to say something"


def test_the_mean_is_taken_over_the_whole_prompt_however_it_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [(37 * i) % 500 + 3 for i in range(150)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    whole = engine.generate(prompt, params)
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 64)
    parts = engine.generate(prompt, params)
    assert parts.token_ids == whole.token_ids
    assert parts.stats.events[0]["skip_attention"] == whole.stats.events[0]["skip_attention"]
    skipped, logits, _ = teacher(engine, prompt, len(prompt))
    assert parts.stats.events[0]["router_logits"] == pytest.approx(logits, abs=1e-4)
    assert parts.stats.events[0]["skip_attention"] == skipped


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batched_ids_are_those_of_each_prompt_alone(engine: Engine, temperature: float) -> None:
    params = SamplingParams(max_tokens=10, temperature=temperature, seed=3, ignore_eos=True)
    together = engine.generate(PROMPTS, params)
    alone = [engine.generate(prompt, params) for prompt in PROMPTS]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert len({output.stats.events[0]["router_logits"][0] for output in together}) == len(PROMPTS)


def test_skipped_attention_is_not_computed_and_leaves_no_keys(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = engine._loaded()
    rows: Counter[int] = Counter()
    linear = model.ops.linear
    output = {id(layer.output): number for number, layer in enumerate(model.layers)}

    def spy(x, weight, *, active=None, residual=None, **how):
        if id(weight) in output and active is not None:
            rows[output[id(weight)]] += int(active.sum())
        return linear(x, weight, active=active, residual=residual, **how)

    monkeypatch.setattr(model, "ops", replace(model.ops, linear=spy))
    reserved: list[list[int]] = []
    reserve = type(cache).reserve
    monkeypatch.setattr(type(cache), "reserve", lambda *given: reserved.append(reserve(*given)[:]) or given[-1])
    prompt, tokens = PROMPTS[2], 5
    result = engine.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))
    skipped = set(result.stats.events[0]["skip_attention"])
    assert skipped
    read = model.ops.filled(len(prompt), model.ops.prefill_tile, model.dtype)
    for layer in range(8):
        assert rows[layer] == (0 if layer in skipped else read + tokens - 1)
        written = cache.keys[layer, reserved[0]].abs().sum() + cache.values[layer, reserved[0]].abs().sum()
        assert bool(written) == (layer not in skipped)
    assert result.stats.executed_skips == len(skipped) * (tokens - 1)


def test_no_host_waits_for_a_decision_before_the_last_layer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    step, ints = Model.step, mindskip.ints
    monkeypatch.setattr(Model, "step", lambda self, *a: order.append("step") or step(self, *a))
    monkeypatch.setattr(mindskip, "ints", lambda tensor: order.append("wait") or ints(tensor))
    engine.generate(PROMPTS[0], SamplingParams(max_tokens=1))
    assert order[:17] == ["step"] * 16 + ["wait"]


def test_sharded_checkpoints_and_qwen2_load(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    for model_type in ("llama_mindskip", "qwen2_mindskip"):
        fields = synthetic_config(SHAPE) | {"model_type": model_type}
        config = ModelConfig.parse(fields, "config.json")
        tensors = checkpoint_tensors(synthetic_weights(config, 1, torch.float32), config)
        assert tensors["model.layers.4.router.weight"].shape == (1, 64)
        assert ("model.layers.0.self_attn.q_proj.bias" in tensors) == (model_type == "qwen2_mindskip")
        save_checkpoint(tmp_path / model_type, fields, tensors)
        save_checkpoint(tmp_path / f"{model_type}-shards", fields, tensors, max_shard_bytes=200_000)
        assert len(list((tmp_path / f"{model_type}-shards").glob("*.safetensors"))) > 2
        ids = []
        for folder in (model_type, f"{model_type}-shards"):
            with Engine.load(tmp_path / folder, method="mindskip") as engine:
                ids.append([output.token_ids for output in engine.generate(PROMPTS, params)])
        assert ids[0] == ids[1]


def test_a_checkpoint_and_its_method_belong_together(
    tmp_path: Path, synthetic: Callable[..., Engine], engine: Engine
) -> None:
    write_synthetic(tmp_path / "m", SHAPE, seed=1)
    for method in ("autoregressive", "swift", "static:skip=1", "shortgpt"):
        with pytest.raises(RequestError, match=f"expected mindskip, which a llama_mindskip .* for, got {method[:6]}"):
            Engine.load(tmp_path / "m", method=method)
        with pytest.raises(RequestError, match="expected mindskip"):
            engine.generate([1], method=method)
    with pytest.raises(RequestError, match="mindskip: expected model_type llama_mindskip or qwen2_mindskip, got llama"):
        synthetic("tiny").generate([1], method="mindskip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.4.router.weight"),
            r"layers\.4\.router\.weight: expected shape \[1, 64\], found",
        ),
        (
            lambda t: t.update({"model.layers.4.router.weight": torch.zeros(2, 64)}),
            r"layers\.4\.router\.weight: expected shape \[1, 64\] by config\.json, found \[2, 64\]",
        ),
        (
            lambda t: t.update({"model.layers.0.router.weight": torch.zeros(1, 64)}),
            r"layers\.0\.router\.weight': expected no such tensor in a llama_mindskip model",
        ),
    ],
)
def test_wrong_router_tensors_are_named(tmp_path: Path, change: Callable, message: str) -> None:
    fields = synthetic_config(SHAPE)
    config = ModelConfig.parse(fields, "config.json")
    tensors = checkpoint_tensors(synthetic_weights(config, 1, torch.float32), config)
    change(tensors)
    save_checkpoint(tmp_path / "m", fields, tensors)
    with pytest.raises(CheckpointError, match=message):
        Engine.load(tmp_path / "m", method="mindskip")


def test_the_configuration_is_read() -> None:
    config = ModelConfig.parse(synthetic_config(SHAPE), "config.json")
    assert config.attention_routing == AttentionRouting((3, 4, 5, 6), 0.5)
    first = ModelConfig.parse(synthetic_config(SHAPE) | {"granularity": "sequence", "threshold": 0.3}, "config.json")
    assert first.attention_routing == AttentionRouting((3, 4, 5, 6), 0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_mindskip": None}, "is_mindskip: expected a list of 8 booleans, at least one of them true, found None"),
        ({"is_mindskip": [True] * 7}, "is_mindskip: expected a list of 8 booleans"),
        ({"is_mindskip": [False] * 8}, "is_mindskip: expected a list of 8 booleans, at least one"),
        ({"is_mindskip": [1] * 8}, "is_mindskip: expected a list of 8 booleans"),
        ({"granularity": "mlp_sequence"}, "granularity: expected attn_sequence or sequence .* found 'mlp_sequence'"),
        ({"threshold": 1.5}, "threshold: expected a number from 0 to 1, found 1.5"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: expected LlamaMindSkipForCausalLM"),
    ],
)
def test_configuration_fields_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse(synthetic_config(SHAPE) | fields, "config.json")
