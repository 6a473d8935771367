"""Pictures of result files, one file a picture; the title names the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .charts import pyplot_svg, save, speeds
from .methods import Line
from .project import LABEL, costs_of
from .record import device, title

DRAFT, VERIFY, SEARCH, OTHER = "tab:blue", "tab:orange", "tab:purple", "lightgrey"


class NothingToDraw(Exception):
    """A result file without the figures a picture needs; the message says which."""


def methods(result: dict[str, Any], path: Path) -> None:
    """Speed of every method and category against plain decoding."""
    speeds([Line(**line) for line in result["summary"]], path, title(result))


def one_round(result: dict[str, Any], path: Path) -> None:
    """The parts of one round, medians over prompts, in units of a plainly decoded token."""
    pyplot = pyplot_svg()
    names = list(dict.fromkeys(row["method"] for row in result["rows"]))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.6 * len(names)))
    labelled: set[str] = set()
    for y, name in enumerate(names):
        rows = [row for row in result["rows"] if row["method"] == name and row["rounds"]]
        if not rows:
            continue
        start, steps = 0.0, float(np.median([row["depth"] for row in rows]))
        for part, colour in (("draft", DRAFT), ("verify", VERIFY), ("search", SEARCH), ("other", OTHER)):
            length = float(np.median([row[part] for row in rows]))
            label = part if part not in labelled else None
            labelled.add(part)
            axes.barh(y, length, left=start, color=colour, label=label, edgecolor="white", lw=0.5)
            if part == "draft" and steps >= 1:
                axes.vlines(
                    start + length / steps * np.arange(1, int(steps) + 1), y - 0.4, y + 0.4, color="white", lw=0.8
                )
            start += length
        tokens = 1 + sum(row["accepted"] for row in rows) / sum(row["rounds"] for row in rows)
        axes.plot([tokens, tokens], [y - 0.45, y + 0.45], color="black", lw=1.5)
    axes.plot([], [], color="black", lw=1.5, label="plain decoding of the same tokens")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("one round, in plainly decoded tokens (left of the black line is a gain)")
    axes.set_title(f"One round: {title(result)}", fontsize=9)
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    save(pyplot, figure, path)


def timeline(result: dict[str, Any], path: Path) -> None:
    """One round as the profiler saw it, milliseconds, parts in their order; a part is as long as on average."""
    pyplot = pyplot_svg()
    figure, axes = pyplot.subplots(figsize=(8, 1.8))
    start = 0.0
    colours = {"draft": DRAFT, "verify": VERIFY, "commit": "tab:green", "search": SEARCH, "other": OTHER}
    for name, colour in colours.items():
        own = [part for part in result["parts"] if part["part"].partition("[")[0] == name]
        for number, part in enumerate(own):
            length, label = part["round_ms"], name if number == 0 else None
            axes.barh(0, length, left=start, color=colour, edgecolor="white", lw=0.8, label=label)
            start += length
    axes.set_yticks([])
    axes.set_xlabel("ms")
    where = f"{result['model']}, {result['method']}, {device(result['machine'])}"
    axes.set_title(f"One round of {result['rounds']} profiled: {where}", fontsize=9)
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.55), frameon=False)
    save(pyplot, figure, path)


def draft_line(result: dict[str, Any], path: Path) -> None:
    """Time of a draft step against the layers it keeps, the line through it, and plain decoding."""
    pyplot = pyplot_svg()
    costs = costs_of(result)
    layers, seconds = (np.asarray(values) for values in zip(*costs.draft_by_layers, strict=True))
    slope, fixed = np.polyfit(layers, seconds, 1)
    around = float(((seconds - seconds.mean()) ** 2).sum())
    fit = 1 - float(((seconds - fixed - slope * layers) ** 2).sum()) / around if around else 1.0
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(layers, 1e3 * seconds, "o", color=DRAFT, label="measured draft step")
    span = np.array([0, costs.layers])
    axes.plot(span, 1e3 * (fixed + slope * span), color=DRAFT, lw=1, label=f"line, R² = {fit:.4f}")
    axes.plot([costs.layers], [1e3 * costs.decode], "s", color="black", label="plain decoding")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"layers kept, of {costs.layers}")
    axes.set_ylabel("ms")
    axes.set_title(f"Draft cost: {costs.shape}, {result['dtype']}, {device(result['machine'])}", fontsize=9)
    axes.legend(fontsize=8)
    save(pyplot, figure, path)


def acceptance(result: dict[str, Any], path: Path) -> None:
    """Speed-up at forced acceptance, end to end, under what the acceptance allows (v = 1, drafts as cheap as bytes)."""
    if not result["rounds"]:
        raise NothingToDraw("no rounds with forced acceptance")
    pyplot = pyplot_svg()
    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    for number, name in enumerate(dict.fromkeys(one["method"] for one in result["rounds"])):
        own = sorted((one for one in result["rounds"] if one["method"] == name), key=lambda one: one["rate"])
        rates, speeds_ = [one["rate"] for one in own], [one["speed"] for one in own]
        whiskers = [[abs(speed["median"] - speed[end]) for speed in speeds_] for end in ("p10", "p90")]
        colour, label = f"C{number}", f"{name.partition(':')[0]}, k = {own[0]['k']}"
        axes.errorbar(rates, [one["median"] for one in speeds_], whiskers, fmt="o", color=colour, ms=4, label=label)
        axes.plot(rates, [one["possible"] for one in own], color=colour, lw=1, ls="--")
    axes.plot([], [], color="black", lw=1, ls="--", label="ideal: E ÷ (k·(h + f·(1 − h)) + 1)")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xlabel("α, chance of a draft token to be accepted (forced)")
    axes.set_ylabel("tokens/s ÷ plain decoding")
    axes.set_title(f"Speed-up against acceptance: {title(result)}", fontsize=9)
    axes.legend(fontsize=8)
    save(pyplot, figure, path)


def roofline(result: dict[str, Any], path: Path) -> None:
    """FLOP/s of ops with a product over their FLOP a byte, under what was measured beside them.

    Ops without one are left out.
    """
    points = [one for one in result["figures"] if one["flops"]]
    if not points:
        raise NothingToDraw("no op with a matrix product")
    pyplot = pyplot_svg()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, op in enumerate(dict.fromkeys(one["op"] for one in points)):
        own = [one for one in points if one["op"] == op]
        x = [one["flops"] / one["bytes"] for one in own]
        y = [one["flops"] / one["seconds"]["median"] / 1e9 for one in own]
        axes.plot(x, y, "o", color=f"C{number}", ms=4, label=op)
        for one, a, b in zip(own, x, y, strict=True):
            axes.annotate(
                f"{one['shape']} ×{one['rows']}", (a, b), fontsize=5, xytext=(3, 0), textcoords="offset points"
            )
    rate, peak = result["bandwidth"][result["of"]], result["peak"]
    ridge = peak / rate
    span = np.array([0.5 * min(one["flops"] / one["bytes"] for one in points), 4 * ridge])
    roof = f"{result['of']} bandwidth {rate / 1e9:.0f} GB/s, large product {peak / 1e12:.3g} TFLOP/s, measured"
    corners = np.array([span[0], ridge, span[1]])
    axes.plot(corners, np.minimum(corners * rate, peak) / 1e9, color="black", lw=1, label=roof)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte a launch cannot avoid moving")
    axes.set_ylabel("GFLOP/s reached")
    axes.set_title(f"Roofline: {title(result)}", fontsize=9)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    save(pyplot, figure, path)


def bandwidth(result: dict[str, Any], path: Path) -> None:
    """The bandwidth every kernel reaches, over the bytes it cannot avoid, under the bandwidth measured beside it."""
    figures: list[dict[str, Any]] = result["figures"]
    roofs = {
        f["name"].partition(" ")[0]: f["median"] for f in figures if f["name"].endswith("bandwidth") and f["median"]
    }
    points = [f for f in figures if f["bytes"] and f["median"]]
    if not roofs or not points:
        raise NothingToDraw("no times in it (a dry run)")
    pyplot = pyplot_svg()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, shape in enumerate(dict.fromkeys(point["shape"] for point in points)):
        own = [point for point in points if point["shape"] == shape]
        x = [point["bytes"] / 1e6 for point in own]
        y = [point["bytes"] / point["median"] / 1e9 for point in own]
        axes.plot(x, y, "o", color=f"C{number}", ms=4, label=shape)
        for point, a, b in zip(own, x, y, strict=True):
            label = f"{point['name']} ×{point['rows']}"
            axes.annotate(label, (a, b), fontsize=5, xytext=(3, 0), textcoords="offset points")
    for (name, rate), style in zip(roofs.items(), ("-", "--"), strict=False):
        axes.axhline(
            rate / 1e9, color="black", lw=1, ls=style, label=f"measured {name} bandwidth, {rate / 1e9:.0f} GB/s"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB a launch cannot avoid moving")
    axes.set_ylabel("GB/s reached")
    axes.set_title(f"Kernels under the roof of bandwidth: {device(result['machine'])}", fontsize=9)
    axes.legend(fontsize=7)
    save(pyplot, figure, path)


def peers(result: dict[str, Any], path: Path) -> None:
    """Skipjack's plain decoding as a multiple of each peer's speed."""
    lines = [line for line in result["summary"] if line["unavailable"] is None]
    if not lines:
        raise NothingToDraw("no peer ran")
    pyplot = pyplot_svg()
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.5 * len(lines)))
    for y, line in enumerate(lines):
        whiskers = [[line["ratio"] - line["ratio_p10"]], [line["ratio_p90"] - line["ratio"]]]
        axes.barh(y, line["ratio"], xerr=np.maximum(whiskers, 0), color=DRAFT, error_kw={"lw": 0.8})
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(lines)), [line["peer"] for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("skipjack's plain decoding ÷ the peer, whole calls (whiskers p10 to p90)")
    axes.set_title(title(result), fontsize=9)
    save(pyplot, figure, path)


def projection(result: dict[str, Any], path: Path) -> None:
    """Projected beside published speed-ups, where the published acceptance is known."""
    rows = [row for row in result["rows"] if row["projected"] is not None]
    pyplot = pyplot_svg()
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.6 * len(rows)))
    for y, row in enumerate(rows):
        axes.barh(y - 0.2, row["published"], 0.38, color=OTHER, label="published, its own hardware" if not y else None)
        axes.barh(y + 0.2, row["projected"], 0.38, color=DRAFT, hatch="//", label="PROJECTED here" if not y else None)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['method']}: {row['model']}, {row['task']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over plain decoding")
    axes.set_title(f"{LABEL}: costs of {result['shape']}, {result['dtype']}, {device(result['machine'])}", fontsize=9)
    axes.legend(fontsize=7)
    save(pyplot, figure, path)
