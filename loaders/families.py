"""What each model family's config.json calls things, and what it leaves out; the defaults are transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .config import ModelConfig, RopeScaling
from .errors import ConfigError
from .fields import REQUIRED, Fields
from .json_files import shown

MAX_LAYERS = 512
_MAX_VOCAB = 1 << 24
_MAX_WIDTH = 1 << 20
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 4096
_MAX_POSITIONS = 1 << 30
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class _Rotary:
    """A family of Llama's build: RMSNorm, RoPE, gated MLP. `None` as a default means that the field is required."""

    class_prefix: str
    max_context: int
    tied_head: bool = False
    rope_theta: float = 10000.0
    kv_heads_default: bool = False
    head_dim: int | None = None
    attention_bias_field: bool = False
    mlp_bias_field: bool = False
    always_qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "all layers", "late layers", "layers without rope"] = "none"


_ROTARY = {
    "llama": _Rotary("Llama", 2048, kv_heads_default=True, attention_bias_field=True, mlp_bias_field=True),
    "mistral": _Rotary("Mistral", 131072, window="all layers"),
    "qwen2": _Rotary("Qwen2", 32768, always_qkv_bias=True, window="late layers"),
    "qwen3": _Rotary("Qwen3", 32768, head_dim=128, attention_bias_field=True, qk_norm=True, window="late layers"),
    "smollm3": _Rotary(
        "SmolLM3",
        32768,
        tied_head=True,
        rope_theta=2000000.0,
        attention_bias_field=True,
        mlp_bias_field=True,
        window="layers without rope",
    ),
}
SUPPORTED = (*_ROTARY, "bloom")


def parse_family(fields: Fields) -> ModelConfig:
    """Dispatch on `model_type`. Raises ConfigError, naming the supported list where the type is not on it."""
    model_type = fields.text("model_type")
    if model_type not in SUPPORTED:
        raise fields.refuse("model_type", f"a supported architecture ({', '.join(SUPPORTED)})", model_type)
    if fields.has("quantization_config"):
        raise ConfigError(
            f"{fields.source}: quantization_config: expected unquantised weights, found a quantised model"
        )
    if model_type == "bloom":
        _check_architecture(fields, "BloomForCausalLM", "BloomModel")
        return _bloom(fields)
    family = _ROTARY[model_type]
    _check_architecture(fields, f"{family.class_prefix}ForCausalLM")
    return _rotary(fields, model_type, family)


def _check_architecture(fields: Fields, *expected: str) -> None:
    names = fields.optional_list("architectures", 16)
    if names and not any(name in expected for name in names):
        raise fields.refuse("architectures", " or ".join(expected), names)


def _rotary(fields: Fields, model_type: str, family: _Rotary) -> ModelConfig:
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    hidden = fields.integer("hidden_size", 1, _MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 1, _MAX_HEADS)
    max_context = fields.integer("max_position_embeddings", 1, _MAX_POSITIONS, family.max_context)
    attention_bias = family.attention_bias_field and fields.boolean("attention_bias", False)
    rope_layers = _rope_layers(fields, layers) if model_type == "smollm3" else (True,) * layers
    window, window_layers = _window(fields, family, layers, rope_layers)
    theta, scaling = _rope(fields, family.rope_theta, max_context)
    vocab = fields.integer("vocab_size", 1, _MAX_VOCAB)
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, _MAX_WIDTH),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, heads, family.kv_heads_default),
        head_dim=_head_dim(fields, hidden, heads, family.head_dim),
        max_context=max_context,
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
        activation=_activation(fields),
        qkv_bias=attention_bias or family.always_qkv_bias,
        output_bias=attention_bias,
        mlp_bias=family.mlp_bias_field and fields.boolean("mlp_bias", False),
        qk_norm=family.qk_norm,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_layers=rope_layers,
        window=window,
        window_layers=window_layers,
        tied_head=fields.boolean("tie_word_embeddings", family.tied_head),
        bos_token_id=_bos(fields, vocab),
        eos_token_ids=_eos(fields, vocab),
        dtype=_dtype(fields),
    )


def _bloom(fields: Fields) -> ModelConfig:
    layers = _aliased(fields, ("n_layer", "num_hidden_layers"), MAX_LAYERS)
    hidden = _aliased(fields, ("hidden_size", "n_embed"), _MAX_WIDTH)
    heads = _aliased(fields, ("n_head", "num_attention_heads"), _MAX_HEADS)
    if hidden % heads:
        raise fields.refuse("hidden_size", f"a multiple of the {heads} heads", hidden)
    if fields.boolean("apply_residual_connection_post_layernorm", False):
        raise fields.refuse("apply_residual_connection_post_layernorm", "false (true is not supported)", True)
    vocab = fields.integer("vocab_size", 1, _MAX_VOCAB)
    context_field = "seq_length" if fields.has("seq_length") else "n_positions"
    return ModelConfig(
        model_type="bloom",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_context=fields.integer(context_field, 1, _MAX_POSITIONS) if fields.has(context_field) else 2048,
        norm_eps=fields.number("layer_norm_epsilon", 1e-12, 1.0, 1e-5),
        layer_norm=True,
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rope_layers=(False,) * layers,
        alibi=True,
        window_layers=(False,) * layers,
        tied_head=fields.boolean("tie_word_embeddings", True),
        embedding_norm=True,
        bos_token_id=_bos(fields, vocab),
        eos_token_ids=_eos(fields, vocab),
        dtype=_dtype(fields),
    )


def _aliased(fields: Fields, names: tuple[str, str], high: int) -> int:
    """A field that has an older name; when both are there they must agree."""
    present = [name for name in names if fields.has(name)] or [names[0]]
    values = [fields.integer(name, 1, high) for name in present]
    if len(set(values)) > 1:
        raise fields.refuse(names[0], f"the value of {names[1]} ({values[1]})", values[0])
    return values[0]


def _kv_heads(fields: Fields, heads: int, may_be_absent: bool) -> int:
    if not fields.has("num_key_value_heads") and (may_be_absent or "num_key_value_heads" in fields.values):
        return heads
    kv_heads = fields.integer("num_key_value_heads", 1, _MAX_HEADS, REQUIRED)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})", kv_heads)
    return kv_heads


def _head_dim(fields: Fields, hidden: int, heads: int, default: int | None) -> int:
    if fields.has("head_dim"):
        head_dim = fields.integer("head_dim", 2, _MAX_HEAD_DIM)
    elif default is not None and "head_dim" not in fields.values:
        head_dim = default
    elif hidden % heads:
        raise fields.refuse("hidden_size", f"a multiple of num_attention_heads ({heads})", hidden)
    else:
        head_dim = hidden // heads
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        raise fields.refuse("head_dim", f"an even number up to {_MAX_HEAD_DIM}, as rotary embedding needs", head_dim)
    return head_dim


def _activation(fields: Fields) -> Literal["silu", "gelu_tanh"]:
    name = fields.text("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise fields.refuse("hidden_act", f"one of {', '.join(_ACTIVATIONS)}", name)
    return _ACTIVATIONS[name]


def _rope_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    flags = fields.optional_list("no_rope_layers", 4 * MAX_LAYERS)
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", 1, 1 << 20, 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if len(flags) < layers or any(type(flag) is not int or flag not in (0, 1) for flag in flags):
        raise fields.refuse("no_rope_layers", f"at least {layers} entries of 0 or 1", flags)
    return tuple(flag == 1 for flag in flags[:layers])


def _window(
    fields: Fields, family: _Rotary, layers: int, rope_layers: tuple[bool, ...]
) -> tuple[int | None, tuple[bool, ...]]:
    window: int | None = None
    if family.window == "all layers" and "sliding_window" not in fields.values:
        window = 4096
    elif family.window == "all layers" or (family.window != "none" and fields.boolean("use_sliding_window", False)):
        window = fields.optional_integer("sliding_window", 1, _MAX_POSITIONS)
    slides: dict[str, Callable[[int], bool]] = {
        "none": lambda layer: False,
        "all layers": lambda layer: True,
        "late layers": lambda layer: layer >= fields.integer("max_window_layers", 0, 1 << 20, 28),
        "layers without rope": lambda layer: not rope_layers[layer],
    }
    sliding = tuple(window is not None and slides[family.window](layer) for layer in range(layers))
    named = _layer_types(fields, layers)
    if named is not None and named != sliding:
        free = family.window in ("late layers", "layers without rope")
        if not free or (window is None and any(named)):
            raise fields.refuse("layer_types", "types that agree with the sliding-window fields", "others")
        sliding = named
    return (window if any(sliding) else None), sliding


def _layer_types(fields: Fields, layers: int) -> tuple[bool, ...] | None:
    """Per layer, whether `layer_types` calls it sliding."""
    types = fields.optional_list("layer_types", MAX_LAYERS)
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if len(types) != layers or any(name not in known for name in types):
        raise fields.refuse("layer_types", f"{layers} entries of {' or '.join(known)}", types)
    return tuple(name == "sliding_attention" for name in types)


def _rope(fields: Fields, default_theta: float, max_context: int) -> tuple[float, RopeScaling]:
    """The rotary base and scaling, from `rope_scaling` and `rope_theta` or from their successor `rope_parameters`."""
    if fields.has("rope_scaling") and fields.has("rope_parameters"):
        raise fields.refuse("rope_scaling", "no such field beside rope_parameters", fields.values["rope_scaling"])
    theta = fields.number("rope_theta", 1.0, 1e12, default_theta)
    rope = fields.optional_object("rope_scaling") or fields.optional_object("rope_parameters")
    for holder in (fields, rope) if rope else (fields,):
        if holder.has("partial_rotary_factor") and holder.number("partial_rotary_factor", 0.0, 1.0) != 1.0:
            found = holder.values["partial_rotary_factor"]
            raise holder.refuse("partial_rotary_factor", "1 (other values are not supported)", found)
    if rope is None:
        return theta, RopeScaling()
    theta = rope.number("rope_theta", 1.0, 1e12, theta)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        if any(isinstance(value, dict) for value in rope.values.values()):
            raise rope.refuse("rope_type", "one rotary embedding for all layers", "one per layer type")
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", factor=rope.number("factor", 1.0, 1e6))
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 1e6)
        high = rope.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise rope.refuse("high_freq_factor", f"more than low_freq_factor ({low:g})", high)
        original = rope.integer("original_max_position_embeddings", 1, _MAX_POSITIONS, max_context)
        return theta, RopeScaling("llama3", rope.number("factor", 1.0, 1e6), low, high, original)
    raise rope.refuse("rope_type", "a supported kind (default, linear, llama3)", kind)


def _bos(fields: Fields, vocab: int) -> int | None:
    ids = fields.token_ids("bos_token_id")
    return ids[0] if ids and ids[0] < vocab else None


def _eos(fields: Fields, vocab: int) -> tuple[int, ...]:
    return tuple(token for token in fields.token_ids("eos_token_id") if token < vocab)


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    value = fields.text(name) if fields.has(name) else "float32"
    value = value.removeprefix("torch.")
    if value not in _DTYPES:
        raise ConfigError(f"{fields.source}: {name}: expected one of {', '.join(_DTYPES)}, found {shown(value)}")
    return value
