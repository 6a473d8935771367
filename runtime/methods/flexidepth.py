"""FlexiDepth: every token decides, layer by layer, whether it runs (arXiv 2503.23798). Lossy; its own checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from torch import Tensor

from ...loaders.routing import MODEL_TYPE
from ..batch import Batch
from ..cache import KVCache
from ..calibration import Encode
from ..model import Model
from ..plan import LayerPlan
from ..prefill import Reading, prompt_rows
from ..recipe import Steps
from ..routes import Routes, layers_used
from ..sequence import Sequence
from ..stepwise import Stepwise
from .checked import Checked, OneOf
from .policy import Policy, Step


@dataclass(frozen=True)
class Options(Checked, method="flexidepth"):
    """kv: what a token that skips a layer leaves there, its own keys and values (as trained) or none."""

    kv: Annotated[str, OneOf(("own", "none"))] = "own"


@dataclass(frozen=True)
class RoutedSteps(Steps):
    """Steps of the whole model, whose routed layers decide for every token; `own` as in `Options.kv`."""

    plan: LayerPlan
    own: bool
    whole: ClassVar[bool] = False

    def memory(self, model: Model, sequences: int) -> Tensor:
        routing = model.config.routing
        count = 0 if self.own or routing is None else len(routing.layers)
        return torch.zeros(sequences, count, dtype=torch.int64, device=model.device)

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        routes: Routes = {}
        kept = None if self.own else memory.T.contiguous()
        hidden = model.forward(batch.newest(), cache, self.plan, routes=routes, kept=kept)
        if kept is not None:
            memory.copy_(kept.T)
        return hidden, 2 * layers_used(routes, model.config.num_layers)


class FlexiDepth(Policy):
    """Every routed layer runs for the tokens its router chooses, in prompts as in decoding.

    A skipped token runs an adapter instead of the MLP and no attention. With kv=none the sequence remembers how many
    keys it has in each routed layer, int64 [routed layers].
    """

    name = "flexidepth"
    options = Options
    checkpoints = (MODEL_TYPE,)

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        self._own = options.kv == "own"
        self._trained = True

    def prepare(self, model: Model, encode: Encode | None) -> Stepwise[None]:
        self._trained = model.config.routing is None or model.config.routing.trained
        yield from ()

    def notes(self, executed_skips: int) -> list[str]:
        untrained = ["the routers are untrained: what they skip, and the text, mean nothing"]
        return super().notes(executed_skips) + ([] if self._trained else untrained)

    @property
    def steps(self) -> Steps:
        return RoutedSteps(self._full, self._own)

    def read(self, model: Model, cache: KVCache, sequence: Sequence) -> Reading[Step]:
        routing = model.config.routing
        count = 0 if routing is None else len(routing.layers)
        kept = None if self._own else torch.zeros(count, 1, dtype=torch.int64, device=model.device)
        hidden, used = torch.empty(0, device=model.device), list[float]()
        for rows in prompt_rows(model, sequence):
            yield len(rows)
            routes: Routes = {}
            hidden = model.forward(rows, cache, self.prompt, routes=routes, kept=kept)
            used += _floats(layers_used(routes, model.config.num_layers))
        sequence.memory = None if kept is None else kept[:, 0]
        sequence.prompt_layers = used
        sequence.counters.executed_skips += round(sum(2 * (model.config.num_layers - ran) for ran in used))
        return Step(hidden[-1:], used[-1:])


def _floats(tensor: Tensor) -> list[float]:
    return cast("list[float]", tensor.double().tolist())
