"""LaCo (arXiv 2402.11187): layers merged into their neighbours when the weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ...loaders.config import ModelConfig
from ...loaders.weights import Weights
from ..calibration import Calibration, Encode
from ..errors import RequestError
from ..merging import RULES, Build, Merged, Scan, Similarity, Trial, remove_layers, search
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
    rule: Annotated[str, OneOf(RULES)] = "code"
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
        highest = options.highest or num_layers - 1
        self._scan = Scan(options.merge_layers, options.interval, options.threshold, options.lowest, highest)
        if options.base < 0 and highest - options.merge_layers < options.lowest:
            raise RequestError(
                "method laco: options highest, merge_layers and lowest: expected highest - merge_layers to be at least "
                f"lowest, got {highest} - {options.merge_layers} and {options.lowest}"
            )
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
        similarity = Similarity(original, build, self._calibration.ids(config, encode))
        if not options.remove:
            return search(original, similarity, self._scan, options.rule)
        found = remove_layers(original, similarity, self._scan, options.rule, options.remove)
        if found is None:
            raise RequestError(f"method laco: option remove: no threshold removes {options.remove} layers in this scan")
        return found

    @property
    def candidates(self) -> int:
        """How many candidates a search tries at most; 0 where it goes on until enough layers are gone."""
        return 0 if self._options.remove else self._scan.highest - self._scan.merge_layers - self._scan.lowest + 1

    def none_found(self, trace: Iterable[Trial]) -> str:
        """Why a search found nothing, and what would let it find something."""
        best, options = max(trace, key=lambda trial: trial.similarity), self._options
        layers = "+".join(map(str, range(best.layer, best.layer + best.followers + 1)))
        advice = ["lower threshold"]
        if options.rule != "code":
            advice.append("set rule=code")
        if options.merge_layers > 2:
            advice.append(f"merge fewer than merge_layers={options.merge_layers} at a time")
        return (
            f"option threshold: expected less than the best similarity of a candidate, {best.similarity:.3f} "
            f"(layers {layers} merged by rule {options.rule}), got {options.threshold:g}: {' or '.join(advice)}"
        )

    def notes(self, executed_skips: int) -> list[str]:
        """The merged layers run for every token; what was merged is a finding."""
        return []

    def findings(self, sequence: Sequence) -> list[Mapping[str, Any]]:
        return self._findings
