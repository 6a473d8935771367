"""Projection: measured step costs of a shape and published acceptance, put together. Nothing here was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.costs import Costs, expected_tokens
from ..runtime.errors import ConfigError
from ..runtime.plan import LayerPlan
from .published import PUBLISHED, Published
from .record import Sheet, device

LABEL = "PROJECTION, not a measurement"
MAX_DRAFT = 16
NOTES = (
    f"{LABEL}: step costs measured on the device named above, acceptance as published for another model; speed-up = "
    "E / (k·c + v), c = t_draft / t_decode, v = t_verify(k+1) / t_decode, E = 1 + k · acceptance rate. Search, prefill "
    "and the host between passes cost nothing here; drafts are verified by a full pass.",
    "Where a paper's acceptance could not be confirmed there is no projection: α needed is the chance of a draft token "
    "to be accepted after those before it were, with which these costs would give the published speed-up, "
    f"at the best k up to {MAX_DRAFT}.",
    "Published speed-ups are over each paper's own plain decoding, on its own hardware.",
)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the passes of a model of `layers` layers: by layers kept of a draft, by rows of a verification."""

    shape: str
    layers: int
    decode: float
    draft_by_layers: tuple[tuple[float, float], ...]
    verify_by_rows: tuple[tuple[float, float], ...]

    def fields(self) -> dict[str, Any]:
        """For a result file; `costs_of` reads them back."""
        return {
            "shape": self.shape,
            "layers": self.layers,
            "t_decode": self.decode,
            "t_draft": {f"{layers:g}": seconds for layers, seconds in self.draft_by_layers},
            "t_verify": {f"{rows:g}": seconds for rows, seconds in self.verify_by_rows},
        }

    def draft(self, kept: float) -> float:
        """A draft step that keeps this share of the layers, on the line through the measured ones."""
        layers, seconds = zip(*self.draft_by_layers, strict=True)
        slope, fixed = np.polyfit(layers, seconds, 1)
        return float(fixed + slope * kept * self.layers)

    def verify(self, rows: int) -> float:
        """A verification of this many rows, between the measured numbers; past the last, in proportion."""
        counts, seconds = zip(*self.verify_by_rows, strict=True)
        return float(np.interp(rows, counts, seconds)) * max(1.0, rows / counts[-1])

    def speedup(self, kept: float, k: int, tokens: float) -> float:
        """E / (k·c + v) for rounds of `tokens` tokens on average."""
        return tokens * self.decode / (k * self.draft(kept) + self.verify(k + 1))


@dataclass(frozen=True)
class Row:
    """A published result and what these costs make of it; `projected` is None where its acceptance is not known.

    `needed` is the acceptance with which the published speed-up would be reached here; None where none suffices.
    """

    method: str
    source: str
    model: str
    task: str
    k: int | None
    acceptance: float | None
    published: float
    projected: float | None
    tokens_per_s: float | None
    needed: float | None


def costs_of(result: Mapping[str, Any]) -> StepCosts:
    """The step costs in a result of `skipjack bench decode` or of `skipjack bench project`.

    Raises:
        ConfigError: they are not there.
    """
    try:
        found = _of_passes(result) if "passes" in result else _of_fields(result["costs"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"--costs: expected a result of `skipjack bench decode`: {error!r}") from error
    if len(found.draft_by_layers) < 2 or not found.verify_by_rows:
        raise ConfigError("--costs: expected draft steps of two numbers of layers at least, and one verification")
    return found


def _of_passes(result: Mapping[str, Any]) -> StepCosts:
    verify = {one["rows"]: one["seconds"]["median"] for one in result["passes"] if one["kind"] == "verify"}
    draft = {one["layers"]: one["seconds"]["median"] for one in result["passes"] if one["kind"] == "draft"}
    layers = max(one["layers"] for one in result["passes"])
    fields = {"shape": result["model"], "layers": layers, "t_decode": verify[1], "t_draft": draft, "t_verify": verify}
    return _of_fields(fields)


def _of_fields(fields: Mapping[str, Any]) -> StepCosts:
    draft, verify = (
        tuple(sorted((float(count), float(seconds)) for count, seconds in fields[name].items()))
        for name in ("t_draft", "t_verify")
    )
    return StepCosts(fields["shape"], int(fields["layers"]), float(fields["t_decode"]), draft, verify)


def costs_from(calibrated: Costs, shape: str) -> StepCosts:
    """The step costs an engine measured when it was loaded (runtime/costs.py)."""
    layers = calibrated.sublayers // 2
    full = LayerPlan.full(layers)
    draft = tuple((float(n), calibrated.draft(full.early_exit(n), 1)) for n in (1, max(2, layers // 2)))
    verify = tuple((float(rows), calibrated.verify(rows)) for rows in range(1, MAX_DRAFT + 2))
    return StepCosts(shape, layers, calibrated.verify(1), draft, verify)


def project(costs: StepCosts, published: Sequence[Published] = PUBLISHED) -> list[Row]:
    """Every published result on these costs."""
    return [_row(costs, one) for one in published]


def needed_acceptance(costs: StepCosts, kept: float, speedup: float) -> float | None:
    """The least acceptance per token with which some draft length reaches `speedup`, to three digits; None if none."""

    def best(rate: float) -> float:
        return max(costs.speedup(kept, k, expected_tokens(rate, k)) for k in range(1, MAX_DRAFT + 1))

    if best(1.0) < speedup:
        return None
    low, high = 0.0, 1.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if best(middle) >= speedup else (middle, high)
    return high


def sheet(result: dict[str, Any]) -> Sheet:
    """The rows as a table."""
    columns = (
        "method",
        "paper's model and task",
        "k",
        "acceptance",
        "published",
        "PROJECTED",
        "projected tokens/s",
        "α needed here",
        "source",
    )
    sources = list(dict.fromkeys(row["source"] for row in result["rows"]))
    rows = tuple(
        (
            row["method"],
            f"{row['model']}, {row['task']}",
            str(row["k"] or ""),
            "" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
            f"{row['published']:.2f}×",
            "" if row["projected"] is None else f"{row['projected']:.2f}×",
            "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}",
            "out of reach" if row["needed"] is None else f"{row['needed']:.2f}",
            f"[{sources.index(row['source']) + 1}]",
        )
        for row in result["rows"]
    )
    where = f"costs of {result['shape']}, {result['dtype']}, {device(result['machine'])}"
    cited = tuple(f"[{number}] {source}." for number, source in enumerate(sources, start=1))
    return Sheet(f"{LABEL}: {where}", columns, rows, (*NOTES, *cited))


def _row(costs: StepCosts, one: Published) -> Row:
    projected = None
    if one.k is not None and one.acceptance is not None:
        projected = costs.speedup(one.kept, one.k, 1 + one.k * one.acceptance)
    return Row(
        one.method,
        one.source,
        one.model,
        one.task,
        one.k,
        one.acceptance,
        round(one.speedup, 2),
        projected,
        None if projected is None else projected / costs.decode,
        needed_acceptance(costs, one.kept, one.speedup),
    )
