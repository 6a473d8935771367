"""How much layers (ShortGPT, arXiv 2403.03853) and sub-layers (AdaSkip, 2501.02336) change the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.host import ints
from .errors import out_of_range
from .model import Model, Streams
from .rows import one_sequence
from .stepwise import Stepwise


class Change(NamedTuple):
    """What every sub-layer makes of the stream a that enters it, b being the one that leaves it; float64 [2L].

    similarity: the mean over tokens of cos(a, b). scale: that of ‖b‖ / ‖a‖.
    """

    similarity: Tensor
    scale: Tensor


def block_influence(model: Model, texts: list[list[int]], window: int, *, official: bool = False) -> Stepwise[Tensor]:
    """BI of every layer, float64 [L]: 1 - cos(stream that enters it, stream that leaves it), the mean over all tokens.

    The texts (token ids) are read as by `_streams`, a window a step. `official` is what the authors' code computes: the
    sum over tokens, the last layer's output being taken after the final norm.

    Raises:
        RequestError: the texts lead to activations beyond the range of the model's dtype.
    """
    total, tokens = torch.zeros(model.config.num_layers, dtype=torch.float64), 0
    for streams in _streams(model, texts, window):
        between = torch.stack(streams[::2])
        if official:
            between[-1] = model.normalised(between[-1])
        cosine = functional.cosine_similarity(between[:-1].double(), between[1:].double(), dim=-1)
        total += (1 - cosine).sum(dim=1).cpu()
        tokens += between.shape[1]
        yield
    return _finite(total if official else total / tokens, model)


def sublayer_change(model: Model, texts: list[list[int]], window: int) -> Stepwise[Change]:
    """That of every sub-layer over all tokens of the texts (token ids), read as by `_streams`, a window a step.

    Raises:
        RequestError: as `block_influence`.
    """
    similarity, scale = (torch.zeros(2 * model.config.num_layers, dtype=torch.float64) for _ in range(2))
    tokens = 0
    for streams in _streams(model, texts, window):
        # A pair at a time: all streams of a large model in float64 would take gigabytes.
        alike, grown = zip(*(_change(a.double(), b.double()) for a, b in pairwise(streams)), strict=True)
        similarity += torch.stack(alike).cpu()
        scale += torch.stack(grown).cpu()
        tokens += len(streams[0])
        yield
    return Change(_finite(similarity / tokens, model), _finite(scale / tokens, model))


def removal_order(influence: Tensor) -> tuple[int, ...]:
    """Layers [L] from the least to the most influential; of equals the lower first."""
    return tuple(ints(torch.argsort(influence, stable=True)))


def _change(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows [R, H] of cos(a, b) and of ‖b‖ / ‖a‖, which is 1 of a token whose embedding is all zeros."""
    before, after = (x.square().sum(dim=-1).sqrt() for x in (a, b))
    return functional.cosine_similarity(a, b, dim=-1).sum(), torch.where(before > 0, after / before, 1.0).sum()


def _finite(measured: Tensor, model: Model) -> Tensor:
    """What was measured, without NaN, by which no layer can be chosen."""
    if not bool(measured.isfinite().all()):
        raise out_of_range("calibration", model.dtype)
    return measured


def _streams(model: Model, texts: list[list[int]], window: int) -> Iterator[Streams]:
    """The residual streams [R, H] of the full model, before every sub-layer and after the last, of a window at a time.

    Each text is read in windows of `window` tokens that see nothing before them.
    """
    cache = model.new_cache(-(-window // model.ops.page_size))
    pages = cache.reserve(window)
    for text in texts:
        for first in range(0, len(text), window):
            part = text[first : first + window]
            streams: Streams = []
            rows = one_sequence(part, 0, pages, model.ops.prefill_tile, model.device, prompt=len(part))
            model.forward(rows, cache, model.full, streams=streams)
            yield streams
