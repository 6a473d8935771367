"""DEL (arXiv 2504.05598): LayerSkip with the exit layer and the draft length chosen anew every round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from ...kernels.host import ints
from ..batch import Batch, Draft, Exit, Round, Tally
from ..budget import Budget
from ..cache import KVCache
from ..costs import expected_tokens
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..sequence import Sequence
from .base import Method, expect_layers, no_draft
from .checked import Acceptance, Checked, DraftTokens, Share
from .drafting import Drafting, by_set, grow

# What a newly seen token weighs in the moving averages, and the rows of a round that are measured at most.
WEIGHT, ROWS = 0.05, 8


@dataclass(frozen=True)
class Options(Checked, method="del"):
    """Drafts of at most `num_draft_tokens`. The exits are measured in as many rounds as `search_budget` of the decoding
    time pays for; `reuse` verifies from the streams the draft left.
    """

    num_draft_tokens: DraftTokens = 7
    search_budget: Share = 0.1
    reuse: bool = True
    acceptance: Acceptance = "coupled"


class DynamicExit(Method):
    """Every exit's rate of agreement with the full model, and the exit and draft length that promise most."""

    name = "del"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        expect_layers("del", num_layers)
        self._options = options
        self.rejection = options.acceptance == "rejection"
        self._budget = Budget(options.search_budget)
        # Exit 1 comes first: how often it agreed; how sure it was where it agreed [0] and where it did not [1], and how
        # many tokens those are.
        self.rates = torch.zeros(num_layers - 1)
        self._sure = torch.tensor([[1.0], [0.0]]).repeat(1, num_layers - 1)
        self._seen = torch.zeros(2, num_layers - 1)
        self._tokens = 0
        self._probe_s = 0.0
        self._exit, self._length = max(1, 2 * num_layers // 3), 0

    @property
    def plan(self) -> LayerPlan:
        return self._full.early_exit(self._exit) if self._length else self._full

    @property
    def widest(self) -> int:
        return self._options.num_draft_tokens

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """A draft of the chosen length from the chosen exit, ended by a token less sure than those that are missed."""
        record = self._due()
        if not self._length:
            return no_draft(batch)._replace(record=record)
        how = replace(self._how, num_draft_tokens=self._length)
        draft, states = grow(model, cache, batch, self.plan, how)
        if record:
            return draft._replace(record=True)
        reuse = self._options.reuse and states.shape[1] > 0
        return draft._replace(exit=Exit(self._exit, states)) if reuse else draft

    def rehearse(self, model: Model, cache: KVCache) -> None:
        x = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
        model.predict(x, tile=model.ops.prefill_tile)

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        """By the mask, an exit being a set like another, so that any exit and length will do; a measurement is the
        host's.

        Verification is then a full pass, which reads the same weights as one that `reuse`s the draft's streams.
        """
        if self._due():
            return None
        return (
            by_set(self._full, self._how, sequences, limited=True) if self._length else Recipe(self._full, self._full)
        )

    def recipes(self, sequences: list[Sequence]) -> list[Recipe]:
        return [Recipe(self._full, self._full), by_set(self._full, self._how, sequences, limited=True)]

    @property
    def threshold(self) -> float:
        """Halfway between the confidence of the tokens that agreed and of those that did not."""
        return float(self._sure[:, self._exit - 1].mean())

    @property
    def limit(self) -> int:
        return self._length

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        self._budget.round(tally.draft_s + tally.verify_s, recorded=False)
        return 0.0

    def observe(self, model: Model, cache: KVCache, done: Round) -> float:
        """Put the streams of a recorded round through the head at every exit, and choose anew."""
        longer = self._budget.round(done.draft_s + done.verify_s, recorded=done.streams is not None)
        if done.streams is None:
            return 0.0
        start = perf_counter()
        with model.mark("search", len(done.batch), done.path.numel()):
            self._measure(model, done)
        before = (self._exit, self._length)
        self._exit, self._length = best(self.rates, self._full.num_layers, self._options.num_draft_tokens)
        if (self._exit, self._length) != before:
            self.events.append(
                {
                    "kind": "exit",
                    "exit_layer": self._exit,
                    "num_draft_tokens": self._length,
                    "acceptance_rate": float(self.rates[self._exit - 1]),
                    "tokens": max(sequence.generated for sequence in done.batch.sequences),
                }
            )
        seconds = perf_counter() - start
        self._budget.spend(seconds)
        self._probe_s = seconds + longer
        return seconds

    @property
    def _how(self) -> Drafting:
        return Drafting(self._options.num_draft_tokens, self.threshold, self.rejection)

    def _due(self) -> bool:
        """Whether the exits are measured in the next round: not twice before it is known what other rounds take."""
        affordable = self._budget.seconds >= self._probe_s and self._options.search_budget > 0
        return affordable and (self._budget.compares or not self._tokens)

    def _measure(self, model: Model, done: Round) -> None:
        assert done.streams is not None
        rows, width = list[int](), done.path.shape[1]
        for s, accepted in enumerate(ints(done.verdict.accepted)):
            rows += [s * width + row for row in ints(done.verdict.path[s, : accepted + 1])]
        seen = torch.tensor(rows[-ROWS:], device=done.path.device)
        hidden = torch.cat([done.streams[2 * layer][seen] for layer in range(1, self._full.num_layers)])
        predicted = model.predict(hidden, tile=model.ops.prefill_tile)
        shape = (self._full.num_layers - 1, len(seen))
        sure = (predicted.value.float() - predicted.log_sum_exp.float()).exp().view(shape).cpu()
        agrees = (predicted.token.view(shape) == done.target.flatten()[seen]).cpu()
        for token in range(len(seen)):
            self._learn(agrees[:, token], sure[:, token])

    def _learn(self, agrees: Tensor, sure: Tensor) -> None:
        """Take in a token: a mean of all of its kind at first, then an average that moves by `WEIGHT`."""
        self._tokens += 1
        self.rates += max(WEIGHT, 1 / self._tokens) * (agrees.float() - self.rates)
        kind = torch.stack([agrees, ~agrees])
        self._seen += kind
        self._sure += kind * (1 / self._seen.clamp(min=1)).clamp(min=WEIGHT) * (sure - self._sure)


def best(rates: Tensor, num_layers: int, longest: int) -> tuple[int, int]:
    """The exit l and draft length k with the most tokens a layer: ((1−α^{k+1})/(1−α)) / ((L−l) + (k+1)·l).

    rates [L − 1], exit 1 first. Length 0 is plain decoding, one token for L layers.
    """
    chosen, most = (max(1, 2 * num_layers // 3), 0), 1 / num_layers
    for layer in range(1, num_layers):
        for k in range(1, longest + 1):
            value = expected_tokens(float(rates[layer - 1]), k) / (num_layers - layer + (k + 1) * layer)
            if value > most:
                chosen, most = (layer, k), value
    return chosen
