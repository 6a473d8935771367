"""Which sub-layers a pass runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from .errors import RequestError
from .keep_sets import keep_set


@dataclass(frozen=True)
class LayerPlan:
    """The sub-layers of one pass through a model of L layers.

    Sub-layer 2i is the attention block of layer i, 2i+1 its MLP block. A sub-layer that does not run is the identity:
    its norm is skipped too, and a skipped attention block writes no keys and values, unless `fill` lets it write those
    of the residual stream that passes by. `span` (a, b), in sub-layers, is the part of the model the pass covers: the
    residual stream enters before sub-layer a and leaves after b - 1.
    """

    runs: tuple[bool, ...]
    span: tuple[int, int]
    fill: bool = False

    @staticmethod
    def full(num_layers: int) -> LayerPlan:
        """Every sub-layer of `num_layers` layers."""
        return LayerPlan((True,) * (2 * num_layers), (0, 2 * num_layers))

    def without(self, attention: Iterable[int] = (), mlp: Iterable[int] = ()) -> LayerPlan:
        """The same plan with the attention and MLP blocks of the given layers skipped."""
        return self.skipping([*(2 * self._layer(i) for i in attention), *(2 * self._layer(i) + 1 for i in mlp)])

    def skipping(self, sublayers: Iterable[int]) -> LayerPlan:
        """The same plan with the given sub-layers skipped."""
        skipped = set(sublayers)
        for i in skipped:
            self._between(i, 0, len(self.runs) - 1, "sub-layer")
        return replace(self, runs=tuple(run and i not in skipped for i, run in enumerate(self.runs)))

    def early_exit(self, exit_layer: int) -> LayerPlan:
        """Layers 0 to `exit_layer` - 1 (LayerSkip, arXiv 2404.16710: self-drafting)."""
        self._between(exit_layer, 1, self.num_layers, "exit_layer")
        return replace(self, span=(0, 2 * exit_layer))

    def resume(self, exit_layer: int) -> LayerPlan:
        """Layers `exit_layer` to L - 1, entered with a residual stream (LayerSkip: self-verification)."""
        self._between(exit_layer, 0, self.num_layers - 1, "exit_layer")
        return replace(self, span=(2 * exit_layer, 2 * self.num_layers))

    def between(self, first: int, last: int) -> LayerPlan:
        """Layers `first` to `last` - 1, entered with a residual stream; none where they are equal."""
        self._between(last, 0, self.num_layers, "last")
        self._between(first, 0, last, "first")
        return replace(self, span=(2 * first, 2 * last))

    def keeping(self, layers: Iterable[int]) -> LayerPlan:
        """The same plan with every layer but the given ones skipped."""
        kept = {self._layer(i) for i in layers}
        skipped = [i for i in range(self.num_layers) if i not in kept]
        return self.without(attention=skipped, mlp=skipped)

    def balanced(self, speedup: float, rule: str = "auto") -> LayerPlan:
        """Evenly spaced layers, about 1 in `speedup` (Unified Layer Skipping, arXiv 2404.06954).

        `rule` paper is the authors' own, for a whole `speedup` that leaves two layers or more; general is rounded even
        spacing; auto is the first where it is defined.
        """
        return self.keeping(keep_set(self.num_layers, speedup, rule=rule))

    @property
    def num_layers(self) -> int:
        return len(self.runs) // 2

    @cached_property
    def sublayers(self) -> tuple[int, ...]:
        """The sub-layers that run, in order."""
        return tuple(i for i in range(*self.span) if self.runs[i])

    @property
    def mask(self) -> tuple[bool, ...]:
        """Of each sub-layer of the model whether it runs; one beyond the span does not."""
        first, end = self.span
        return tuple(run and first <= i < end for i, run in enumerate(self.runs))

    @property
    def fills(self) -> dict[int, range]:
        """The layers whose keys and values are filled, by the sub-layer before which: one that runs, or the end.

        Between two sub-layers that run the residual stream is the same, so one range is filled at once.
        """
        if not self.fill:
            return {}
        first, end = self.span
        gaps = zip((first, *(i + 1 for i in self.sublayers)), (*self.sublayers, end), strict=True)
        ranges = {after: range((before + 1) // 2, (after + 1) // 2) for before, after in gaps}
        return {place: layers for place, layers in ranges.items() if layers}

    @property
    def skipped(self) -> int:
        """How many sub-layers of the model do not run."""
        return len(self.runs) - len(self.sublayers)

    @property
    def skipped_attention(self) -> tuple[int, ...]:
        return tuple(i // 2 for i in range(*self.span) if i % 2 == 0 and not self.runs[i])

    @property
    def skipped_mlp(self) -> tuple[int, ...]:
        return tuple(i // 2 for i in range(*self.span) if i % 2 == 1 and not self.runs[i])

    @property
    def layers_kept(self) -> float:
        """Layers' worth of sub-layers that run."""
        return len(self.sublayers) / 2

    def _layer(self, index: int) -> int:
        self._between(index, 0, self.num_layers - 1, "layer")
        return index

    @staticmethod
    def _between(value: int, low: int, high: int, name: str) -> None:
        if not low <= value <= high:
            raise RequestError(f"{name}: expected {low} to {high}, got {value}")
