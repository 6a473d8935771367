"""The speed this project sets itself, T1 to T18, and whether a measurement reaches it.

Everything is a ratio measured in one run, except where a unit is given. Meant for an H200 in bfloat16 at contexts of up
to 512 tokens, greedy, with random weights of the named shape: 8b is Llama-3.1-8B, 4b Qwen3-4B, 1b Llama-3.2-1B, 135m
SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("must", "target", "moonshot")
GPU = "H200"
NOT_MEASURED = "not measured"
Key = tuple[str, str]


@dataclass(frozen=True)
class Target:
    """A measure, the shape or setting it is taken at, and three levels; `higher` says which side of them is good."""

    id: str
    case: str
    what: str
    must: float
    target: float
    moonshot: float
    higher: bool = False
    unit: str = ""

    @property
    def key(self) -> Key:
        return self.id, self.case

    def reached(self, level: str, measured: float | None) -> bool | None:
        """Whether `measured` reaches a level; None if nothing was measured."""
        if measured is None:
            return None
        wanted = getattr(self, level)
        return measured >= wanted if self.higher else measured <= wanted


@dataclass(frozen=True)
class Measurement:
    """What was measured for a target; None is not measured, and `note` says why or how."""

    id: str
    case: str
    value: float | None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One level of one target in a result file."""

    id: str
    case: str
    level: str
    what: str
    unit: str
    target: float
    measured: float | None
    passed: bool | None
    note: str


def _each(id: str, what: str, levels: Mapping[str, tuple[float, float, float]], **rest: Any) -> list[Target]:
    return [Target(id, case, what, *three, **rest) for case, three in levels.items()]


def _same(
    id: str, what: str, cases: Iterable[str], must: float, target: float, moonshot: float, **rest: Any
) -> list[Target]:
    return [Target(id, case, what, must, target, moonshot, **rest) for case in cases]


SHAPES = ("8b", "1b", "135m")
KERNELS = tuple(f"{shape} {kernel}" for shape in ("8b", "1b") for kernel in ("up", "down", "head"))
FRACTIONS = (0.25, 0.5, 0.75)
# Those with targets of their rounds first: a part may be cut short.
DRAFTS = ("1b", "8b")

TARGETS: tuple[Target, ...] = (
    *_same("T1", "bubble per layer", SHAPES, 14e-6, 10e-6, 6e-6, unit="s"),
    Target("T2", "8b", "plain step, share of copy bandwidth", 0.87, 0.91, 0.94, higher=True),
    Target("T3", "1b", "plain step, share of copy bandwidth", 0.72, 0.78, 0.85, higher=True),
    Target("T4", "135m", "plain step, share of copy bandwidth", 0.12, 0.20, 0.25, higher=True),
    *_same("T5", "kernel alone, cold L2, share of copy bandwidth", KERNELS, 0.88, 0.92, 0.95, higher=True),
    *_each(
        "T6", "verify(8) ÷ decode(1)", {"8b": (1.15, 1.08, 1.05), "1b": (1.25, 1.12, 1.08), "135m": (1.3, 1.15, 1.10)}
    ),
    *_each("T7", "verify(16) ÷ decode(1)", {"8b": (1.3, 1.15, 1.10), "1b": (1.4, 1.25, 1.15)}),
    *_same(
        "T8",
        "draft step ÷ linear ideal",
        [f"{shape} f={fraction}" for shape in DRAFTS for fraction in FRACTIONS],
        1.25,
        1.10,
        1.05,
    ),
    *_same("T9", "R² of draft time against layers kept", DRAFTS, 0.99, 0.998, 0.999, higher=True),
    *_same("T10", "glue, share of a round", ["glue"], 0.05, 0.02, 0.005),
    *_same("T10", "host syncs per round", ["host syncs"], 0, 0, 0),
    Target("T11", "1b", "end-to-end speed-up ÷ ideal, forced acceptance", 0.85, 0.90, 0.95, higher=True),
    *_each(
        "T12",
        "speed ÷ transformers, static cache and compile",
        {"8b": (1.1, 1.25, 1.4), "1b": (1.5, 2, 2.5), "135m": (2, 3, 4)},
        higher=True,
    ),
    *_each(
        "T13",
        "speed ÷ torch.compile decode loop",
        {"8b": (1.05, 1.1, 1.15), "1b": (1.2, 1.4, 1.6), "135m": (1.5, 2, 2.5)},
        higher=True,
    ),
    Target("T14", "exact", "tokens equal to plain decoding, of at least 10 000", 1, 1, 1, higher=True),
    Target("T15", "8b batch 1", "FlexiDepth: time saved ÷ weight bytes saved", 0.5, 0.7, 0.9, higher=True),
    Target("T16", "4b", "DMTD, 4 tokens a cycle: speed-up ÷ 2.11", 0.8, 0.9, 0.95, higher=True),
    *_same(
        "T17",
        "Unified at speedup 2: speed-up ÷ (L + h)/(K + h)",
        ["8b batch 1", "8b batch 8"],
        0.9,
        0.95,
        0.98,
        higher=True,
    ),
    Target("T18", "engine", "Triton compilations after warm-up", 0, 0, 0),
)


def of(ids: Iterable[str]) -> list[Target]:
    """The targets with these ids, in the table's order."""
    wanted = set(ids)
    return [target for target in TARGETS if target.id in wanted]


def judge(targets: Iterable[Target], measurements: Iterable[Measurement]) -> list[Row]:
    """Three rows for every target; one without a measurement is not measured, never passed.

    Raises:
        KeyError: a measurement belongs to none of the targets.
    """
    found = {target.key: Measurement(*target.key, None, NOT_MEASURED) for target in targets}
    chosen = {target.key: target for target in targets}
    for measurement in measurements:
        key = measurement.id, measurement.case
        found[chosen[key].key] = measurement
    return [
        Row(
            target.id,
            target.case,
            level,
            target.what,
            target.unit,
            getattr(target, level),
            found[key].value,
            target.reached(level, found[key].value),
            found[key].note,
        )
        for key, target in chosen.items()
        for level in LEVELS
    ]


def best(passed: Mapping[str, bool | None]) -> str:
    """The highest level of one target that was passed, "falls short", or "not measured"."""
    if None in passed.values():
        return NOT_MEASURED
    return next((level for level in reversed(LEVELS) if passed.get(level)), "falls short")


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows for a result file."""
    return [asdict(row) for row in rows]
