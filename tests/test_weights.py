"""Weights against transformers' own state dictionaries, reassembled here by hand."""

import json
import math
import re
from dataclasses import fields

import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file

from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import CheckpointError
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.weights import Weights, checkpoint_tensors, load_weights

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("llama", SMALL),
    "llama-biased": ("llama", SMALL | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-tied": ("llama", SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", SMALL),
    "qwen2": ("qwen2", SMALL),
    "qwen3": ("qwen3", SMALL | {"head_dim": 16}),
    "smollm3": ("smollm3", SMALL),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50}),
}


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    model_type, config = MODELS[request.param]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return folder, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def by_hand(state, config):
    """The fused layout, from the state dictionary and the layer's arithmetic in transformers."""
    layers = range(config.num_layers)
    if config.model_type == "bloom":
        lead = "transformer."

        def stack(pattern):
            return torch.stack([state[f"{lead}h.{layer}.{pattern}"] for layer in layers])

        def unfused(kind):
            parts = {"q": [], "k": [], "v": []}
            for layer in layers:
                fused = state[f"{lead}h.{layer}.self_attention.query_key_value.{kind}"]
                for part, (_, rows) in enumerate(parts.items()):
                    heads = [
                        fused[(3 * head + part) * config.head_dim :][: config.head_dim]
                        for head in range(config.num_heads)
                    ]
                    rows.append(torch.cat(heads))
            return torch.stack([torch.cat([parts[name][layer] for name in "qkv"]) for layer in layers])

        return {
            "embedding": state[f"{lead}word_embeddings.weight"],
            "embedding_norm": state[f"{lead}word_embeddings_layernorm.weight"],
            "embedding_norm_bias": state[f"{lead}word_embeddings_layernorm.bias"],
            "attention_norm": stack("input_layernorm.weight"),
            "attention_norm_bias": stack("input_layernorm.bias"),
            "qkv": unfused("weight"),
            "qkv_bias": unfused("bias"),
            "output": stack("self_attention.dense.weight"),
            "output_bias": stack("self_attention.dense.bias"),
            "mlp_norm": stack("post_attention_layernorm.weight"),
            "mlp_norm_bias": stack("post_attention_layernorm.bias"),
            "up": stack("mlp.dense_h_to_4h.weight"),
            "up_bias": stack("mlp.dense_h_to_4h.bias"),
            "down": stack("mlp.dense_4h_to_h.weight"),
            "down_bias": stack("mlp.dense_4h_to_h.bias"),
            "norm": state[f"{lead}ln_f.weight"],
            "norm_bias": state[f"{lead}ln_f.bias"],
            "head": state["lm_head.weight"],
        }

    def rows(*patterns):
        if f"model.layers.0.{patterns[0]}" not in state:
            return None
        return torch.stack([torch.cat([state[f"model.layers.{n}.{pattern}"] for pattern in patterns]) for n in layers])

    attention = "self_attn."
    return {
        "embedding": state["model.embed_tokens.weight"],
        "attention_norm": rows("input_layernorm.weight"),
        "qkv": rows(*(f"{attention}{part}_proj.weight" for part in "qkv")),
        "qkv_bias": rows(*(f"{attention}{part}_proj.bias" for part in "qkv")),
        "q_norm": rows(f"{attention}q_norm.weight"),
        "k_norm": rows(f"{attention}k_norm.weight"),
        "output": rows(f"{attention}o_proj.weight"),
        "output_bias": rows(f"{attention}o_proj.bias"),
        "mlp_norm": rows("post_attention_layernorm.weight"),
        "up": rows("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "up_bias": rows("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        "down": rows("mlp.down_proj.weight"),
        "down_bias": rows("mlp.down_proj.bias"),
        "norm": state["model.norm.weight"],
        "head": state["lm_head.weight"],
    }


def assert_same(left: Weights, right: Weights):
    for field in fields(Weights):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        assert (ours is None) == (theirs is None), field.name
        assert ours is None or torch.equal(ours, theirs), field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_transformers(model, dtype):
    folder, state = model
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config, dtype)
    expected = by_hand(state, config)
    for field in fields(Weights):
        ours, theirs = getattr(weights, field.name), expected.get(field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            assert ours.dtype == dtype
            assert torch.equal(ours, theirs.to(dtype)), field.name
    assert (weights.head is weights.embedding) == config.tied_head


def test_sharded_equals_single(model, tmp_path):
    folder, _ = model
    config = ModelConfig.load(folder)
    single = load_weights(folder, config, torch.float32)
    save_checkpoint(tmp_path / "m", {}, load_file(folder / "model.safetensors"), max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*"))) > 2
    assert_same(load_weights(tmp_path / "m", config, torch.float32), single)


def test_written_weights_load_in_transformers(model, tmp_path):
    folder, state = model
    config = ModelConfig.load(folder)
    tensors = checkpoint_tensors(load_weights(folder, config, torch.float32), config)
    save_checkpoint(tmp_path / "m", json.loads((folder / "config.json").read_text()), tensors)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_progress_counts_bytes(model):
    folder, _ = model
    calls = []
    load_weights(folder, ModelConfig.load(folder), torch.float32, lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


def rewritten(folder, target, change):
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def some_layer_tensor(tensors):
    return next(name for name in sorted(tensors) if re.search(r"\.1\..*mlp.*weight", name))


def test_a_missing_tensor_is_named(model, tmp_path):
    folder, _ = model
    missing = []
    target = rewritten(folder, tmp_path / "m", lambda t: missing.append(t.pop(some_layer_tensor(t))))
    with pytest.raises(CheckpointError, match=r"m: \S+mlp\S+weight: expected shape \[\d+, \d+\], found no such tensor"):
        load_weights(target, ModelConfig.load(folder), torch.float32)


def test_a_left_over_tensor_is_named(model, tmp_path):
    folder, _ = model

    def add(tensors):
        tensors["model.layers.1.router.weight"] = torch.zeros(2, 3)
        tensors["model.layers.2.router.weight"] = torch.zeros(2, 3)

    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.router\.weight'.*found shape \[2, 3\] and 1 more"):
        load_weights(rewritten(folder, tmp_path / "m", add), ModelConfig.load(folder), torch.float32)


def test_a_wrong_shape_is_named(model, tmp_path):
    folder, _ = model

    def cut(tensors):
        name = some_layer_tensor(tensors)
        tensors[name] = tensors[name][:-1].contiguous()

    with pytest.raises(CheckpointError, match=r"m/model\.safetensors: \S+mlp\S+: expected shape \[.*\] by .* found \["):
        load_weights(rewritten(folder, tmp_path / "m", cut), ModelConfig.load(folder), torch.float32)


def test_an_integer_tensor_is_refused(model, tmp_path):
    folder, _ = model

    def quantise(tensors):
        name = some_layer_tensor(tensors)
        tensors[name] = tensors[name].to(torch.int8)

    with pytest.raises(CheckpointError, match=r"dtype: expected one of F64, F32, F16, BF16, found I8"):
        load_weights(rewritten(folder, tmp_path / "m", quantise), ModelConfig.load(folder), torch.float32)


def test_a_number_that_is_none_is_named(model, tmp_path):
    folder, _ = model
    config = ModelConfig.load(folder)
    plain = checkpoint_tensors(load_weights(folder, config, torch.float32), config)
    for name in plain:
        spoilt = {other: tensor.clone() for other, tensor in plain.items()}
        spoilt[name].view(-1)[-1] = math.nan
        save_file({key: tensor.contiguous() for key, tensor in spoilt.items()}, tmp_path / "model.safetensors")
        with pytest.raises(
            CheckpointError, match=rf"s: {re.escape(name)}: expected finite numbers in float32, found nan"
        ):
            load_weights(tmp_path, config, torch.float32)


def test_numbers_beyond_the_dtype_are_named(model, tmp_path):
    folder, _ = model
    wide = []

    def widen(tensors):
        wide.append(some_layer_tensor(tensors))
        tensors[wide[0]][0, 0] = -70_000.0

    config, target = ModelConfig.load(folder), rewritten(folder, tmp_path / "m", widen)
    load_weights(target, config, torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"s: {re.escape(wide[0])}: .*float16, found -inf to"):
        load_weights(target, config, torch.float16)


def test_a_tied_embedding_may_have_the_name_of_the_head(tmp_path):
    """transformers' tie is symmetric, and some writers keep the first of two names: lm_head is before model."""
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODELS["llama-tied"][1]))
    oracle.save_pretrained(tmp_path / "m")
    config = ModelConfig.load(tmp_path / "m")
    expected = load_weights(tmp_path / "m", config, torch.float32)
    target = rewritten(
        tmp_path / "m", tmp_path / "n", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})
    )
    (target / "config.json").write_bytes((tmp_path / "m" / "config.json").read_bytes())
    (target / "model.safetensors").write_bytes(save(load_file(target / "model.safetensors"), {"format": "pt"}))
    again = transformers.LlamaForCausalLM.from_pretrained(target)
    assert torch.equal(again.model.embed_tokens.weight, oracle.model.embed_tokens.weight)
    assert_same(load_weights(target, config, torch.float32), expected)


@pytest.mark.parametrize("other", ["values", "shape"])
def test_a_tied_head_of_its_own_is_refused(other, tmp_path):
    """Libraries disagree: transformers 4 took the embedding for the head, transformers 5 takes the head."""
    folder = tmp_path / "tied"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODELS["llama-tied"][1])).save_pretrained(folder)
    config = ModelConfig.load(folder)

    def add(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1
        tensors["lm_head.weight"] = head if other == "values" else head[:-1].clone()

    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: expected a copy of model\.embed_tokens\.weight, because"
    ):
        load_weights(rewritten(folder, tmp_path / "m", add), config, torch.float32)


def test_known_extras_decide_nothing(model, tmp_path):
    folder, _ = model
    config = ModelConfig.load(folder)
    expected = load_weights(folder, config, torch.float32)

    def add(tensors):
        if config.model_type == "bloom":
            tensors["transformer.h.0.self_attention.masked_bias"] = torch.zeros(1)
        else:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        if config.tied_head:
            embedding = next(
                name for name in tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))
            )
            tensors["lm_head.weight"] = tensors[embedding].clone()

    assert_same(load_weights(rewritten(folder, tmp_path / "m", add), config, torch.float32), expected)


def test_an_untied_head_must_be_there(tmp_path):
    config = ModelConfig.parse(SMALL | {"model_type": "llama"}, "config.json")
    save_file({"model.embed_tokens.weight": torch.zeros(50, 32), "x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected shape \[32\], found no such tensor"):
        load_weights(tmp_path, config, torch.float32)


def test_bloom_without_the_prefix(tmp_path):
    torch.manual_seed(1)
    oracle = transformers.BloomForCausalLM(transformers.BloomConfig(**MODELS["bloom"][1]))
    oracle.save_pretrained(tmp_path / "m")
    config = ModelConfig.load(tmp_path / "m")
    oracle.transformer.save_pretrained(tmp_path / "bare")
    assert "word_embeddings.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    bare = load_weights(tmp_path / "bare", ModelConfig.load(tmp_path / "bare"), torch.float32)
    assert_same(bare, load_weights(tmp_path / "m", config, torch.float32))


def test_shapes_are_compared_before_memory_is_taken(tmp_path):
    huge = SMALL | {"model_type": "llama", "intermediate_size": 1 << 20, "vocab_size": 1 << 24}
    huge |= {"hidden_size": 1 << 20, "head_dim": 4096}
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="found no such tensor"):
        load_weights(tmp_path, ModelConfig.parse(huge, "config.json"), torch.float32)
