"""Result files as tables: for a terminal, and as Markdown for the README and docs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
OPERATORS = 16


class Grid(NamedTuple):
    """A table: what it shows, its columns, its lines."""

    title: str
    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]


def grids(result: Result) -> list[Grid]:
    """The tables of a result file of `bench decode` or of the microbenchmarks.

    Raises:
        KeyError: it is another command's.
    """
    return _GRIDS[result["bench"]](result)


def show(result: Result) -> None:
    """The tables on standard output."""
    console = Console(highlight=False)
    for title, columns, lines in grids(result):
        table = Table(*columns, title=title, title_justify="left")
        for line in lines:
            table.add_row(*line)
        console.print(table, markup=False)


def markdown(results: Sequence[Result]) -> str:
    """The tables of all files, each with where it was measured.

    Raises:
        KeyError: one is no such result file.
    """
    parts: list[str] = []
    for result in results:
        for title, columns, lines in grids(result):
            head = [f"**{title}**", "", _line(columns), _line(["---"] * len(columns))]
            parts += ["\n".join([*head, *map(_line, lines)]), ""]
        parts += [_where(result["machine"]), ""]
    return "\n".join(parts).rstrip()


def _decode(result: Result) -> list[Grid]:
    name = f"{result['model']}, {result['dtype']}, {result['backend']}, context {result['setting']['context']}"
    passes, fit = result["passes"], result["line"]
    verify = [
        (
            str(one["rows"]),
            _spread(one["seconds"], 1e3),
            f"{one['bytes'] / 1e6:.0f}",
            f"{100 * one['share']:.1f}",
            f"{one['bubble'] * 1e6:.1f}",
            _spread(one["ratio"]),
        )
        for one in passes
        if one["kind"] == "verify"
    ]
    draft = [
        (
            str(one["layers"]),
            _spread(one["seconds"], 1e3),
            f"{100 * one['share']:.1f}",
            _spread(one["ratio"]),
            f"{one['ideal']:.2f}",
        )
        for one in passes
        if one["kind"] == "draft"
    ]
    methods = list(dict.fromkeys(one["method"] for one in result["rounds"]))
    rounds = [
        (
            chr(ord("A") + methods.index(one["method"])),
            f"{one['rate']:.2f}",
            f"{one['mean_length']:.2f}",
            _spread(one["seconds"], 1e3),
            f"{one['draft'] * 1e3:.2f}",
            f"{one['verify'] * 1e3:.2f}",
            f"{100 * one['glue']:.1f}",
            _spread(one["plain"], 1e3),
            _spread(one["speed"]),
            f"{one['possible']:.2f}",
            f"{one['of_possible']:.2f}",
        )
        for one in result["rounds"]
    ]
    rates = ", ".join(f"{key} {value / 1e9:.1f} GB/s" for key, value in result["bandwidth"].items())
    line = f"{fit['fixed'] * 1e3:.2f} ms + {fit['layer'] * 1e3:.3f} ms a layer, R² {fit['r2']:.4f}"
    return [
        Grid(
            f"verify(K): {name}; {rates}",
            ("K", "ms", "MB", f"% of {result['of']}", "bubble a layer, µs", "÷ decode(1)"),
            verify,
        ),
        Grid(
            f"draft step: {line}",
            ("layers kept", "ms", f"% of {result['of']}", "÷ decode(1)", "÷ linear ideal"),
            draft,
        ),
        Grid(
            "rounds with forced acceptance: " + "; ".join(f"{chr(ord('A') + i)} {m}" for i, m in enumerate(methods)),
            _ROUND,
            rounds,
        ),
        Grid(
            f"operators of decode(1): {sum(one['calls'] for one in result['operators']):.0f} calls",
            ("operator", "calls", "% of their time"),
            [
                (one["name"], f"{one['calls']:.0f}", f"{100 * one['share']:.1f}")
                for one in result["operators"][:OPERATORS]
            ],
        ),
    ]


def _micro(result: Result) -> list[Grid]:
    rates = ", ".join(f"{key} {value / 1e9:.1f} GB/s" for key, value in result["bandwidth"].items())
    lines = [
        (
            one["op"],
            one["shape"],
            str(one["rows"]),
            str(one["context"] or ""),
            _spread(one["seconds"], 1e6, 1),
            f"{one['bytes'] / 1e6:.3g}",
            f"{100 * one['share']:.1f}",
            f"{one['ratio']:.2f}",
        )
        for one in result["figures"]
    ]
    columns = ("op", "shape", "rows", "context", "µs", "MB", f"% of {result['of']}", "plain PyTorch ÷ op")
    return [Grid(f"Ops alone, {result['dtype']}, {result['backend']}; {rates}", columns, lines)]


_ROUND = (
    "method",
    "α",
    "length",
    "round, ms",
    "draft step, ms",
    "verify, ms",
    "glue, %",
    "plain, ms a token",
    "speed ÷ plain",
    "possible",
    "of it",
)
_GRIDS: dict[str, Callable[[Result], list[Grid]]] = {"decode": _decode, "micro": _micro}


def _spread(value: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    median, low, high = (f"{value[key] * scale:.{digits}f}" for key in ("median", "p10", "p90"))
    return f"{median} ({low}–{high})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _where(machine: Result) -> str:
    device = machine.get("gpu") or f"{machine['device']} (CPU, {machine['threads']} threads)"
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return f"Measured on {device}, torch {machine['torch']}{commit}, {machine['date'][:10]}. Median (p10–p90)."
