"""Static pruning: the same layers are left out for every token, of every text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

from ..errors import RequestError
from ..plan import LayerPlan
from .checked import Checked, OneOf
from .policy import Planned

Phase: TypeAlias = Annotated[str, OneOf(("both", "prefill"))]
SkippedKV: TypeAlias = Annotated[str, OneOf(("hole", "fill"))]


@dataclass(frozen=True)
class Options(Checked, method="static"):
    """Whole layers `skip`, left out of prompts and decoding (`phase` both) or of prompts alone (prefill).

    `kv` fill: a skipped layer still writes the keys and values of the residual stream that passes by; hole: none, and
    none are read. Decoding at full depth reads every layer's, so that `phase` prefill needs fill.
    """

    skip: tuple[int, ...] = ()
    phase: Phase = "both"
    kv: SkippedKV = "hole"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_written("static", self.phase, self.kv)
        if not self.skip:
            raise RequestError("method static: option skip expects layers joined with +, got none")


class Pruned(Planned):
    """Whole layers left out, in both phases or in prompts alone; options `phase` and `kv`."""

    def __init__(self, options: Any, num_layers: int) -> None:
        super().__init__(options, num_layers)
        self._prefill_only, self._fill = options.phase == "prefill", options.kv == "fill"
        self._pruned = self._full

    def remove(self, layers: Iterable[int]) -> None:
        """Leave these layers out from now on."""
        layers = tuple(layers)
        self._pruned = replace(self._full.without(attention=layers, mlp=layers), fill=self._fill)

    @property
    def plan(self) -> LayerPlan:
        return self.target

    @property
    def target(self) -> LayerPlan:
        return self._full if self._prefill_only else self._pruned

    @property
    def prompt(self) -> LayerPlan:
        return self._pruned


class Static(Pruned):
    """Layers left out by hand."""

    name = "static"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        wrong = next((layer for layer in options.skip if not 0 <= layer < num_layers), None)
        if wrong is not None:
            raise RequestError(f"method static: option skip expects layers from 0 to {num_layers - 1}, got {wrong}")
        self.remove(options.skip)


def expect_written(method: str, phase: str, kv: str) -> None:
    """Refuse, with a RequestError, decoding that would read what no prompt wrote."""
    if phase == "prefill" and kv == "hole":
        raise RequestError(
            f"method {method}: phase=prefill expects kv=fill, got kv=hole: decoding at full depth would read keys and "
            "values that the prompt never wrote"
        )
