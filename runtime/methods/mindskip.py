"""MindSkip (Router-Tuning, arXiv 2410.13184): attention blocks a prompt's routers decide to leave out of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.host import ints
from ..batch import Batch
from ..cache import KVCache
from ..laid import Pass
from ..model import Model
from ..plan import LayerPlan
from ..prefill import Reading, prompt_rows
from ..recipe import Steps
from ..sequence import Sequence
from .policy import Policy, Step


@dataclass(frozen=True)
class Options:
    """None: which layers have a router, and its threshold, are the checkpoint's."""


@dataclass(frozen=True)
class Decisions:
    """What a sequence's routers decided at its prompt, once for all of its tokens.

    active: bool [2L], the sub-layers that run. logits: float32 [routed layers], in the order of the layers. used: the
    layers' worth of sub-layers that run.
    """

    active: Tensor
    logits: Tensor
    used: float


@dataclass(frozen=True)
class DecidedSteps(Steps):
    """Steps that leave out of every sequence what was decided at its prompt, which is its memory: bool [S, 2L]."""

    plan: LayerPlan
    whole: ClassVar[bool] = False

    def memory(self, model: Model, sequences: int) -> Tensor:
        return torch.ones(sequences, len(self.plan.runs), dtype=torch.bool, device=model.device)

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        rows = replace(batch.newest(), mask=memory.T.contiguous())
        return model.forward(rows, cache, self.plan), memory.sum(dim=1)


class MindSkip(Policy):
    """One decision for every sequence and routed layer: attention runs, or leaves no keys and values; MLPs run."""

    name = "mindskip"
    options = Options
    checkpoints = ("llama_mindskip", "qwen2_mindskip")

    def read(self, model: Model, cache: KVCache, sequence: Sequence) -> Reading[Step]:
        """Layer by layer over the whole prompt, for a router sees the mean of all its tokens; nothing waits for the
        decisions.
        """
        chunks, layers = [*prompt_rows(model, sequence)], range(model.config.num_layers)
        active, logits = torch.ones(2 * len(layers), dtype=torch.bool, device=model.device), list[Tensor]()
        passes = [_shared(model.lay(rows, cache), active) for rows in chunks]
        streams = [model.embed(laid) for laid in passes]
        for layer in layers:
            yield len(sequence.prompt)
            if layer in model.attention_routers:
                real = [x[: len(rows)] for x, rows in zip(streams, chunks, strict=True)]
                logit, active[2 * layer] = _route(model, layer, real)
                logits.append(logit)
            for laid, x in zip(passes, streams, strict=True):
                model.step(laid, cache, 2 * layer, x)
                model.step(laid, cache, 2 * layer + 1, x)
        used = ints(active.sum()[None])[0] / 2
        sequence.memory = Decisions(active, torch.stack(logits), used)
        last = len(chunks[-1])
        return Step(streams[-1][last - 1 : last], [used])

    def findings(self, sequence: Sequence) -> list[Mapping[str, Any]]:
        decided = sequence.memory
        if not isinstance(decided, Decisions):
            return []
        skipped = ints(torch.nonzero(~decided.active[::2]).flatten())
        return [{"kind": "routing", "skip_attention": skipped, "router_logits": decided.logits.tolist()}]

    @property
    def steps(self) -> Steps:
        return DecidedSteps(self._full)

    def memory(self, sequence: Sequence) -> Tensor | None:
        decided: Decisions = sequence.memory
        return decided.active


def _shared(laid: Pass, active: Tensor) -> Pass:
    """The same pass, whose every row runs the sub-layers that `active` bool [2L] says when they are reached."""
    return laid._replace(rows=replace(laid.rows, active=active[:, None].expand(-1, len(laid.rows))))


def _route(model: Model, layer: int, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Whether a layer's attention runs for a sequence: a logit, float32, and a bool, on the device.

    The router sees the mean of the sequence's rows, which `streams` [R, H] hold in parts, after the layer's norm.
    """
    norm, router = model.layers[layer].attention_norm, model.attention_routers[layer]
    total = torch.stack([model.ops.normalise(x, norm).float().sum(dim=0) for x in streams]).sum(dim=0)
    logit = total / sum(map(len, streams)) @ router.weight
    return logit, torch.sigmoid(logit) >= router.threshold
