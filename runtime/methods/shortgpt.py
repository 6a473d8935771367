"""ShortGPT (arXiv 2403.03853): the layers that turn the residual stream least are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ..calibration import Calibration, Encode
from ..errors import RequestError
from ..influence import block_influence, removal_order
from ..model import Model
from ..sequence import Sequence
from ..stepwise import Stepwise
from .base import expect_layers
from .checked import Checked, OneOf, Within
from .static import Phase, Pruned, SkippedKV, expect_written


@dataclass(frozen=True)
class Options(Checked, method="shortgpt"):
    """The `n` layers of lowest block influence, left out as `static` leaves its own out (`phase`, `kv`).

    `n` 0 is a quarter of the layers. The influence is measured on the texts of the file `calibration`, or on our own,
    in windows of `window` tokens; `rule` official is that of the authors' code, which sees the last layer through the
    final norm.
    """

    n: int = 0
    phase: Phase = "both"
    kv: SkippedKV = "hole"
    calibration: str = ""
    window: Annotated[int, Within(1, 1024)] = 256
    rule: Annotated[str, OneOf(("mean", "official"))] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_written("shortgpt", self.phase, self.kv)


class ShortGPT(Pruned):
    """Static pruning whose layers a calibration chooses when the engine is loaded."""

    name = "shortgpt"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        expect_layers("shortgpt", num_layers)
        count = options.n or max(1, num_layers // 4)
        if not 1 <= count < num_layers:
            raise RequestError(f"method shortgpt: option n expects 0 to {num_layers - 1}, got {options.n}")
        super().__init__(options, num_layers)
        self._options, self._count = options, count
        self._calibration = Calibration.read(options.calibration, "method shortgpt: option calibration")
        self._findings: list[Mapping[str, Any]] = []

    def prepare(self, model: Model, encode: Encode | None) -> Stepwise[None]:
        options = self._options
        texts = self._calibration.ids(model.config, encode)
        influence = yield from block_influence(model, texts, options.window, official=options.rule == "official")
        removed = tuple(sorted(removal_order(influence)[: self._count]))
        self.remove(removed)
        tokens = sum(len(text) for text in texts)
        values = [float(value) for value in influence]
        self._findings.append({"kind": "influence", "influence": values, "removed": list(removed), "tokens": tokens})

    def findings(self, sequence: Sequence) -> list[Mapping[str, Any]]:
        return self._findings
