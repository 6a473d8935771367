"""MindSkip's routers (Router-Tuning, arXiv 2410.13184): what config.json says of them."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields

# "sequence" is what the first published configurations call it.
GRANULARITIES = ("attn_sequence", "sequence")


@dataclass(frozen=True)
class AttentionRouting:
    """Which layers decide, once for every sequence, whether their attention runs.

    layers: ascending. A layer's attention runs where its router's probability is `threshold` or more.
    """

    layers: tuple[int, ...]
    threshold: float = 0.5


def read_attention_routing(fields: Fields, layers: int) -> AttentionRouting:
    """Raises ConfigError: is_mindskip is missing or does not fit the model, or routes something else than attention."""
    expected = f"a list of {layers} booleans, at least one of them true"
    flags = fields.optional_list("is_mindskip", layers) or []
    if len(flags) != layers or not all(isinstance(flag, bool) for flag in flags) or not any(flags):
        raise fields.refuse("is_mindskip", expected, fields.values.get("is_mindskip"))
    granularity = fields.text("granularity", GRANULARITIES[0])
    if granularity not in GRANULARITIES:
        raise fields.refuse("granularity", f"{' or '.join(GRANULARITIES)} (others are not supported)", granularity)
    routed = tuple(layer for layer, flag in enumerate(flags) if flag)
    return AttentionRouting(routed, fields.number("threshold", 0.0, 1.0, 0.5))
