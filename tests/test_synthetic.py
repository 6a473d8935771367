"""Synthetic models: the shapes are the real ones, the text wanders, and late_scale does what it says."""

from dataclasses import replace

import pytest
import torch
import transformers

from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import ConfigError
from skipjack.loaders.synthetic import NAMES, synthetic_config, synthetic_weights, write_synthetic
from skipjack.loaders.weights import load_weights

FAMILIES = [name for name in NAMES if name.startswith("tiny-")]
PEERS = [name for name in FAMILIES if name not in ("tiny-dmtd", "tiny-mindskip")]
ROUTED = "routed-tiny"


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more than they gain by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def config_of(name):
    return ModelConfig.parse(synthetic_config(name), name)


def parameters(config):
    weights = {"embedding": config.vocab_size * config.hidden_size}
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * config.hidden_size
    weights["layers"] = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    return sum(weights.values()) + (0 if config.tied_head else weights["embedding"])


@pytest.mark.parametrize(
    ("name", "millions"), [("135m", 134.5), ("1b", 1235.7), ("8b", 8030.0), ("4b", 4022.2), ("4b-dmtd", 4022.2)]
)
def test_sizes_are_those_of_the_models_they_stand_for(name, millions):
    assert parameters(config_of(name)) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"expected one of 135m, 1b, .* found 'huge'"):
        synthetic_config("huge")
    with pytest.raises(ConfigError, match="expected a Llama shape after routed-, found '4b'"):
        synthetic_config("routed-4b")


def test_routers_go_into_the_late_half_and_change_nothing_else():
    plain, routed = config_of("8b"), config_of("routed-8b")
    assert routed.routing.layers == tuple(range(16, 32))
    assert (routed.routing.router_width, routed.routing.adapter_width) == (4096 // 16, 14336 // 16)
    assert not routed.routing.trained
    assert replace(routed, model_type="llama", routing=None) == plain
    ours, theirs = (synthetic_weights(config_of(name), 0, torch.float32, 0.3) for name in (ROUTED, "tiny"))
    assert torch.equal(ours.qkv, theirs.qkv)
    assert torch.equal(ours.head, theirs.head)


@pytest.mark.parametrize("name", [*FAMILIES, ROUTED])
def test_on_disk_and_in_memory_are_the_same(tmp_path, name):
    write_synthetic(tmp_path / "m", name, seed=3, late_scale=0.5)
    config = ModelConfig.load(tmp_path / "m")
    assert config == config_of(name)
    from_disk = load_weights(tmp_path / "m", config, torch.float32)
    in_memory = synthetic_weights(config, 3, torch.float32, late_scale=0.5)
    for field, tensor in vars(in_memory).items():
        assert (tensor is None) == (getattr(from_disk, field) is None), field
        assert tensor is None or torch.equal(tensor, getattr(from_disk, field)), field
    other = synthetic_weights(config, 4, torch.float32)
    assert not torch.equal(other.qkv, in_memory.qkv)


@pytest.mark.parametrize("name", PEERS)
def test_greedy_text_wanders(tmp_path, name):
    write_synthetic(tmp_path / "m", name, seed=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokens, gaps = [5, 9, 100, 44, 17, 301], []
    for _ in range(48):
        values, ids = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        gaps.append((values[0] - values[1]).item())
        tokens.append(ids[0].item())
    assert len(set(tokens[6:])) >= 6
    assert sorted(gaps)[24] > 0.1


def agreement(folder, name, late_scale):
    write_synthetic(folder, name, seed=0, late_scale=late_scale)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(1))
    full = model(tokens).logits.argmax(-1)
    model.model.layers = model.model.layers[: len(model.model.layers) // 2]
    return (model(tokens).logits.argmax(-1) == full).float().mean().item()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_late_scale_sets_the_agreement_of_an_early_exit(tmp_path, name):
    rates = [agreement(tmp_path / str(scale), name, scale) for scale in (0.0, 0.1, 0.3, 1.0)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert 0.75 < rates[1] < 0.92
    assert 0.45 < rates[2] < 0.68
    assert rates[3] < 0.25
