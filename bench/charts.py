"""Pictures of measured runs, as SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..runtime.errors import SkipjackError
from ..runtime.request import Stats
from .methods import Line

ACCUMULATION, OPTIMISATION, ACCELERATION = "gold", "crimson", "seagreen"
RESTING = "lightgrey"


def speeds(lines: Sequence[Line], path: Path, title: str) -> None:
    """Bars of the median speed of every method and category; whiskers from p10 to p90, a tick at the ideal.

    Raises:
        SkipjackError: matplotlib is not installed.
    """
    pyplot = pyplot_svg()
    methods = list(dict.fromkeys(line.method for line in lines))
    categories = list(dict.fromkeys(line.category for line in lines))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(categories) + 2), 4))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        own = [line for line in lines if line.method == method]
        x = [categories.index(line.category) + (i - (len(methods) - 1) / 2) * width for line in own]
        low, high = ([abs(line.speed - getattr(line, p)) for line in own] for p in ("speed_p10", "speed_p90"))
        axes.bar(x, [line.speed for line in own], width, label=method, yerr=[low, high], error_kw={"lw": 0.8})
        axes.scatter(x, [line.ideal for line in own], marker="_", color="black", s=160 * width, zorder=3)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right")
    axes.set_ylabel("tokens/s ÷ plain decoding (black tick: ideal)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    save(pyplot, figure, path)


def timeline(stats: Stats, window: int, path: Path, title: str) -> None:
    """SWIFT's run over its tokens: accumulation, optimisation steps, acceleration; below, the best matchness.

    Raises:
        SkipjackError: matplotlib is not installed.
    """
    pyplot = pyplot_svg()
    figure, (band, curve) = pyplot.subplots(2, 1, figsize=(8, 4.5), height_ratios=(1, 3))
    colours = {"accumulation": ACCUMULATION, "acceleration": ACCELERATION}
    ends = [first for _, first in stats.phases[1:]] + [stats.completion_tokens]
    for (name, first), end in zip(stats.phases, ends, strict=True):
        band.axvspan(first, end, color=colours.get(name, RESTING), lw=0)
        if name == "acceleration" and first > window:
            band.text(first, 1.02, "mN", transform=band.get_xaxis_transform(), fontsize=7, ha="center")
    steps = [event for event in stats.events if "score" in event]
    for token in sorted({int(event["tokens"]) for event in steps}):
        band.axvline(token, color=OPTIMISATION, lw=2)
    marks = range(0, stats.completion_tokens + 1, window)
    band.set_xticks(marks, ["0", "N", *(f"{i}N" for i in range(2, len(marks)))][: len(marks)], fontsize=7)
    band.set_xlim(0, max(1, stats.completion_tokens))
    band.set_yticks([])
    band.set_title(title, fontsize=9)
    for name, colour in (*colours.items(), ("optimisation", OPTIMISATION)):
        band.plot([], [], color=colour, lw=6, label=name)
    band.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    for kind, marker in (("random", "."), ("bayesian", "*")):
        own = [event for event in steps if event["kind"] == kind]
        curve.plot([e["iteration"] for e in own], [e["score"] for e in own], marker, label=kind, color="grey")
    curve.step(
        [e["iteration"] for e in steps], [e["best"] for e in steps], where="post", label="best", color=OPTIMISATION
    )
    curve.set_xlabel("candidate")
    curve.set_ylabel("matchness")
    curve.legend(fontsize=7)
    save(pyplot, figure, path)


def pyplot_svg() -> Any:
    """matplotlib's pyplot, drawing SVG.

    Raises:
        SkipjackError: matplotlib is not installed.
    """
    try:
        matplotlib: Any = import_module("matplotlib")
    except ImportError as error:
        raise SkipjackError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "skipjack"
    return import_module("matplotlib.pyplot")


def kind_of(path: Path) -> str:
    """svg or png, by the suffix; SkipjackError where it is another."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("svg", "png"):
        raise SkipjackError(f"{path}: expected a picture's name to end in .svg or .png")
    return kind


def save(pyplot: Any, figure: Any, path: Path) -> None:
    """Write a figure as SVG or PNG, by the suffix, and close it; the same figure gives the same file.

    Raises:
        SkipjackError: another suffix, or the disk refuses.
    """
    kind = kind_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.tight_layout()
        figure.savefig(path, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    except OSError as problem:
        raise SkipjackError(f"{path}: cannot be written: {problem.strerror or problem}") from None
    finally:
        pyplot.close(figure)
