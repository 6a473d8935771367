"""Routed models whose layers are skipped by command: what skipping saves, whatever routers would choose."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager

from ..loaders.config import ModelConfig
from ..runtime.errors import RequestError
from ..runtime.model import Model

ALWAYS, NEVER = -1.0, 2.0


@contextmanager
def forced(model: Model, skipped: Collection[int]) -> Generator[None, None, None]:
    """Inside, every token skips the routed layers in `skipped` and runs the others; routers are computed as ever."""
    before = list(model.layers)
    for i, layer in enumerate(before):
        if layer.routed is not None:
            threshold = NEVER if i in skipped else ALWAYS
            model.layers[i] = layer._replace(routed=layer.routed._replace(threshold=threshold))
    try:
        yield
    finally:
        model.layers[:] = before


def layer_bytes(config: ModelConfig, itemsize: int) -> tuple[int, int]:
    """Bytes of the weights of a routed layer that a token reads where it runs, and where it is skipped.

    Raises:
        RequestError: no layer of the model is routed.
    """
    routing, hidden = config.routing, config.hidden_size
    if routing is None:
        raise RequestError(
            f"MODEL: expected a routed checkpoint, such as skipjack route makes, got {config.model_type}"
        )
    queries, keys = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    always = (keys + routing.router_width) * hidden
    runs = 2 * queries * hidden + 3 * hidden * config.intermediate_size
    return (always + runs) * itemsize, (always + 3 * hidden * routing.adapter_width) * itemsize
