"""Block influence: how much a layer turns the residual stream (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.host import ints
from .model import Model
from .rows import one_sequence
from .stepwise import Stepwise


def block_influence(model: Model, texts: list[list[int]], window: int, *, official: bool = False) -> Stepwise[Tensor]:
    """BI of every layer, float64 [L]: 1 - cos(stream that enters it, stream that leaves it), the mean over all tokens.

    Each text (token ids) is read in windows of `window` tokens, a step each, that see nothing before them. `official`
    is what the authors' code computes: the sum over tokens, the last layer's output being taken after the final norm.
    """
    cache = model.new_cache(-(-window // model.ops.page_size))
    pages = cache.reserve(window)
    total, tokens = torch.zeros(model.config.num_layers, dtype=torch.float64), 0
    for text in texts:
        for first in range(0, len(text), window):
            part = text[first : first + window]
            streams: list[Tensor] = []
            rows = one_sequence(part, 0, pages, model.ops.prefill_tile, model.device, prompt=len(part))
            model.forward(rows, cache, model.full, streams=streams)
            between = torch.stack(streams[::2])
            if official:
                between[-1] = model.normalised(between[-1])
            cosine = functional.cosine_similarity(between[:-1].double(), between[1:].double(), dim=-1)
            total += (1 - cosine).sum(dim=1).cpu()
            tokens += len(part)
            yield
    return total if official else total / tokens


def removal_order(influence: Tensor) -> tuple[int, ...]:
    """Layers [L] from the least to the most influential; of equals the lower first."""
    return tuple(ints(torch.argsort(influence, stable=True)))
