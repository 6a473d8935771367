"""Unified Layer Skipping (arXiv 2404.06954): one keep-set for every generated token, spread evenly over the depth."""

from __future__ import annotations

from dataclasses import dataclass

from ..keep_sets import keep_set
from ..plan import LayerPlan
from .policy import Planned


@dataclass(frozen=True)
class Options:
    """About 1 layer in `speedup` runs for generated tokens.

    `rule` auto is the authors' where it is defined (a whole `speedup` that keeps two layers or more), else general;
    paper and general force one. `pattern` says where the skipped layers lie: balanced, top (the last ones), bottom
    (the first) or random (drawn with `seed`); all but balanced are the paper's ablation.
    """

    speedup: float = 2.0
    rule: str = "auto"
    pattern: str = "balanced"
    seed: int = 0


class Unified(Planned):
    """The prompt at full depth, every generated token by the keep-set.

    A skipped layer is the identity and leaves no keys and values for generated tokens; it runs for none of them, so
    nobody reads there. The set depends on nothing but the depth: a batch runs as one.
    """

    name = "unified"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        kept = keep_set(num_layers, options.speedup, rule=options.rule, pattern=options.pattern, seed=options.seed)
        self._kept = self._full.keeping(kept)

    @property
    def plan(self) -> LayerPlan:
        return self._kept

    @property
    def target(self) -> LayerPlan:
        return self._kept

    @property
    def prompt(self) -> LayerPlan:
        return self._full
