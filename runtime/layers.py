"""Parameters of layers, and of the head, in the layout of the op table that reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.ops import Ops
from ..kernels.values import Layer, Matrix, Norm, Split, Stack
from ..loaders.config import ModelConfig
from ..loaders.weights import Weights
from .routes import Routed


class AttentionRouter(NamedTuple):
    """MindSkip's router of one layer: weight float32 [H]; attention runs at a probability of `threshold` or more."""

    weight: Tensor
    threshold: float


class Vocabulary(NamedTuple):
    """A part of the vocabulary to draft from: the head's rows [V', H] and the tokens int64 [V'] they stand for."""

    head: Matrix
    ids: Tensor


class Fill(NamedTuple):
    """What keys and values are made of, of every layer: what the fill of skipped attention blocks reads."""

    norm: Norm
    qkv: Stack
    qkv_bias: Tensor | None
    k_norm: Tensor | None
    rotated: Tensor

    def part(self, first: int, end: int) -> Fill:
        """The layers from `first` to `end` - 1."""

        def rows(stacked: Tensor | None) -> Tensor | None:
            return None if stacked is None else stacked[first:end]

        norm = self.norm._replace(weight=self.norm.weight[first:end], bias=rows(self.norm.bias))
        return Fill(norm, self.qkv.part(first, end), rows(self.qkv_bias), rows(self.k_norm), self.rotated[first:end])


def prepare_attention_routers(weights: Weights, config: ModelConfig) -> dict[int, AttentionRouter]:
    routing, stacked = config.attention_routing, weights.attention_router
    if routing is None or stacked is None:
        return {}
    return {
        number: AttentionRouter(weight[0].float(), routing.threshold)
        for number, weight in zip(routing.layers, stacked, strict=True)
    }


def prepare_fill(weights: Weights, config: ModelConfig, qkv: Stack) -> Fill:
    norm = Norm(weights.attention_norm, weights.attention_norm_bias, config.norm_eps)
    rotated = torch.tensor(config.rope_layers, device=weights.qkv.device)
    return Fill(norm, qkv, weights.qkv_bias, weights.k_norm, rotated)


def prepare_projections(weights: Weights, config: ModelConfig, ops: Ops) -> Stack | list[Matrix | Split]:
    """The q/k/v weight of every layer; of routed ones the queries apart, which skipped tokens have none of."""
    if config.routing is None:
        return ops.prepare_stack(weights.qkv)
    queries, routed = config.num_heads * config.head_dim, config.routing.layers
    return [
        ops.prepare_split(weight, queries) if number in routed else ops.prepare(weight)
        for number, weight in enumerate(weights.qkv)
    ]


def prepare_layer(weights: Weights, qkv: Matrix | Split, i: int, config: ModelConfig, ops: Ops) -> Layer:
    eps = config.norm_eps

    def row(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked[i]

    return Layer(
        Norm(weights.attention_norm[i], row(weights.attention_norm_bias), eps),
        qkv,
        row(weights.qkv_bias),
        row(weights.q_norm),
        row(weights.k_norm),
        ops.prepare(weights.output[i]),
        row(weights.output_bias),
        Norm(weights.mlp_norm[i], row(weights.mlp_norm_bias), eps),
        (ops.prepare_gated if config.gated else ops.prepare)(weights.up[i]),
        row(weights.up_bias),
        ops.prepare(weights.down[i]),
        row(weights.down_bias),
    )


def quantise_layer(layer: Layer, ops: Ops) -> Layer:
    """The layer with its matrices in eight bits; it must have no split one."""
    qkv = layer.qkv
    assert isinstance(qkv, Matrix)
    output, up, down = map(ops.quantise, (layer.output, layer.up, layer.down))
    return layer._replace(qkv=ops.quantise(qkv), output=output, up=up, down=down)


def matrices(layers: list[Layer], routed: dict[int, Routed]) -> list[Matrix]:
    """Every matrix that rows are multiplied with."""
    found: list[Matrix] = []
    for layer in layers:
        found += [layer.qkv.upper, layer.qkv.lower] if isinstance(layer.qkv, Split) else [layer.qkv]
        found += [layer.output, layer.up, layer.down]
    for own in routed.values():
        found += [own.router.encoder, own.adapter_up, own.adapter_down]
    return found


def no_matrix(like: Tensor) -> Matrix:
    """A matrix without rows, of the type of `like`: what is told ahead where it is not known what comes."""
    return Matrix(like.new_empty(0, 0), rows=0, columns=0, packed=False)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head, float32 [heads] (Press et al., arXiv 2108.12409).

    Heads beyond a power of two take every other slope of the next power.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    extra = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes + extra)


def prepare_vocabulary(ops: Ops, head: Matrix, tokens: set[int]) -> Vocabulary:
    """The rows of the head for some tokens, ready when this returns."""
    ids = torch.tensor(sorted(tokens), device=head.data.device)
    part = Vocabulary(ops.take_rows(head, ids), ids)
    if ids.device.type == "cuda":
        # A kernel may read its weights before what was launched just before it has ended.
        torch.cuda.current_stream(ids.device).synchronize()
    return part
