"""Confidence: how much a sub-layer says of the text at hand (ConfLayers, arXiv 2604.14612, §3)."""

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from .cache import KVCache
from .model import Model, Streams
from .rows import one_sequence


def confidence(model: Model, cache: KVCache, pages: list[int], tokens: list[int], window: int) -> list[float]:
    """Of every sub-layer: 1 − H(softmax(y)) ÷ log H of its output y over the hidden units, averaged over tokens.

    They are the last `window` of `tokens`, which lie in `pages`; one pass of the full model over them on a fork.
    """
    start = len(tokens) - window - 1
    streams: Streams = []
    with cache.forked(pages, start, len(tokens)) as fork:
        rows = one_sequence(tokens[start:-1], start, fork, model.ops.prefill_tile, model.device)
        model.forward(rows, cache, model.full, streams=streams)
    said = torch.stack([_certainty(after.float() - before.float()) for before, after in pairwise(streams)])
    return cast("list[float]", said.tolist())


def _certainty(output: Tensor) -> Tensor:
    """1 − H(softmax(output)) ÷ log H of output [R, H], averaged over its rows."""
    logs = output.log_softmax(dim=-1)
    entropy = -(logs.exp() * logs).sum(dim=-1)
    return 1 - entropy.mean() / math.log(output.shape[-1])
