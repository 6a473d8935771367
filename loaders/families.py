"""What each model family's config.json calls things, and what it leaves out; the defaults are transformers'."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .attention_routing import read_attention_routing
from .config import Cycle, ModelConfig
from .errors import ConfigError
from .fields import REQUIRED, Fields
from .json_files import shown
from .position_fields import MAX_LAYERS, MAX_POSITIONS, WindowRule, read_rope, read_rope_layers, read_window, stretched
from .routing import read_routing

_MAX_VOCAB = 1 << 24
_MAX_WIDTH = 1 << 20
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 4096
_MAX_HORIZON = 64
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_ACTIVATIONS = ("silu", "swish")


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
    window: WindowRule = "none"
    cycle: bool = False
    routed: bool = False
    attention_routed: bool = False


_LLAMA = _Rotary("Llama", 2048, kv_heads_default=True, attention_bias_field=True, mlp_bias_field=True)
_QWEN2 = _Rotary("Qwen2", 32768, always_qkv_bias=True, window="late layers")
_QWEN3 = _Rotary("Qwen3", 32768, head_dim=128, attention_bias_field=True, qk_norm=True, window="late layers")
_ROTARY = {
    "llama": _LLAMA,
    "mistral": _Rotary("Mistral", 131072, window="all layers"),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "smollm3": _Rotary(
        "SmolLM3",
        32768,
        tied_head=True,
        rope_theta=2000000.0,
        attention_bias_field=True,
        mlp_bias_field=True,
        window="layers without rope",
    ),
    "mtpqwen3": replace(_QWEN3, class_prefix="MTPQwen3", cycle=True),
    "dmtdqwen3": replace(_QWEN3, class_prefix="DMTDQwen3", cycle=True),
    "ddllama": replace(_LLAMA, class_prefix="DDLlama", routed=True),
    "llama_mindskip": replace(_LLAMA, class_prefix="LlamaMindSkip", attention_routed=True),
    "qwen2_mindskip": replace(_QWEN2, class_prefix="Qwen2MindSkip", attention_routed=True),
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
    if fields.has("is_causal") and not fields.boolean("is_causal"):
        raise fields.refuse("is_causal", "true (false, for encoders, is not supported)", False)
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
    max_context = fields.integer("max_position_embeddings", 1, MAX_POSITIONS, family.max_context)
    if (activation := fields.text("hidden_act", "silu")) not in _ACTIVATIONS:
        raise fields.refuse("hidden_act", " or ".join(_ACTIVATIONS), activation)
    attention_bias = family.attention_bias_field and fields.boolean("attention_bias", False)
    rope_layers = read_rope_layers(fields, layers) if model_type == "smollm3" else (True,) * layers
    window, window_layers = read_window(fields, family.window, layers, rope_layers)
    theta, scaling = read_rope(fields, family.rope_theta, max_context)
    head_dim = _head_dim(fields, hidden, heads, family.head_dim)
    if scaling.kind == "dynamic" and head_dim == 2:
        raise fields.refuse("head_dim", "more than 2 for a dynamic rope scaling", head_dim)
    vocab = fields.integer("vocab_size", 1, _MAX_VOCAB)
    inner = fields.integer("intermediate_size", 1, _MAX_WIDTH)
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, heads, family.kv_heads_default),
        head_dim=head_dim,
        max_context=stretched(max_context, scaling),
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
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
        routing=read_routing(fields, layers, hidden, inner) if family.routed else None,
        attention_routing=read_attention_routing(fields, layers) if family.attention_routed else None,
        bos_token_id=_bos(fields, vocab),
        eos_token_ids=_eos(fields, vocab),
        dtype=_dtype(fields),
        cycle=_cycle(fields, layers) if family.cycle else None,
    )


def _cycle(fields: Fields, layers: int) -> Cycle:
    """How many layers encode, think and decode; all of them do one of the three."""
    encoding = fields.integer("num_encoding_layers", 0, layers)
    thinking = fields.integer("num_thinking_layers", 1, layers)
    decoding = fields.integer("num_decoding_layers", 1, layers)
    if encoding + thinking + decoding != layers:
        parts = "num_encoding_layers, num_thinking_layers and num_decoding_layers"
        raise fields.refuse("num_hidden_layers", f"the sum of {parts} ({encoding + thinking + decoding})", layers)
    return Cycle(encoding, thinking, decoding, fields.integer("mtp_horizon", 1, _MAX_HORIZON))


def _bloom(fields: Fields) -> ModelConfig:
    layers = _aliased(fields, ("n_layer", "num_hidden_layers"), MAX_LAYERS)
    hidden = _aliased(fields, ("hidden_size", "n_embed"), _MAX_WIDTH)
    heads = _aliased(fields, ("n_head", "num_attention_heads"), _MAX_HEADS)
    if hidden % heads:
        raise fields.refuse("hidden_size", f"a multiple of the {heads} heads", hidden)
    if fields.boolean("apply_residual_connection_post_layernorm", False):
        raise fields.refuse("apply_residual_connection_post_layernorm", "false (true is not supported)", True)
    if fields.boolean("slow_but_exact", False) and fields.integer("pretraining_tp", 1, _MAX_WIDTH, 1) > 1:
        raise fields.refuse("slow_but_exact", "false (true is not supported with pretraining_tp above 1)", True)
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
        max_context=fields.integer(context_field, 1, MAX_POSITIONS) if fields.has(context_field) else 2048,
        norm_eps=fields.number("layer_norm_epsilon", 1e-12, 1.0, 1e-5),
        layer_norm=True,
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
