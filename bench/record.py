"""Result files: what every one of them begins with, and how they are written, read and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.engine import Engine
from ..runtime.errors import ConfigError, RequestError
from .machine import describe

_R = TypeVar("_R", bound="Judged")
_L = TypeVar("_L")


@dataclass(frozen=True)
class Sheet:
    """A table: its title names model, dtype and device; its notes define the columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Percentiles of a measured quantity, in its own unit; `count` values."""

    count: int
    p10: float
    p50: float
    p90: float
    p99: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None without values."""
        if not values:
            return None
        points = [float(value) for value in np.percentile(values, (10, 50, 90, 99, 100))]
        return Spread(len(values), *points)


class Judged(Protocol):
    """What one prompt came to with one method."""

    @property
    def method(self) -> str: ...
    @property
    def category(self) -> str: ...


def summarise(rows: Sequence[_R], line: Callable[[str, str, Sequence[_R]], _L]) -> list[_L]:
    """`line` of the rows of every method and category, and of all categories of a method."""
    lines: list[_L] = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        for category in dict.fromkeys(row.category for row in own):
            lines.append(line(method, category, [row for row in own if row.category == category]))
        lines.append(line(method, "all", own))
    return lines


def header(bench: str, engine: Engine, model: str) -> dict[str, Any]:
    """The fields that say what was measured, and where; `machine.gpu` is there only if the model lay on a GPU."""
    return {
        "bench": bench,
        "machine": describe(engine._loaded()[0].device),
        "model": model,
        "backend": engine.backend,
        "numerics": engine.numerics,
        "dtype": str(engine.dtype).removeprefix("torch."),
    }


def device(machine: Mapping[str, Any]) -> str:
    """The device a result was measured on: the GPU, or the processor and its threads."""
    if "gpu" in machine:
        return f"{machine['gpu']} (GPU)"
    return f"{machine['device']} (CPU, {machine['threads']} threads)"


def where(machine: Mapping[str, Any]) -> str:
    """The device, PyTorch's version and the day."""
    return f"{device(machine)}, torch {machine['torch']}, {machine['date'][:10]}"


def title(result: Mapping[str, Any]) -> str:
    """Model, dtype and device of a result."""
    return f"{result['model']}, {result['dtype']}, {device(result['machine'])}"


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a result file, with the folders above it; whoever is ended meanwhile leaves the file of before whole.

    Raises:
        RequestError: it cannot be written.
    """
    text = json.dumps(result, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # A terminal, or nothing at all.
            path.write_text(text, encoding="utf-8")
            return
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as problem:
        raise RequestError(f"--output: cannot write {path}: {problem.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ConfigError: it cannot be read or is not one.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a result file of `skipjack bench`: {error}") from error
    if not isinstance(result, dict) or "bench" not in result:
        raise ConfigError(f"{path}: expected a result file of `skipjack bench`, with the field bench")
    return cast("dict[str, Any]", result)


def deliver(
    result: Mapping[str, Any],
    sheets: Callable[[Any], Sheet | tuple[Sheet, ...]],
    output: Path | None,
    as_json: bool,
    rendered: Path | None = None,
) -> None:
    """A result to its file where there is one, to standard output as JSON or as tables, and as Markdown where asked."""
    if output:
        write(result, output)
    made = sheets(json.loads(json.dumps(result)))  # As it would be read back.
    tables = (made,) if isinstance(made, Sheet) else made
    if rendered:
        rendered.write_text(markdown(tables) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result))
        return
    for sheet in tables:
        show(sheet)


def show(sheet: Sheet) -> None:
    """A sheet on standard output."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(title=Text(sheet.title), title_justify="left")
    for column in sheet.columns:
        table.add_column(column, overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for note in sheet.notes:
        console.print(note, markup=False)


def markdown(sheets: Iterable[Sheet]) -> str:
    """Sheets as Markdown; those with equal columns and title become one table."""
    merged: dict[tuple[str, tuple[str, ...]], Sheet] = {}
    for sheet in sheets:
        before = merged.get((sheet.title, sheet.columns))
        if before:
            notes = tuple(dict.fromkeys((*before.notes, *sheet.notes)))
            sheet = Sheet(sheet.title, sheet.columns, before.rows + sheet.rows, notes)  # noqa: PLW2901
        merged[sheet.title, sheet.columns] = sheet
    return "\n\n".join(_markdown(sheet) for sheet in merged.values())


def _markdown(sheet: Sheet) -> str:
    lines = [f"**{sheet.title}**", ""] if sheet.title else []
    lines += [_line(sheet.columns), "|" + "---|" * len(sheet.columns)]
    lines += [_line(row) for row in sheet.rows]
    for note in sheet.notes:
        lines += ["", note]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
