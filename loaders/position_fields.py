"""Which layers rotate, how, and which see only a window: the positional fields of config.json."""

from __future__ import annotations

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
        original = rope.integer("original_max_position_embeddings", 1, MAX_POSITIONS, max_context)
        return theta, RopeScaling("llama3", rope.number("factor", 1.0, 1e6), low, high, original)
    raise rope.refuse("rope_type", "a supported kind (default, linear, llama3)", kind)
