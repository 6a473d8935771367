"""AdaSkip (arXiv 2501.02336): the sub-layers that turn the stream least are left out, the stream scaled instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.host import ints
from ..batch import Batch
from ..cache import KVCache
from ..calibration import Calibration, Encode
from ..influence import Change, sublayer_change
from ..laid import Pass
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe, Steps
from ..rows import Rows
from ..sequence import Sequence
from ..stepwise import Stepwise
from .checked import Checked, OneOf, Within
from .policy import Policy, Step


@dataclass(frozen=True)
class Options(Checked, method="adaskip"):
    """The `n` sub-layers whose output is most like their input, of 2 a layer, are left out of prompts and decoding
    (`phase` both) or of decoding alone (decode); `n` 0 is an eighth of them. The stream is scaled in their place.

    How like they are is measured on the texts of the file `calibration`, or on our own, in windows of `window` tokens.
    The first `online` generated tokens run all that can be run; MLPs that are more alike there than the least alike of
    the `n` are left out of the tokens after them too.
    """

    n: Annotated[int, Within(0, 2**16)] = 0
    phase: Annotated[str, OneOf(("both", "decode"))] = "both"
    online: Annotated[int, Within(0, 2**20)] = 20
    calibration: str = ""
    window: Annotated[int, Within(1, 1024)] = 256


@dataclass(frozen=True)
class Compensated(Steps):
    """Steps without the sub-layers `skipped`, of 2L, and without the MLPs of which each sequence has learnt it.

    The stream is multiplied by `scale` in place of a sub-layer. The first `online` tokens of a sequence leave out
    nothing, or, with `holes` where its prompt did, the attention that is `skipped`. They sum up, in the sequence's
    memory, float64 [L], how like the output of every MLP is to its input: one above `least` on average is left out from
    then on. Without `learns` no token is among the first.
    """

    skipped: tuple[bool, ...]
    scale: tuple[float, ...]
    least: float
    online: int
    holes: bool
    learns: bool
    whole: ClassVar[bool] = False

    def memory(self, model: Model, sequences: int) -> Tensor:
        return torch.zeros(sequences, len(self.skipped) // 2, dtype=torch.float64, device=model.device)

    def serves(self, wanted: Steps) -> bool:
        """Those that learn suit any token."""
        return isinstance(wanted, Compensated) and self in (wanted, replace(wanted, learns=True))

    def runs(self, token: Tensor, memory: Tensor) -> Tensor:
        """Which sub-layers run for generated token `token` int64 [S], the first being 0: bool [2L, S]."""
        first = token < self.online
        learnt = (first[:, None] | (memory / max(1, self.online) <= self.least)).unbind(1)
        rows = list[Tensor]()
        for sublayer, skipped in enumerate(self.skipped):
            if self._nowhere(sublayer):
                rows.append(torch.zeros_like(first))
            elif skipped:
                rows.append(first)
            else:
                rows.append(learnt[sublayer // 2] if sublayer % 2 else torch.ones_like(first))
        return torch.stack(rows)

    def step(self, model: Model, cache: KVCache, batch: Batch, memory: Tensor, number: int) -> tuple[Tensor, Tensor]:
        token, count = batch.length - batch.prompt, len(batch)
        first, runs = token < self.online, self.runs(token, memory)
        laid = model.lay(replace(batch.newest(), mask=runs), cache)
        x, launched = model.embed(laid), False
        for sublayer, scale in enumerate(self.scale):
            own, mlp, skipped = x[:count], sublayer % 2 == 1, self.skipped[sublayer]
            if self._nowhere(sublayer):
                own.mul_(scale)
                continue
            entered = own.clone() if mlp and self.learns and not skipped else None
            model.step(laid, cache, sublayer, x, settled=launched)
            launched = True
            if entered is not None:
                # In float64, so that how a sum is ordered, which differs with the number of rows, does not decide.
                alike = functional.cosine_similarity(entered.double(), own.double(), dim=-1)
                memory[:, sublayer // 2] += torch.where(first, alike, 0.0)
            if mlp or skipped:
                own.copy_(torch.where(runs[sublayer, :, None], own, own * scale))
        return x[:count], runs.sum(dim=0)

    def _nowhere(self, sublayer: int) -> bool:
        """Whether a sub-layer runs for no token."""
        return self.skipped[sublayer] and (not self.learns or (self.holes and sublayer % 2 == 0))


class AdaSkip(Policy):
    """One set of sub-layers for prompts and decoding, learnt from texts, and MLPs beside it, learnt from each answer.

    Attention that is left out of prompts is left out of every generated token, so that nothing is read that was not
    written.
    """

    name = "adaskip"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        sublayers = 2 * num_layers
        options.expect("n", Within(0, sublayers - 1))
        self._count = options.n or max(1, sublayers // 8)
        self._options, self._skipping, self._device = options, self._full, torch.device("cpu")
        self._calibration = Calibration.read(options.calibration, "method adaskip: option calibration")
        self._findings: list[Mapping[str, Any]] = []
        nothing = (False,) * sublayers, (1.0,) * sublayers, 1.0
        self._learning = Compensated(*nothing, options.online, options.phase == "both", options.online > 0)

    def prepare(self, model: Model, encode: Encode | None) -> Stepwise[None]:
        texts = self._calibration.ids(model.config, encode)
        change = yield from sublayer_change(model, texts, self._options.window)
        self.learn(change, model.device)
        plan = self._skipping
        self._findings.append(
            {
                "kind": "similarity",
                "similarity": change.similarity.tolist(),
                "scale": change.scale.tolist(),
                "skip_attention": list(plan.skipped_attention),
                "skip_mlp": list(plan.skipped_mlp),
                "threshold": self._learning.least,
                "tokens": sum(map(len, texts)),
            }
        )

    def learn(self, change: Change, device: torch.device) -> None:
        """Leave out the sub-layers that change the stream least, on this device, from now on."""
        order = ints(torch.argsort(change.similarity, descending=True, stable=True))[: self._count]
        self._skipping, self._device = self._full.skipping(order), device
        self._learning = replace(
            self._learning,
            skipped=tuple(not run for run in self._skipping.runs),
            scale=tuple(float(value) for value in change.scale),
            least=float(change.similarity[order[-1]]),
        )

    @property
    def plan(self) -> LayerPlan:
        return self._skipping

    @property
    def target(self) -> LayerPlan:
        return self._skipping

    @property
    def prompt(self) -> LayerPlan:
        return self._full if self._options.phase == "decode" else self._skipping

    def prompt_pass(self, model: Model, cache: KVCache, rows: Rows) -> Tensor:
        laid = model.lay(rows, cache)
        return self._compensated(model, cache, laid, self.prompt)[: len(rows)]

    @property
    def steps(self) -> Steps:
        """Those that suit any token."""
        return self._learning

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        """Nothing is measured where all sequences are beyond their first tokens; what a host sees of them is late."""
        first = any(sequence.generated <= self._options.online for sequence in sequences)
        steps = self._learning if first else replace(self._learning, learns=False)
        return Recipe(self.target, self.plan, steps=steps)

    def recipes(self, sequences: list[Sequence]) -> list[Recipe]:
        steps = [self._learning] if self._options.online else []
        return [Recipe(self.target, self.plan, steps=each) for each in (*steps, replace(self._learning, learns=False))]

    def memory(self, sequence: Sequence) -> Tensor:
        if sequence.memory is None:
            sequence.memory = torch.zeros(self._full.num_layers, dtype=torch.float64, device=self._device)
        return sequence.memory

    def step(self, model: Model, cache: KVCache, batch: Batch) -> Step:
        """Where all sequences leave out the same, and a pass without a mask is one call, without one."""
        first = any(sequence.generated <= self._options.online for sequence in batch.sequences)
        if first or model.joined is None:
            return super().step(model, cache, batch)
        memory = torch.stack([self.memory(sequence) for sequence in batch.sequences])
        runs = replace(self._learning, learns=False).runs(batch.length - batch.prompt, memory)
        if len(batch) > 1 and bool((runs != runs[:, :1]).any()):
            return super().step(model, cache, batch)
        plan = self._full.skipping(ints(torch.nonzero(~runs[:, 0]).flatten()))
        x = self._compensated(model, cache, model.lay(batch.newest(), cache), plan)
        return Step(x[: len(batch)], [plan.layers_kept] * len(batch))

    def findings(self, sequence: Sequence) -> list[Mapping[str, Any]]:
        return self._findings

    def notes(self, executed_skips: int) -> list[str]:
        """What is skipped in prompts is skipped too."""
        return super().notes(executed_skips) if self._options.phase == "decode" else []

    def _compensated(self, model: Model, cache: KVCache, laid: Pass, plan: LayerPlan) -> Tensor:
        """The residual stream [R, H] after the sub-layers of `plan`, scaled in place of the others."""
        x = model.embed(laid)
        for part, left_out in _parts(plan):
            model.run(laid, cache, part, x)
            if left_out is not None:
                x.mul_(self._learning.scale[left_out])
        return x


@lru_cache
def _parts(plan: LayerPlan) -> tuple[tuple[LayerPlan, int | None], ...]:
    """What runs between the sub-layers that are left out, each with the one of these that comes after it."""
    left_out = [sublayer for sublayer, run in enumerate(plan.runs) if not run]
    ends = [*left_out, len(plan.runs)]
    firsts = [0, *(sublayer + 1 for sublayer in left_out)]
    spans = zip(firsts, ends, [*left_out, None], strict=True)
    return tuple((replace(plan, span=(first, end)), after) for first, end, after in spans)
