"""Where each tensor of a model folder belongs: one small table per family, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from .config import ModelConfig


@dataclass(frozen=True)
class Naming:
    """A family's tensor names. Several names for one field lie below each other along its rows.

    `prefix` may be missing from a checkpoint's names where `prefix_optional`; `bare` names never carry it; `routed`
    names are those of routed layers alone.
    `interleaved_qkv`: the rows of the one q/k/v tensor are [heads, 3, head_dim], not [3, heads, head_dim].
    """

    prefix: str
    model: Mapping[str, tuple[str, ...]]
    layer: Mapping[str, tuple[str, ...]]
    routed: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    bare: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"head": ("lm_head.weight",)})
    ignorable: re.Pattern[str] = re.compile(r"$^")
    prefix_optional: bool = False
    interleaved_qkv: bool = False


_LLAMA: Final = Naming(
    prefix="model.",
    model={"embedding": ("embed_tokens.weight",), "norm": ("norm.weight",)},
    layer={
        "attention_norm": ("layers.{}.input_layernorm.weight",),
        "qkv": tuple(f"layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv"),
        "qkv_bias": tuple(f"layers.{{}}.self_attn.{part}_proj.bias" for part in "qkv"),
        "q_norm": ("layers.{}.self_attn.q_norm.weight",),
        "k_norm": ("layers.{}.self_attn.k_norm.weight",),
        "output": ("layers.{}.self_attn.o_proj.weight",),
        "output_bias": ("layers.{}.self_attn.o_proj.bias",),
        "mlp_norm": ("layers.{}.post_attention_layernorm.weight",),
        "up": ("layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"),
        "up_bias": ("layers.{}.mlp.gate_proj.bias", "layers.{}.mlp.up_proj.bias"),
        "down": ("layers.{}.mlp.down_proj.weight",),
        "down_bias": ("layers.{}.mlp.down_proj.bias",),
    },
    ignorable=re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
)

_DDLLAMA: Final = replace(
    _LLAMA,
    routed={
        "router_encoder": ("layers.{}.router.router_enc.weight",),
        "router_norm": ("layers.{}.router.router_norm.weight",),
        "router_decoder": ("layers.{}.router.router_dec.weight",),
        "router_head": ("layers.{}.router.router_head.weight",),
        # down_proj is what an MLP calls up_proj, and up_proj what it calls down_proj.
        "adapter_up": ("layers.{}.router_proj.gate_proj.weight", "layers.{}.router_proj.down_proj.weight"),
        "adapter_down": ("layers.{}.router_proj.up_proj.weight",),
    },
)

_MINDSKIP: Final = replace(_LLAMA, routed={"attention_router": ("layers.{}.router.weight",)})
ROUTED_FIELDS: Final = frozenset(_DDLLAMA.routed)

_BLOOM: Final = Naming(
    prefix="transformer.",
    model={
        "embedding": ("word_embeddings.weight",),
        "embedding_norm": ("word_embeddings_layernorm.weight",),
        "embedding_norm_bias": ("word_embeddings_layernorm.bias",),
        "norm": ("ln_f.weight",),
        "norm_bias": ("ln_f.bias",),
    },
    layer={
        "attention_norm": ("h.{}.input_layernorm.weight",),
        "attention_norm_bias": ("h.{}.input_layernorm.bias",),
        "qkv": ("h.{}.self_attention.query_key_value.weight",),
        "qkv_bias": ("h.{}.self_attention.query_key_value.bias",),
        "output": ("h.{}.self_attention.dense.weight",),
        "output_bias": ("h.{}.self_attention.dense.bias",),
        "mlp_norm": ("h.{}.post_attention_layernorm.weight",),
        "mlp_norm_bias": ("h.{}.post_attention_layernorm.bias",),
        "up": ("h.{}.mlp.dense_h_to_4h.weight",),
        "up_bias": ("h.{}.mlp.dense_h_to_4h.bias",),
        "down": ("h.{}.mlp.dense_4h_to_h.weight",),
        "down_bias": ("h.{}.mlp.dense_4h_to_h.bias",),
    },
    ignorable=re.compile(
        r"(transformer\.)?h\.\d+\.self_attention\.(scale_mask_softmax\.causal_mask|attention_mask|masked_bias)"
    ),
    prefix_optional=True,
    interleaved_qkv=True,
)

_NAMING: Final = {
    "bloom": _BLOOM,
    "ddllama": _DDLLAMA,
    "llama_mindskip": _MINDSKIP,
    "qwen2_mindskip": _MINDSKIP,
}


def naming(model_type: str) -> Naming:
    """The table of a supported model type."""
    return _NAMING.get(model_type, _LLAMA)


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint: rows `start` and on of a field of Weights, at `layer` of a stacked one.

    Fields of routed layers stack those alone.
    """

    name: str
    field: str
    layer: int | None
    start: int
    shape: tuple[int, ...]


def field_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every field of Weights that a model of this configuration has; a tied head is not among them."""
    layers, hidden, inner = config.num_layers, config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    fused = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    up = (2 if config.gated else 1) * inner
    present: dict[str, tuple[bool, tuple[int, ...]]] = {
        "embedding": (True, (config.vocab_size, hidden)),
        "embedding_norm": (config.embedding_norm, (hidden,)),
        "embedding_norm_bias": (config.embedding_norm and config.layer_norm, (hidden,)),
        "attention_norm": (True, (layers, hidden)),
        "attention_norm_bias": (config.layer_norm, (layers, hidden)),
        "qkv": (True, (layers, fused, hidden)),
        "qkv_bias": (config.qkv_bias, (layers, fused)),
        "q_norm": (config.qk_norm, (layers, config.head_dim)),
        "k_norm": (config.qk_norm, (layers, config.head_dim)),
        "output": (True, (layers, hidden, queries)),
        "output_bias": (config.output_bias, (layers, hidden)),
        "mlp_norm": (True, (layers, hidden)),
        "mlp_norm_bias": (config.layer_norm, (layers, hidden)),
        "up": (True, (layers, up, hidden)),
        "up_bias": (config.mlp_bias, (layers, up)),
        "down": (True, (layers, hidden, inner)),
        "down_bias": (config.mlp_bias, (layers, hidden)),
        "norm": (True, (hidden,)),
        "norm_bias": (config.layer_norm, (hidden,)),
        "head": (not config.tied_head, (config.vocab_size, hidden)),
    }
    return {name: shape for name, (here, shape) in present.items() if here} | _routed_shapes(config)


def pieces(config: ModelConfig, prefix: str | None = None) -> Iterator[Piece]:
    """Every tensor that a checkpoint of this configuration holds, under its family's names.

    `prefix` replaces the family's own, for checkpoints that leave it out.
    """
    table = naming(config.model_type)
    prefix = table.prefix if prefix is None else prefix
    shapes = field_shapes(config)
    for group, lead in ((table.model, prefix), (table.bare, "")):
        for name, parts in group.items():
            if name in shapes:
                yield from _split(config, name, tuple(lead + part for part in parts), None, shapes[name])
    for layer in range(config.num_layers):
        for name, parts in table.layer.items():
            if name in shapes:
                named = tuple(prefix + part.format(layer) for part in parts)
                yield from _split(config, name, named, layer, shapes[name][1:])
    for place, layer in enumerate(_routed_layers(config)):
        for name, parts in table.routed.items():
            named = tuple(prefix + part.format(layer) for part in parts)
            yield from _split(config, name, named, place, shapes[name][1:])


def _routed_layers(config: ModelConfig) -> tuple[int, ...]:
    routing = config.routing or config.attention_routing
    return routing.layers if routing else ()


def _routed_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if config.attention_routing is not None:
        return {"attention_router": (len(config.attention_routing.layers), 1, config.hidden_size)}
    if config.routing is None:
        return {}
    routed, hidden = len(config.routing.layers), config.hidden_size
    code, inner = config.routing.router_width, config.routing.adapter_width
    return {
        "router_encoder": (routed, code, hidden),
        "router_norm": (routed, code),
        "router_decoder": (routed, hidden, code),
        "router_head": (routed, 1, hidden),
        "adapter_up": (routed, 2 * inner, hidden),
        "adapter_down": (routed, hidden, inner),
    }


def _split(
    config: ModelConfig, name: str, parts: tuple[str, ...], layer: int | None, shape: tuple[int, ...]
) -> Iterator[Piece]:
    rows = [shape[0] // len(parts)] * len(parts)
    if name in ("qkv", "qkv_bias") and len(parts) == 3:
        rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    start = 0
    for part, count in zip(parts, rows, strict=True):
        yield Piece(part, name, layer, start, (count, *shape[1:]))
        start += count
