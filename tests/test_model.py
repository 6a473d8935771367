"""The forward pass against transformers, and a verify pass against decode passes, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipjack import Engine
from skipjack.kernels.ops import TORCH
from skipjack.kernels.values import Matrix, Norm
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import load_weights
from skipjack.runtime.cache import KVCache
from skipjack.runtime.model import Model
from skipjack.runtime.rows import Chains, Rows, one_sequence

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 131,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied-biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 1000.0}),
    "llama3-rope": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0, "head_dim": 16}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN, "head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 24}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "bloom": ("Bloom", {"n_head": 4, "n_layer": 4}),
    "bloom-odd-heads": ("Bloom", {"n_head": 5, "n_layer": 4}),
}


def build(family: str, folder: Path) -> torch.nn.Module:
    name, extra = FAMILIES[family]
    fields = TINY | {"rope_theta": 1e4} | extra
    if name == "Bloom":
        fields = {"vocab_size": 131, "hidden_size": 40, "seq_length": 1024} | extra
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5) + (parameter.dim() == 1)
            )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    peer = build(family, tmp_path)
    config = ModelConfig.load(tmp_path)
    model = Model(config, load_weights(tmp_path, config, torch.float32), TORCH)
    cache = model.new_cache(4)
    tokens = torch.randint(0, 131, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    pages = cache.reserve(320)
    with torch.inference_mode():
        expected = peer(torch.tensor([tokens])).logits[0].double()
        prefill = model.forward(
            one_sequence(tokens[:290], 0, pages, TORCH.prefill_tile, model.device), cache, model.full
        )
        decode = model.forward(
            one_sequence(tokens[290:], 290, pages, TORCH.decode_tile, model.device), cache, model.full
        )
        got = model.logits(torch.cat([prefill, decode])).double()
    assert (got - expected).abs().max() / expected.std() < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-smollm3", "tiny-bloom"])
def test_verify_rows_equal_decode_rows(synthetic: Callable[..., Engine], shape: str, dtype: torch.dtype) -> None:
    model, _ = synthetic(shape, dtype)._loaded()
    tokens = torch.randint(3, 500, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = model.new_cache(6)

    def run(count: int) -> Tensor:
        """The rows from 240 on, `count` at a time: across a page boundary."""
        pages = cache.reserve(300)
        model.forward(one_sequence(tokens[:240], 0, pages, TORCH.prefill_tile, model.device), cache, model.full)
        parts = [
            model.forward(
                one_sequence(tokens[at : at + count], at, pages, TORCH.decode_tile, model.device), cache, model.full
            )
            for at in range(240, 300, count)
        ]
        written = torch.stack([cache.keys[:, pages], cache.values[:, pages]])
        cache.release(pages)
        return torch.cat([model.logits(torch.cat(parts)).flatten(), written[..., :300, :].flatten()])

    with torch.inference_mode():
        alone = run(1)
        for count in (2, 5, 8, 9, 20):
            assert torch.equal(run(count), alone)


def test_a_prompt_does_not_depend_on_how_it_is_chunked(synthetic: Callable[..., Engine]) -> None:
    model, _ = synthetic("tiny-llama")._loaded()
    tokens = torch.randint(3, 500, (500,), generator=torch.Generator().manual_seed(3)).tolist()
    cache, tile = model.new_cache(4), TORCH.prefill_tile
    with torch.inference_mode():
        first, second = cache.reserve(500), cache.reserve(500)
        whole = model.forward(one_sequence(tokens, 0, first, tile, model.device), cache, model.full)
        parts = [
            model.forward(one_sequence(tokens[at : at + 2 * tile], at, second, tile, model.device), cache, model.full)
            for at in range(0, 500, 2 * tile)
        ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_skipped_sublayer_is_the_identity(synthetic: Callable[..., Engine]) -> None:
    """With everything skipped, the stream is the embedding; skipping attention writes no keys."""
    model, _ = synthetic("tiny-llama")._loaded()
    cache = model.new_cache(2)
    pages = cache.reserve(40)
    layers = range(model.config.num_layers)
    rows = one_sequence(list(range(20)), 0, pages, TORCH.decode_tile, model.device)
    with torch.inference_mode():
        nothing = model.forward(rows, cache, model.full.without(attention=layers, mlp=layers))
        assert torch.equal(nothing, model._embedding[:20])
        assert cache.keys[:, pages].eq(0).all()
        model.forward(rows, cache, model.full.without(attention=[2, 3]))
        written = cache.keys[:, pages].ne(0).flatten(1).any(dim=1)
        assert written.tolist() == [i not in (2, 3) for i in layers]


def test_padding_rows_touch_no_sequence(synthetic: Callable[..., Engine]) -> None:
    model, _ = synthetic("tiny-llama")._loaded()
    cache: KVCache = model.new_cache(4)
    pages = cache.reserve(300)
    before = cache.keys[:, pages].clone()
    rows = Rows(
        torch.tensor([5, 6, 7]), torch.tensor([0, 0, 0]), torch.tensor([-1, -1, -1]), torch.tensor([pages]), tile=8
    )
    with torch.inference_mode():
        model.forward(rows, cache, model.full)
    assert torch.equal(cache.keys[:, pages], before)


def test_the_output_of_attention_is_told_what_the_plan_reads_next(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.parse(synthetic_config("tiny-llama") | {"num_hidden_layers": 4}, "tiny")
    model = Model(config, synthetic_weights(config, 0, torch.float32), TORCH)
    told: list[tuple[int, Matrix]] = []

    def linear(x: Tensor, weight: Matrix, *, ahead: Any = None, **rest: Any) -> Tensor:
        told.extend((number, ahead) for number, layer in enumerate(model.layers) if weight is layer.output)
        return TORCH.linear(x, weight, **rest)

    monkeypatch.setattr(model, "ops", replace(TORCH, linear=linear))
    plan = model.full.without(mlp=[0, 3], attention=[1])
    cache = model.new_cache(2)
    model.forward(one_sequence([5, 6], 0, cache.reserve(2), TORCH.decode_tile, model.device), cache, plan)
    up = [layer.up for layer in model.layers]
    assert [number for number, _ in told] == [0, 2, 3]
    assert [ahead for _, ahead in told[:2]] == [up[1], up[2]]
    assert (told[2][1].rows, told[2][1].data.nbytes) == (0, 0), "nothing that is known, where a kernel needs a weight"


@pytest.mark.parametrize(("shape", "fields"), [("tiny-llama", {}), ("routed-tiny", {"routing_layers": [1, 2]})])
def test_which_rows_run_is_said_to_be_settled_once_a_kernel_has_been_launched_since(
    monkeypatch: pytest.MonkeyPatch, shape: str, fields: dict[str, Any]
) -> None:
    """Before that, and of what a router has just decided, a kernel that does not wait may read what was not written."""
    config = ModelConfig.parse(synthetic_config(shape) | {"num_hidden_layers": 3} | fields, shape)
    model = Model(config, synthetic_weights(config, 0, torch.float32), TORCH)
    said: list[tuple[str, bool]] = []
    names = {
        id(weight): f"{name} {number}"
        for number, layer in enumerate(model.layers)
        for name, weight in (("qkv", layer.qkv), ("output", layer.output), ("up", layer.up), ("down", layer.down))
    }

    def linear(x: Tensor, weight: Matrix, *, settled: bool = False, **rest: Any) -> Tensor:
        said.append((names.get(id(weight), "adapter"), settled))
        return TORCH.linear(x, weight, **rest)

    def qkv(x: Tensor, norm: Norm, weight: Matrix, *given: Any, settled: bool = False, **rest: Any) -> Tensor:
        said.append((names[id(weight)], settled))
        return TORCH.qkv_rope_append(x, norm, weight, *given, **rest)

    monkeypatch.setattr(model, "ops", replace(TORCH, linear=linear, qkv_rope_append=qkv))
    cache = model.new_cache(2)
    table, first = torch.tensor([cache.reserve(2)]), torch.tensor([0])
    mask = torch.tensor([True, False, True, True, False, True])
    rows = Chains(first[:, None] + 5, first, None, torch.tensor([True]), table, 8, gated=True, mask=mask)
    model.forward(rows, cache, model.full)
    late = {name for name, settled in said if not settled}
    routed = [number for number in range(3) if number in model.routed]
    assert late == {"qkv 0", *(f"qkv {number}" for number in routed)}
    assert len(said) >= 12
    if routed:
        said.clear()
        model.forward(rows, cache, model.full.without(attention=[routed[0]]))
        first = next(place for place, (name, _) in enumerate(said) if name == "adapter")
        assert [now for _, now in said[first : first + 3]] == [False, True, True], (
            "the router's own attention was left out"
        )
