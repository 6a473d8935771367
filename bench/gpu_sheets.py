"""Tables of `bench/gpu.sh` and of `make gpu-check`, from their result files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..loaders.synthetic import synthetic_config
from .record import Sheet, device, where
from .targets import LEVELS, NOT_MEASURED, best

# Ops, and what a step is without one kernel or by another rule, have lines of their own beside these.
_KERNELS = ("qkv", "attend", "output", "up", "down", "head")
Fields = dict[str, Any]


def sheets(result: Fields) -> tuple[Sheet, ...]:
    """The targets, steps and kernels, all other figures, and how many checks held, as far as a part has them."""
    machine = result["machine"]
    # A dry run's machine says that it measured nothing.
    place, note = device(machine), (machine.get("note") or f"Measured on {where(machine)}.",)
    figures, findings = result.get("figures", ()), result.get("findings", ())
    copy = next((one["median"] for one in figures if one["name"] == "copy bandwidth"), None)
    steps = [one for one in figures if one["name"] == "step" and one["median"]]
    kernels = [one for one in figures if one["name"] in _KERNELS]
    others = [one for one in figures if one not in steps and one not in kernels]
    made = [
        _findings(place, findings) if findings else None,
        _others(place, others) if others else None,
        _kernels(place, kernels) if kernels else None,
        _steps(place, steps, copy) if steps and copy else None,
        _targets(place, result["rows"]) if result.get("rows") else None,
    ]
    return tuple(Sheet(one.title, one.columns, one.rows, (*one.notes, *note)) for one in made if one)


def _targets(place: str, rows: Sequence[Fields]) -> Sheet:
    cases = dict.fromkeys((row["id"], row["case"]) for row in rows)
    lines: list[tuple[str, ...]] = []
    for case in cases:
        own = {row["level"]: row for row in rows if (row["id"], row["case"]) == case}
        first = own[LEVELS[0]]
        levels = [_number(own[level]["target"], first["unit"]) for level in LEVELS]
        reached = best({level: row["passed"] for level, row in own.items()})
        lines.append((*case, first["what"], _number(first["measured"], first["unit"]), *levels, reached))
    notes = [
        f"{row['id']} {row['case']}: {row['note']}"
        for row in rows
        if row["level"] == LEVELS[0] and row["measured"] is None and row["note"] not in ("", NOT_MEASURED)
    ]
    return Sheet(
        f"Targets: {place}",
        ("target", "case", "what", "measured", *LEVELS, "reached"),
        tuple(lines),
        tuple(dict.fromkeys(notes)),
    )


def _steps(place: str, steps: Sequence[Fields], copy: float) -> Sheet:
    """A line for each shape; more rows as a ratio to one."""
    counts = [rows for rows in dict.fromkeys(one["rows"] for one in steps) if rows > 1]
    lines: list[tuple[str, ...]] = []
    for shape in dict.fromkeys(one["shape"] for one in steps):
        own = {one["rows"]: one for one in steps if one["shape"] == shape}
        one = own[1]
        seconds, layers = one["median"], int(str(synthetic_config(shape)["num_hidden_layers"]))
        bubble = (seconds - one["bytes"] / copy) / layers
        ratios = [f"{own[rows]['median'] / seconds:.2f}" if rows in own else "" for rows in counts]
        share = f"{100 * one['share']:.1f}"
        lines.append((shape, f"{seconds * 1e6:.0f}", f"{1 / seconds:.0f}", share, f"{bubble * 1e6:.1f}", *ratios))
    return Sheet(
        f"A step of plain decoding: {place}",
        (
            "shape",
            "µs",
            "tokens/s",
            "% of a copy's bandwidth",
            "bubble a layer, µs",
            *(f"{n} rows ÷ 1" for n in counts),
        ),
        tuple(lines),
        (f"A captured graph of the pass and its head, random weights. A copy moved {copy / 1e12:.2f} TB/s.",),
    )


def _kernels(place: str, kernels: Sequence[Fields]) -> Sheet:
    """A line for each kernel and shape; a column for each number of rows."""
    counts = list(dict.fromkeys(one["rows"] for one in kernels))
    lines: list[tuple[str, ...]] = []
    for name, shape in dict.fromkeys((one["name"], one["shape"]) for one in kernels):
        own = {one["rows"]: one for one in kernels if (one["name"], one["shape"]) == (name, shape)}
        size = f"{next(iter(own.values()))['bytes'] / 1e6:.1f}"
        cells = [f"{_micro(own[n]['median'])} ({_percent(own[n]['share'])})" if n in own else "" for n in counts]
        lines.append((name, shape, size, *cells))
    columns = ("kernel", "shape", "MB", *(f"rows {n}, µs (% of a copy)" for n in counts))
    return Sheet(f"Kernels of a layer and the head, alone: {place}", columns, tuple(lines))


def _others(place: str, figures: Sequence[Fields]) -> Sheet:
    lines = [
        (one["name"], "", "", f"{one['median'] / 1e12:.2f} TB/s" if one["median"] else "-", "", "", "")
        if one["name"].endswith("bandwidth")
        else (
            one["name"],
            one["shape"],
            str(one["rows"] or ""),
            _micro(one["median"]),
            "" if one["p10"] is None else f"{_micro(one['p10'])}–{_micro(one['p90'])}",
            _percent(one["share"]),
            one["note"],
        )
        for one in figures
    ]
    columns = ("what", "shape", "rows", "µs", "p10–p90", "% of a copy", "note")
    return Sheet(f"Other figures: {place}", columns, tuple(lines))


def _findings(place: str, findings: Sequence[Fields]) -> Sheet:
    """How many checks of each part held; those that did not, and those that were not run, by name."""
    lines: list[tuple[str, ...]] = []
    for part in dict.fromkeys(one["part"] for one in findings):
        own = [one for one in findings if one["part"] == part]
        held = sum(one["passed"] is True for one in own)
        rest = [
            f"{'FAILED' if one['passed'] is False else 'not run'} {one['name']}: {one['detail']}"
            for one in own
            if one["passed"] is not True
        ]
        lines.append((part, f"{held} of {len(own)}", "; ".join(rest)))
    return Sheet(f"Checks: {place}", ("part", "passed", "the others"), tuple(lines))


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value * 1e6:.1f} µs" if unit == "s" else f"{value:.4g}"
