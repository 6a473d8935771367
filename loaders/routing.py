"""FlexiDepth's routers (arXiv 2503.23798): what config.json says of them, and how a plain model gets some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from .fields import Fields

MODEL_TYPE: Final = "ddllama"
REDUCTION: Final = 16
GATES: Final = ("released", "ste_hard")


@dataclass(frozen=True)
class Routing:
    """Which layers decide for every token whether they run, and how.

    layers: ascending. router_width r, adapter_width m: inner sizes of a router and of the adapter that stands in for
    a skipped MLP. A layer runs for a token whose weight w is above `threshold`. `gate` "released" scales the MLP by w
    and the adapter by 1 − w, "ste_hard" neither. `trained` is false where the routers were drawn at random.
    """

    layers: tuple[int, ...]
    router_width: int
    adapter_width: int
    threshold: float = 0.5
    gate: Literal["released", "ste_hard"] = "released"
    trained: bool = True


def read_routing(fields: Fields, layers: int, hidden: int, inner: int) -> Routing:
    """Raises ConfigError: routing_layers is missing or not layers of the model, or another field is out of range."""
    expected = f"a list of different layers from 0 to {layers - 1}, at least one"
    entries = fields.optional_list("routing_layers", layers)
    if not entries:
        raise fields.refuse("routing_layers", expected, fields.values.get("routing_layers"))
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry < layers:
            raise fields.refuse("routing_layers", expected, entries)
    routed = tuple(sorted(cast("set[int]", set(entries))))
    if len(routed) < len(entries):
        raise fields.refuse("routing_layers", expected, entries)
    gate = fields.text("router_gate", "released")
    if gate not in GATES:
        raise fields.refuse("router_gate", f"one of {', '.join(GATES)}", gate)
    return Routing(
        routed,
        hidden // fields.integer("router_reduction_factor", 1, hidden, min(REDUCTION, hidden)),
        inner // fields.integer("proj_reduction_factor", 1, inner, min(REDUCTION, inner)),
        fields.number("router_threshold", 0.0, 1.0, 0.5),
        gate,
        fields.boolean("routers_trained", True),
    )


def routed_fields(
    fields: Mapping[str, object],
    layers: Sequence[int],
    *,
    router_reduction: int = REDUCTION,
    adapter_reduction: int = REDUCTION,
    gate: str = "released",
    trained: bool = True,
) -> dict[str, Any]:
    """The config.json of a Llama model whose `layers` are routed, from that of the plain one."""
    return {
        **fields,
        "model_type": MODEL_TYPE,
        "architectures": ["DDLlamaForCausalLM"],
        "routing_layers": list(layers),
        "router_reduction_factor": router_reduction,
        "proj_reduction_factor": adapter_reduction,
        "router_gate": gate,
        "routers_trained": trained,
    }
