"""ModelConfig against the values transformers gives, and every refusal by file and field."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from skipjack.loaders.config import Cycle, ModelConfig, RopeScaling
from skipjack.loaders.errors import ConfigError

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
CASES = [
    ("llama", SMALL),
    ("llama", SMALL | {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    ("llama", SMALL | {"num_key_value_heads": None, "rope_parameters": LLAMA3, "eos_token_id": [7, 9]}),
    ("llama", SMALL | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}),
    ("mistral", SMALL),
    ("mistral", SMALL | {"sliding_window": None}),
    ("mistral", SMALL | {"sliding_window": 7, "head_dim": 24, "hidden_act": "swish"}),
    ("qwen2", SMALL),
    ("qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    ("qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 6}),
    ("qwen3", SMALL),
    ("qwen3", SMALL | {"attention_bias": True, "head_dim": 16, "use_sliding_window": True, "max_window_layers": 4}),
    ("qwen3", SMALL | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    ("smollm3", SMALL),
    ("smollm3", SMALL | {"no_rope_layers": [1, 0, 1, 1, 0, 1], "attention_bias": True}),
    ("smollm3", SMALL | {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 3}),
    ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100}),
    ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 100, "layer_norm_epsilon": 1e-3}),
]


def saved(folder: Path, model_type: str, fields: dict) -> transformers.PretrainedConfig:
    oracle = transformers.AutoConfig.for_model(model_type, pad_token_id=0, **fields)
    oracle.architectures = [f"{type(oracle).__name__.removesuffix('Config')}ForCausalLM"]
    oracle.save_pretrained(folder)
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_families_agree_with_transformers(tmp_path, model_type, fields):
    oracle = saved(tmp_path, model_type, fields)
    config = ModelConfig.load(tmp_path)
    layers = oracle.num_hidden_layers
    assert config.model_type == model_type
    assert config.vocab_size == oracle.vocab_size
    assert config.hidden_size == oracle.hidden_size
    assert config.num_layers == layers
    assert config.num_heads == oracle.num_attention_heads
    assert config.tied_head == oracle.tie_word_embeddings
    eos = oracle.eos_token_id if isinstance(oracle.eos_token_id, list) else [oracle.eos_token_id]
    assert config.eos_token_ids == tuple(token for token in eos if token is not None and token < oracle.vocab_size)
    if model_type == "bloom":
        assert config.norm_eps == oracle.layer_norm_epsilon
        assert config.num_kv_heads == oracle.n_head
        assert config.intermediate_size == 4 * oracle.hidden_size
        assert (config.alibi, config.layer_norm, config.gated, config.embedding_norm) == (True, True, False, True)
        assert not any(config.rope_layers)
        return
    assert config.intermediate_size == oracle.intermediate_size
    assert config.num_kv_heads == oracle.num_key_value_heads
    head_dim = getattr(oracle, "head_dim", None) or oracle.hidden_size // oracle.num_attention_heads
    assert config.head_dim == head_dim
    assert config.max_context == oracle.max_position_embeddings
    assert config.norm_eps == oracle.rms_norm_eps
    assert config.gated
    assert config.rope_theta == oracle.rope_parameters["rope_theta"]
    assert config.rope_scaling.kind == oracle.rope_parameters["rope_type"]
    for ours, theirs in {"factor": "factor", "original_max_position": "original_max_position_embeddings"}.items():
        assert getattr(config.rope_scaling, ours) == oracle.rope_parameters.get(theirs, getattr(RopeScaling(), ours))


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_switches_agree_with_the_modules_transformers_builds(tmp_path, model_type, fields):
    oracle = saved(tmp_path, model_type, fields)
    config = ModelConfig.load(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(oracle)
    names = set(model.state_dict())
    if model_type == "bloom":
        assert any(name.endswith("query_key_value.bias") for name in names)
        return
    assert config.qkv_bias == any(name.endswith("q_proj.bias") for name in names)
    assert config.output_bias == any(name.endswith("o_proj.bias") for name in names)
    assert config.mlp_bias == any(name.endswith("up_proj.bias") for name in names)
    assert config.qk_norm == any(name.endswith("q_norm.weight") for name in names)
    attention = [layer.self_attn for layer in model.model.layers]
    assert config.rope_layers == tuple(bool(getattr(module, "use_rope", True)) for module in attention)
    if model_type == "llama":
        windows = [None] * config.num_layers
    elif model_type == "mistral":
        windows = [oracle.sliding_window] * config.num_layers
    else:
        windows = [module.sliding_window for module in attention]
    assert [config.window if slides else None for slides in config.window_layers] == windows


YARN = {"rope_type": "yarn", "factor": 4.0}
OLD_LLAMA = SMALL | {"model_type": "llama", "rope_theta": 500000.0}


def test_rope_fields_of_before_and_after_transformers_5():
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    before = ModelConfig.parse(OLD_LLAMA | {"rope_scaling": scaling}, "config.json")
    after = ModelConfig.parse(SMALL | {"model_type": "llama", "rope_parameters": LLAMA3}, "config.json")
    assert before == after
    assert before.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    older = ModelConfig.parse(OLD_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}, "config.json")
    assert older.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_embed": 64, "num_attention_heads": 4, "n_layer": 2, "seq_length": 512}, 512),
        ({"hidden_size": 64, "n_head": 4, "num_hidden_layers": 2, "n_positions": 99}, 99),
        ({"hidden_size": 64, "n_head": 4, "n_layer": 2}, 2048),
    ],
)
def test_bloom_aliases_and_context(fields, expected):
    config = ModelConfig.parse(fields | {"model_type": "bloom", "vocab_size": 10}, "config.json")
    assert (config.hidden_size, config.num_heads, config.num_layers, config.max_context) == (64, 4, 2, expected)


def test_generation_config_overrides_end_of_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_LLAMA | {"eos_token_id": 5}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 8]}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (6, 8)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id: expected a token id .* found 'x'"):
        ModelConfig.load(tmp_path)


def test_ids_beyond_the_vocabulary_are_left_out():
    config = ModelConfig.parse(OLD_LLAMA | {"bos_token_id": 128, "eos_token_id": [2, 128000]}, "config.json")
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2,))


def test_auto_map_is_ignored_with_a_note(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(OLD_LLAMA | {"auto_map": {"AutoModel": "evil.Model"}}))
    assert ModelConfig.load(tmp_path).model_type == "llama"
    assert "auto_map is ignored" in caplog.text


NOTHING = object()
REFUSED = [
    ("model_type", NOTHING, "model_type: expected a string, found no such field"),
    ("model_type", "mixtral", "model_type: expected a supported architecture .*llama, mistral, .*found 'mixtral'"),
    ("model_type", "mtpqwen3", "num_encoding_layers: expected an integer from 0 to 6, found no such field"),
    ("model_type", "ddllama", "routing_layers: expected a list of different layers from 0 to 5, at least one, found"),
    ("model_type", "llama_mindskip", "is_mindskip: expected a list of 6 booleans, at least one of them true, found"),
    ("model_type", 3, "model_type: expected a string, found 3"),
    ("architectures", ["LlamaForSequenceClassification"], "architectures: expected LlamaForCausalLM, found"),
    ("quantization_config", {"bits": 4}, "quantization_config: expected unquantised weights"),
    ("num_hidden_layers", 0, "num_hidden_layers: expected an integer from 1 to 512, found 0"),
    ("num_hidden_layers", 513, "num_hidden_layers: expected an integer from 1 to 512, found 513"),
    ("num_hidden_layers", True, "num_hidden_layers: expected an integer from 1 to 512, found True"),
    ("num_hidden_layers", 2.0, "num_hidden_layers: expected an integer from 1 to 512, found 2.0"),
    ("num_hidden_layers", NOTHING, "num_hidden_layers: expected an integer .* found no such field"),
    ("vocab_size", 0, "vocab_size: expected an integer from 1"),
    ("vocab_size", "10", "vocab_size: expected an integer .* found '10'"),
    ("hidden_size", -64, "hidden_size: expected an integer"),
    ("hidden_size", 66, r"hidden_size: expected a multiple of num_attention_heads \(4\), found 66"),
    ("hidden_size", 1 << 70, "hidden_size: expected an integer from 1"),
    ("num_key_value_heads", 3, r"num_key_value_heads: expected a divisor of num_attention_heads \(4\), found 3"),
    ("head_dim", 15, "head_dim: expected an even number"),
    ("rms_norm_eps", 0, "rms_norm_eps: expected a number from 1e-12 to 1, found 0"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps: expected a number"),
    ("hidden_act", "relu", "hidden_act: expected silu or swish, found 'relu'"),
    ("hidden_act", "gelu_pytorch_tanh", "hidden_act: expected silu or swish, found 'gelu_pytorch_tanh'"),
    ("is_causal", False, "is_causal: expected true .* found False"),
    ("is_causal", 1, "is_causal: expected true or false, found 1"),
    ("tie_word_embeddings", 1, "tie_word_embeddings: expected true or false, found 1"),
    ("attention_bias", None, "attention_bias: expected true or false, found None"),
    ("max_position_embeddings", 0, "max_position_embeddings: expected an integer"),
    ("rope_theta", 10**400, "rope_theta: expected a number"),
    (
        "rope_scaling",
        {"type": "longrope", "factor": 4},
        r"rope_scaling\.rope_type: expected a supported kind .* 'longr",
    ),
    ("rope_scaling", {"rope_type": "dynamic"}, r"rope_scaling\.factor: expected a number from 1 to 1e\+06, found no"),
    ("rope_scaling", {"rope_type": "yarn", "factor": None}, r"rope_scaling\.factor: expected a number from 1"),
    (
        "rope_scaling",
        YARN | {"beta_fast": 1, "beta_slow": 32},
        r"rope_scaling\.beta_fast: expected beta_slow \(32\) or",
    ),
    ("rope_scaling", YARN | {"attention_factor": -1}, r"rope_scaling\.attention_factor: expected a number from 1e-06"),
    ("rope_scaling", YARN | {"truncate": "no"}, r"rope_scaling\.truncate: expected true or false"),
    ("rope_scaling", YARN | {"rope_theta": 1.0}, r"rope_scaling\.rope_theta: expected more than 1 for yarn"),
    ("rope_scaling", YARN | {"mscale": "1"}, r"rope_scaling\.mscale: expected a number from 0"),
    ("rope_scaling", YARN | {"original_max_position_embeddings": 0}, r"rope_scaling\.original_max_position_embeddings"),
    ("rope_scaling", {"rope_type": "linear", "factor": 0.5}, r"rope_scaling\.factor: expected a number from 1"),
    ("rope_scaling", LLAMA3 | {"high_freq_factor": 1.0}, r"rope_scaling\.high_freq_factor: expected more than"),
    ("rope_scaling", {"full_attention": {}}, r"rope_scaling\.rope_type: expected one rotary embedding for all layers"),
    ("rope_scaling", 3, "rope_scaling: expected an object, found 3"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor: expected 1 .* found 0.5"),
    ("layer_types", ["sliding_attention"] * 6, "layer_types: expected types that agree"),
    ("layer_types", ["full_attention"], "layer_types: expected 6 entries"),
    ("eos_token_id", -1, "eos_token_id: expected a token id"),
    ("eos_token_id", [True], "eos_token_id: expected a token id"),
    ("torch_dtype", "int8", "torch_dtype: expected one of float32, .* found 'int8'"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_refused_by_field(tmp_path, name, value, message):
    fields = OLD_LLAMA | {name: value}
    if value is NOTHING:
        del fields[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message) as refusal:
        ModelConfig.load(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("ddllama", {"routing_layers": []}, "routing_layers: expected a list of different layers from 0 to 5"),
        ("ddllama", {"routing_layers": [1, 6]}, r"routing_layers: expected .* found \[1, 6\]"),
        ("ddllama", {"routing_layers": [1, True]}, r"routing_layers: expected .* found \[1, True\]"),
        ("ddllama", {"routing_layers": [3, 2, 3]}, r"routing_layers: expected .* found \[3, 2, 3\]"),
        ("ddllama", {"routing_layers": 3}, "routing_layers: expected a list of at most 6 entries, found 3"),
        ("ddllama", {"routing_layers": [2], "router_reduction_factor": 65}, "router_reduction_factor: expected an int"),
        ("ddllama", {"routing_layers": [2], "proj_reduction_factor": 0}, "proj_reduction_factor: expected an integer"),
        ("ddllama", {"routing_layers": [2], "router_gate": "soft"}, "router_gate: expected one of released, ste_hard"),
        ("ddllama", {"routing_layers": [2], "router_threshold": 2}, "router_threshold: expected a number from 0 to 1"),
        ("ddllama", {"routing_layers": [2], "architectures": ["LlamaForCausalLM"]}, "expected DDLlamaForCausalLM"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: expected at least 6 entries"),
        ("smollm3", {"no_rope_layers": [2] * 6}, "no_rope_layers: expected at least 6 entries of 0 or 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval: expected an integer from 1"),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected an integer from 1"),
        ("mistral", {"num_key_value_heads": NOTHING}, "num_key_value_heads: expected an integer .* no such field"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 6}, "layer_types: expected types that agree"),
        ("bloom", {"n_head": 4, "n_layer": 2, "hidden_size": 66}, "hidden_size: expected a multiple of the 4 heads"),
        ("bloom", {"n_head": 4, "n_layer": 2, "n_embed": 32}, "hidden_size: expected the value of n_embed"),
        (
            "bloom",
            {"n_head": 4, "n_layer": 6, "slow_but_exact": True, "pretraining_tp": 2},
            r"slow_but_exact: expected false \(true is not supported with pretraining_tp above 1\), found True",
        ),
        (
            "bloom",
            {"n_head": 4, "n_layer": 6, "apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm: expected false",
        ),
    ],
)
def test_family_fields_refused(model_type, fields, message):
    merged = SMALL | {"model_type": model_type} | fields
    merged = {name: value for name, value in merged.items() if value is not NOTHING}
    if model_type == "bloom":
        merged.pop("num_attention_heads")
        merged.pop("num_hidden_layers")
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse(merged, "config.json")


SPLIT = SMALL | {
    "model_type": "mtpqwen3",
    "architectures": ["MTPQwen3ForCausalLM"],
    "num_encoding_layers": 1,
    "num_thinking_layers": 3,
    "num_decoding_layers": 2,
    "mtp_horizon": 4,
}


@pytest.mark.parametrize("prefix", ["MTP", "DMTD"])
def test_a_model_split_into_cycles_is_a_qwen3_that_says_so(prefix):
    own = {"model_type": f"{prefix.lower()}qwen3", "architectures": [f"{prefix}Qwen3ForCausalLM"]}
    config = ModelConfig.parse(SPLIT | own, "config.json")
    assert config.cycle == Cycle(1, 3, 2, 4)
    plain = ModelConfig.parse(SMALL | {"model_type": "qwen3"}, "config.json")
    assert plain.cycle is None
    assert replace(config, model_type="qwen3", cycle=None) == plain


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_encoding_layers", NOTHING, "num_encoding_layers: expected an integer from 0 to 6, found no such field"),
        ("num_encoding_layers", None, "num_encoding_layers: expected an integer from 0 to 6, found None"),
        ("num_encoding_layers", -1, "num_encoding_layers: expected an integer from 0 to 6, found -1"),
        ("num_thinking_layers", 0, "num_thinking_layers: expected an integer from 1 to 6, found 0"),
        ("num_thinking_layers", 7, "num_thinking_layers: expected an integer from 1 to 6, found 7"),
        ("num_decoding_layers", "2", "num_decoding_layers: expected an integer from 1 to 6, found '2'"),
        ("num_decoding_layers", 3, r"num_hidden_layers: expected the sum of num_encoding_layers, .* \(7\), found 6"),
        ("num_thinking_layers", 2, r"num_hidden_layers: expected the sum of num_encoding_layers, .* \(5\), found 6"),
        ("mtp_horizon", NOTHING, "mtp_horizon: expected an integer from 1 to 64, found no such field"),
        ("mtp_horizon", 0, "mtp_horizon: expected an integer from 1 to 64, found 0"),
        ("mtp_horizon", 65, "mtp_horizon: expected an integer from 1 to 64, found 65"),
        ("mtp_horizon", True, "mtp_horizon: expected an integer from 1 to 64, found True"),
        ("architectures", ["Qwen3ForCausalLM"], "architectures: expected MTPQwen3ForCausalLM, found"),
    ],
)
def test_splits_refused(field, value, message):
    fields = {name: kept for name, kept in (SPLIT | {field: value}).items() if kept is not NOTHING}
    with pytest.raises(ConfigError, match=f"^config.json: {message}"):
        ModelConfig.parse(fields, "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (b'{"a": 1, "a": 2}', "expected each key once, found 'a' twice"),
        (b'{"x": {"b": 1, "b": 1}}', "expected each key once, found 'b' twice"),
        (b'{"a": "\xff"}', "expected UTF-8, found byte 0xff at 7"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1,}', "expected JSON"),
        (b'{"a":' + b"[" * 400_000, "nested brackets"),
        (b'{"a":' + b"9" * 900_000 + b"}", "expected JSON|expected a string"),
        (b" " * 1_000_001, "expected at most 1000000 bytes, found 1000001"),
    ],
)
def test_malformed_json_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refusal:
        ModelConfig.load(tmp_path)
    assert "config.json" in str(refusal.value)


def test_missing_files_named(tmp_path):
    with pytest.raises(ConfigError, match="expected a model folder, found nothing"):
        ModelConfig.load(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"config\.json: expected a file, found none"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: "):
        ModelConfig.load(tmp_path)
