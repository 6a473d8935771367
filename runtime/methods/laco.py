"""LaCo (arXiv 2402.11187): layers merged into their neighbours when the weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ...loaders.config import ModelConfig
from ...loaders.weights import Weights
from ..calibration import Calibration, Encode
from ..errors import RequestError
from ..merging import RULES, Build, Merged, Scan, Similarity, remove_layers, search
from ..plan import LayerPlan
from ..sequence import Sequence
from .checked import Checked, OneOf, Within
from .policy import Planned


@dataclass(frozen=True)
class Options(Checked, method="laco"):
    """`followers` layers merged into layer `base`, by `rule` paper or code; or, without a base, those a search finds.

    The search merges `merge_layers` layers at a time, from `highest` (0: the last layer) down to `lowest`, keeps what
    stays more similar to the whole model than `threshold` on the texts of the file `calibration`, or on our own, and
    goes on `interval` layers lower. With `remove` it ends when so many layers are gone, and lowers the threshold until
    they are.
    """

    base: int = -1
    followers: int = 0
    rule: Annotated[str, OneOf(RULES)] = "paper"
    merge_layers: Annotated[int, Within(2, 512)] = 4
    interval: Annotated[int, Within(1, 512)] = 2
    threshold: Annotated[float, Within(-1, 1)] = 0.65
    lowest: int = 0
    highest: int = 0
    remove: int = 0
    calibration: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.base < 0) != (self.followers == 0):
            raise RequestError("method laco: options base and followers come together")


class LaCo(Planned):
    """Plain decoding of a model whose layers were merged when it was loaded."""

    name = "laco"
    options = Options
    edits = True

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        options.expect("base", Within(-1, num_layers - 2))
        options.expect("followers", Within(0, num_layers - 1 - max(options.base, 0)))
        for option in ("remove", "lowest", "highest"):
            options.expect(option, Within(0, num_layers - 1))
        self._options = options
        self._calibration = Calibration.read(options.calibration, "method laco: option calibration")
        self._findings: list[Mapping[str, Any]] = []

    def edit(
        self, config: ModelConfig, weights: Weights, build: Build, encode: Encode | None
    ) -> tuple[ModelConfig, Weights]:
        merged = self.merged(config, weights, build, encode)
        self._full = LayerPlan.full(merged.config.num_layers)
        self._findings.append({"kind": "merge", "rule": self._options.rule, **merged.report()})
        return merged.config, merged.weights

    def merged(self, config: ModelConfig, weights: Weights, build: Build, encode: Encode | None) -> Merged:
        """The model with the layers merged that the options name, or that the search finds.

        Raises:
            RequestError: the calibration file cannot be used, or no threshold removes as many layers as asked for.
        """
        original, options = Merged.of(config, weights), self._options
        if options.base >= 0:
            return original.merge(options.base, options.followers, options.rule)
        highest = options.highest or config.num_layers - 1
        scan = Scan(options.merge_layers, options.interval, options.threshold, options.lowest, highest)
        similarity = Similarity(original, build, self._calibration.ids(config, encode))
        if not options.remove:
            return search(original, similarity, scan, options.rule)
        found = remove_layers(original, similarity, scan, options.rule, options.remove)
        if found is None:
            raise RequestError(f"method laco: option remove: no threshold removes {options.remove} layers in this scan")
        return found

    def notes(self, executed_skips: int) -> list[str]:
        """The merged layers run for every token; what was merged is a finding."""
        return []

    def findings(self, sequence: Sequence) -> list[Mapping[str, Any]]:
        return self._findings
