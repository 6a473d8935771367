"""Colours, progress and clean text on a terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from ..request import Piece

INPUT = "yellow"
GENERATED = "green"
DRAFT = "blue"
ACCEPTED = "dark_orange"

LINE_SECONDS = 10.0

_CONTROL_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}

Progress = Callable[[str, int, int], None]


def answers() -> Console:
    """Standard output."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def notes() -> Console:
    """Standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """The text with control characters drawn instead of obeyed, so that a model cannot drive the terminal."""
    return text.translate(_CONTROL_PICTURES)


def write(text: str) -> None:
    """Text on standard output at once, unchanged unless a terminal reads it."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def paint(console: Console, text: str, style: str) -> None:
    """Text in one style, neither wrapped nor interpreted."""
    console.out(visible(text) if console.is_terminal else text, style=style, end="", highlight=False)
    console.file.flush()


def paint_piece(console: Console, piece: Piece) -> None:
    """One generated token: orange when it was drafted and accepted, green when the full model chose it."""
    paint(console, piece.text, ACCEPTED if piece.drafted else GENERATED)


@contextmanager
def progress_bar() -> Generator[Progress, None, None]:
    """A bar on standard error for each label reported; where that is no terminal, a line every `LINE_SECONDS`."""
    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    from rich import progress

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn())
    with progress.Progress(*columns, console=notes(), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label)
            bar.update(tasks[label], completed=done, total=total or None)

        yield advance


def _progress_lines() -> Progress:
    told = monotonic()

    def advance(label: str, done: int, total: int) -> None:
        nonlocal told
        now = monotonic()
        if (done < total or not total) and now - told >= LINE_SECONDS:
            told = now
            notes().print(f"{label}: {f'{done / total:.0%}' if total else done}", markup=False)

    return advance


@contextmanager
def interrupts() -> Generator[Callable[[], bool], None, None]:
    """Whether Ctrl-C was pressed inside the block; a second press interrupts at once."""
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def restore() -> None:
    """Give the terminal its cursor and colours back."""
    terminal = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
    if terminal:
        terminal.write("\x1b[0m\x1b[?25h\n")
        terminal.flush()
