"""Which layers rotate, how, and which see only a window: the positional fields of config.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

from .config import RopeScaling
from .fields import Fields

MAX_LAYERS: Final = 512
MAX_POSITIONS: Final = 1 << 30
WindowRule = Literal["none", "all layers", "late layers", "layers without rope"]


def read_rope_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Per layer, whether it rotates: SmolLM3's `no_rope_layers` (1 = rotates) or `no_rope_layer_interval`."""
    flags = fields.optional_list("no_rope_layers", 4 * MAX_LAYERS)
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", 1, 1 << 20, 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if len(flags) < layers or any(type(flag) is not int or flag not in (0, 1) for flag in flags):
        raise fields.refuse("no_rope_layers", f"at least {layers} entries of 0 or 1", flags)
    return tuple(flag == 1 for flag in flags[:layers])


def read_window(
    fields: Fields, rule: WindowRule, layers: int, rope_layers: tuple[bool, ...]
) -> tuple[int | None, tuple[bool, ...]]:
    """The window in positions, None where no layer has one, and per layer whether it uses it."""
    window: int | None = None
    if rule == "all layers" and "sliding_window" not in fields.values:
        window = 4096
    elif rule == "all layers" or (rule != "none" and fields.boolean("use_sliding_window", False)):
        window = fields.optional_integer("sliding_window", 1, MAX_POSITIONS)
    slides: dict[str, Callable[[int], bool]] = {
        "none": lambda layer: False,
        "all layers": lambda layer: True,
        "late layers": lambda layer: layer >= fields.integer("max_window_layers", 0, 1 << 20, 28),
        "layers without rope": lambda layer: not rope_layers[layer],
    }
    sliding = tuple(window is not None and slides[rule](layer) for layer in range(layers))
    named = _layer_types(fields, layers)
    if named is not None and named != sliding:
        free = rule in ("late layers", "layers without rope")
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


def read_rope(fields: Fields, default_theta: float, max_context: int) -> tuple[float, RopeScaling]:
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
        original = _original_positions(fields, rope, max_context)
        return theta, RopeScaling("llama3", rope.number("factor", 1.0, 1e6), low, high, original)
    if kind == "yarn":
        return theta, _yarn(rope, theta, _original_positions(fields, rope, max_context))
    if kind == "dynamic":
        return theta, RopeScaling("dynamic", rope.number("factor", 1.0, 1e6), original_max_position=max_context)
    raise rope.refuse("rope_type", "a supported kind (default, linear, llama3, yarn, dynamic)", kind)


def stretched(max_context: int, scaling: RopeScaling) -> int:
    """The positions a model serves: yarn and dynamic take it `factor` times beyond its original context."""
    if scaling.kind not in ("yarn", "dynamic"):
        return max_context
    return min(MAX_POSITIONS, max(max_context, int(scaling.factor * scaling.original_max_position)))


def _original_positions(fields: Fields, rope: Fields, max_context: int) -> int:
    holder = fields if fields.has("original_max_position_embeddings") else rope
    return holder.integer("original_max_position_embeddings", 1, MAX_POSITIONS, max_context)


def _yarn(rope: Fields, theta: float, original: int) -> RopeScaling:
    """YaRN's fields; without `attention_factor` it follows from `factor`, `mscale` and `mscale_all_dim`."""
    if theta == 1:
        raise rope.refuse("rope_theta", "more than 1 for yarn", theta)
    factor = rope.number("factor", 1.0, 1e6)
    fast, slow = (
        rope.number(name, 1e-6, 1e6) if rope.has(name) else default
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if fast < slow:
        raise rope.refuse("beta_fast", f"beta_slow ({slow:g}) or more", fast)
    scale, all_dims = (rope.number(name, 0.0, 1e6) if rope.has(name) else 0.0 for name in ("mscale", "mscale_all_dim"))
    if rope.has("attention_factor"):
        attention = rope.number("attention_factor", 1e-6, 1e6)
    elif scale and all_dims:
        attention = _length_scale(factor, scale) / _length_scale(factor, all_dims)
    else:
        attention = _length_scale(factor, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position=original,
        attention_factor=attention,
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.boolean("truncate", True),
    )


def _length_scale(factor: float, weight: float) -> float:
    """How much longer queries and keys are for a context `factor` times longer."""
    return 0.1 * weight * math.log(factor) + 1.0
