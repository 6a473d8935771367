"""A copy of the model in eight bits, to draft with: a draft's weights need not be those that have the last word."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from ..kernels.values import Layer
from .errors import CapacityError
from .layers import quantise_layer
from .memory import exhausted
from .model import Model
from .stepwise import Stepwise, at_once

_MADE: WeakKeyDictionary[Model, Model] = WeakKeyDictionary()


def drafter(model: Model, eight_bits: bool) -> Model:
    """What drafts: the model, or its copy in eight bits."""
    return quantised(model) if eight_bits else model


def quantised(model: Model) -> Model:
    """The model with its matrices in eight bits, the LM head too; norms, biases and the embedding are shared.

    Made at the first call, unless `quantise` has made it, and kept as long as the model.

    Raises:
        CapacityError: there is no memory for it.
    """
    if model not in _MADE:
        at_once(quantise(model))
    return _MADE[model]


def quantise(model: Model) -> Stepwise[None]:
    """Make what `quantised` gives, a layer a step; raises as it does."""
    if model in _MADE:
        return
    try:
        layers = list[Layer]()
        for layer in model.layers:
            layers.append(quantise_layer(layer, model.ops))
            yield
        light = model.replaced(layers, model.ops.quantise(model.head))
    except (RuntimeError, MemoryError, OSError) as error:
        if not exhausted(error):
            raise
        raise CapacityError(
            f"draft_weights: the memory of the {model.device.type} ran out while the model's weights were copied in "
            "eight bits: free some, or give the KV cache less (cache_tokens)"
        ) from error
    if model.device.type == "cuda":
        # A kernel may read its weights before what was launched just before it has ended.
        torch.cuda.current_stream(model.device).synchronize()
    _MADE.setdefault(model, light)
