"""LaCo (arXiv 2402.11187): several layers merged into one, by the differences of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..loaders.config import ModelConfig
from ..loaders.weights import UNSTACKED, Weights
from .model import Model
from .prefill import text_rows

Build: TypeAlias = Callable[[ModelConfig, Weights], Model]
RULES = ("paper", "code")
THRESHOLD_STEP = 0.05
_MERGED = frozenset({"qkv", "qkv_bias", "output", "output_bias", "up", "up_bias", "down", "down_bias"})
_T = TypeVar("_T")


@dataclass(frozen=True)
class Scan:
    """The search of §3.3: from layer `highest` - `merge_layers` downwards to `lowest`, `merge_layers` layers become one
    where the model stays more similar to the original than `threshold`; the next base lies `interval` lower.
    """

    merge_layers: int
    interval: int
    threshold: float
    lowest: int
    highest: int


@dataclass(frozen=True)
class Trial:
    """One candidate of a scan: `followers` layers merged into `layer` of a model of `depth` layers."""

    layer: int
    depth: int
    followers: int
    similarity: float
    accepted: bool


@dataclass(frozen=True)
class Merged:
    """A model with merged layers.

    `origins` lists the original layers behind each of its own, `steps` the merges (base, followers) in their order.
    """

    config: ModelConfig
    weights: Weights
    origins: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, int], ...] = ()
    trace: tuple[Trial, ...] = ()

    @staticmethod
    def of(config: ModelConfig, weights: Weights) -> Merged:
        """The model as it is."""
        return Merged(config, weights, tuple((layer,) for layer in range(config.num_layers)))

    def merge(self, base: int, followers: int, rule: str) -> Merged:
        """Layers `base` + 1 to `base` + `followers` merged into layer `base` and removed.

        Rule paper: θ_base + Σ_k (θ_{base+k} − θ_base). Rule code is the authors' code, whose differences are taken to
        what was summed so far, which leaves the last layer's matrices. Merged are matrices and their biases, in float32
        at least; norms are those of the base layer.
        """

        def kept(entries: tuple[_T, ...]) -> tuple[_T, ...]:
            return entries[: base + 1] + entries[base + followers + 1 :]

        tensors: dict[str, Tensor] = {}
        for field in fields(Weights):
            tensor: Tensor | None = getattr(self.weights, field.name)
            if tensor is None or (field.name == "head" and tensor is self.weights.embedding):
                continue
            if field.name not in UNSTACKED:
                own = tensor[base]
                if field.name in _MERGED:
                    own = _combined(tensor[base : base + followers + 1], rule)
                tensor = torch.cat([tensor[:base], own[None], tensor[base + followers + 1 :]])
            tensors[field.name] = tensor
        config = replace(
            self.config,
            num_layers=self.config.num_layers - followers,
            rope_layers=kept(self.config.rope_layers),
            window_layers=kept(self.config.window_layers),
        )
        together = sum(self.origins[base : base + followers + 1], ())
        origins = (*self.origins[:base], together, *self.origins[base + followers + 1 :])
        return Merged(config, Weights.of(tensors), origins, (*self.steps, (base, followers)))

    def report(self) -> dict[str, Any]:
        """What was merged, and the search that led there, for people and JSON."""
        return {"layers": [list(layers) for layers in self.origins], "trace": [asdict(trial) for trial in self.trace]}


class Similarity:
    """How similar a candidate is to the original: the mean over texts of the cosine between the streams after the final
    norm, all tokens of a text in one vector. A candidate is tried once, whatever scans ask for it.
    """

    def __init__(self, original: Merged, build: Build, texts: Sequence[list[int]]) -> None:
        self._build, self._texts = build, [text for text in texts if text]
        self._known: dict[tuple[tuple[int, int], ...], float] = {}
        self._expected = self._hidden(original)

    def __call__(self, candidate: Merged) -> float:
        if candidate.steps not in self._known:
            pairs = zip(self._hidden(candidate), self._expected, strict=True)
            cosines = [float(functional.cosine_similarity(ours, theirs, dim=0)) for ours, theirs in pairs]
            self._known[candidate.steps] = sum(cosines) / len(cosines)
        return self._known[candidate.steps]

    def _hidden(self, merged: Merged) -> list[Tensor]:
        model = self._build(merged.config, merged.weights)
        cache = model.new_cache(-(-max(map(len, self._texts)) // model.ops.page_size))
        with torch.inference_mode():
            return [self._read(model, cache, text).double().flatten() for text in self._texts]

    @staticmethod
    def _read(model: Model, cache: Any, text: list[int]) -> Tensor:
        with cache.lent(len(text)) as pages:
            parts = text_rows(model, text, len(text), pages)
            hidden = torch.cat([model.forward(rows, cache, model.full) for rows in parts])
        return model.normalised(hidden)


def search(original: Merged, similarity: Similarity, scan: Scan, rule: str, remove: int | None = None) -> Merged:
    """Every merge of a scan that keeps the model similar enough; with `remove`, until so many layers are gone."""
    found, trace, layer = original, list[Trial](), scan.highest - scan.merge_layers
    goal = 1 if remove is None else original.config.num_layers - remove
    while layer >= scan.lowest and found.config.num_layers > goal:
        depth = found.config.num_layers
        followers = min(scan.merge_layers - 1, depth - 1 - layer, depth - goal)
        candidate = found.merge(layer, followers, rule)
        score = similarity(candidate)
        accepted = score > scan.threshold
        trace.append(Trial(layer, depth, followers, score, accepted))
        if not accepted:
            layer -= 1
            continue
        found, layer = candidate, layer - scan.interval
        if layer >= found.config.num_layers:
            layer = found.config.num_layers - 1 - scan.merge_layers
    return replace(found, trace=tuple(trace))


def remove_layers(original: Merged, similarity: Similarity, scan: Scan, rule: str, remove: int) -> Merged | None:
    """The scan of the highest threshold, in steps of 0.05 from that of `scan` downwards, that removes so many layers.

    None if none does.
    """
    depth = original.config.num_layers - remove
    for step in range(int((scan.threshold + 1) / THRESHOLD_STEP) + 1):
        lower = replace(scan, threshold=scan.threshold - step * THRESHOLD_STEP)
        found = search(original, similarity, lower, rule, remove)
        if found.config.num_layers == depth:
            return found
    return None


def _combined(layers: Tensor, rule: str) -> Tensor:
    wide = layers.to(torch.promote_types(layers.dtype, torch.float32))
    merged = wide[0]
    for follower in wide[1:]:
        merged = merged + (follower - (wide[0] if rule == "paper" else merged))
    return merged.to(layers.dtype)
