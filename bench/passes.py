"""Passes to be timed: rows after a context of random keys and values, and the bytes a pass cannot avoid reading."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..loaders.config import ModelConfig
from ..runtime.cache import KVCache
from ..runtime.model import Model
from ..runtime.plan import LayerPlan
from ..runtime.rows import Chains


def fill(cache: KVCache, tokens: int) -> list[int]:
    """Pages for `tokens` slots, full of random keys and values.

    Raises:
        CapacityError: there are not enough of them.
    """
    pages = cache.reserve(tokens)
    for tensor in (cache.keys, cache.values):
        for layer in tensor:
            for page in pages:
                layer[page].normal_()
    return pages


def chain_after(model: Model, pages: list[int], context: int, count: int) -> Chains:
    """`count` consecutive tokens of one sequence from position `context`, as a round has them."""
    token = torch.arange(3, 3 + count, device=model.device)[None]
    first, table = (torch.tensor(value, device=model.device) for value in ([context], [pages]))
    return Chains(token, first, None, None, table, model.ops.decode_tile)


def step(model: Model, cache: KVCache, rows: Chains, plan: LayerPlan) -> Callable[[], object]:
    """The pass of `plan` over `rows`, and the head."""
    return lambda: model.predict(model.forward(rows, cache, plan))


def first_layers(model: Model, count: int) -> LayerPlan:
    """A plan of the first `count` layers, none of them being allowed."""
    rest = range(count, model.config.num_layers)
    return model.full.without(attention=rest, mlp=rest)


def head_bytes(config: ModelConfig, itemsize: int) -> int:
    """The LM head's weight."""
    return config.vocab_size * config.hidden_size * itemsize


def layer_bytes(config: ModelConfig, itemsize: int) -> int:
    """The matrices of one layer."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + (3 if config.gated else 2) * config.intermediate_size) * itemsize


def pass_bytes(
    config: ModelConfig, itemsize: int, context: int, layers: int | None = None, weight_size: int | None = None
) -> int:
    """What a pass over `layers` layers (all of them without) reads: matrices, head, and cached keys and values.

    `weight_size`: the bytes of a weight where they are not `itemsize`. Of an embedding that is not the head it reads a
    few rows, which are left out.
    """
    layers = config.num_layers if layers is None else layers
    cached = 2 * config.num_kv_heads * config.head_dim * context * itemsize
    size = weight_size or itemsize
    return layers * (layer_bytes(config, size) + cached) + head_bytes(config, size)


def prompt_flops(config: ModelConfig, tokens: int) -> int:
    """Of a prompt's products with matrices, two for each weight and token; the head sees the last token alone.

    Those of attention are left out: for SmolLM2-135M a sixth as many at a thousand tokens.
    """
    return 2 * (tokens * config.num_layers * layer_bytes(config, 1) + head_bytes(config, 1))
