"""Layers that decide for every token whether they run (FlexiDepth, arXiv 2503.23798)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.ops import Ops
from ..kernels.values import Matrix, Route, Router
from ..loaders.config import ModelConfig
from ..loaders.weights import Weights
from .errors import ConfigError
from .rows import Rows

Routes = dict[int, Route]


class Routed(NamedTuple):
    """What a routed layer has beside a plain one's parameters.

    place: its number among the routed layers. weighted: its MLP is scaled by the router's weight w and the adapter, an
    MLP of its own shape that stands in for a skipped one, by 1 − w.
    """

    place: int
    router: Router
    threshold: float
    weighted: bool
    adapter_up: Matrix
    adapter_down: Matrix


def routed_layers(weights: Weights, config: ModelConfig, ops: Ops) -> dict[int, Routed]:
    """The routed layers of a model, by layer.

    A router's last two matrices act on no nonlinearity between them, so they are one vector here, multiplied in
    float64 and kept in float32 whatever the model's dtype: nearer to exact than one after the other, so routes are the
    same except where a logit lies within rounding of the threshold.

    Raises:
        ConfigError: the configuration has routed layers and the weights have no routers.
    """
    routing = config.routing
    if routing is None:
        return {}
    encoder, norm, up, down = weights.router_encoder, weights.router_norm, weights.adapter_up, weights.adapter_down
    decoder, head = weights.router_decoder, weights.router_head
    if encoder is None or norm is None or decoder is None or head is None or up is None or down is None:
        raise ConfigError(f"{config.model_type}: expected routers for layers {routing.layers}, found weights without")
    return {
        layer: Routed(
            i,
            Router(ops.prepare(encoder[i]), norm[i], (head[i].double() @ decoder[i].double())[0].float()),
            routing.threshold,
            routing.gate == "released",
            (ops.prepare_gated if config.gated else ops.prepare)(up[i]),
            ops.prepare(down[i]),
        )
        for i, layer in enumerate(routing.layers)
    }


def compacted(rows: Rows, run: Tensor, kept: Tensor, width: int | None) -> Tensor:
    """Positions int64 [R] among the tokens of each row's sequence that run a layer, and so leave keys there.

    run bool [R]; kept int64 [S], the tokens that ran it before this pass, is advanced in place. `width`: rows of each
    sequence, where all have as many.
    """
    if width == 1 and len(run) == len(kept):
        position = kept.clone()
        kept += run
        return position
    sequence = rows.sequence.clamp(min=0)
    ran = torch.zeros_like(kept).index_add_(0, sequence, run.long())
    earlier = kept - (ran.cumsum(0) - ran)
    kept += ran
    return (run.cumsum(0) - 1 + earlier[sequence]).clamp(min=0)


def layers_used(routes: Routes, num_layers: int) -> Tensor:
    """How many of the model's layers ran for each row: int64 [R]."""
    return num_layers - torch.stack([route.skip for route in routes.values()]).sum(dim=0)
