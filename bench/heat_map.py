"""Text whose tokens are light or dark by the layers they used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.commands.terminal import visible
from .charts import pyplot_svg, save

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 88
_SHADES = ((247, 251, 255), (107, 174, 214), (8, 48, 107))


def shade(layers: float, low: float, high: float) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255: light where `low` layers were used, dark where `high` were."""
    depth = 2 * min(1.0, max(0.0, (layers - low) / (high - low))) if high > low else 2.0
    light, dark = _SHADES[:2] if depth < 1 else _SHADES[1:]
    red, green, blue = (round(a + (b - a) * (depth % 1 if depth < 2 else 1)) for a, b in zip(light, dark, strict=True))
    return red, green, blue


def terminal(words: Sequence[str], layers: Sequence[float], low: float, high: float) -> Text:
    """The words on their shades, for a terminal, and a scale below."""
    from rich.style import Style
    from rich.text import Text

    def style(used: float) -> Style:
        red, green, blue = shade(used, low, high)
        bright = red + green + blue > 3 * 128
        return Style(color="black" if bright else "white", bgcolor=f"rgb({red},{green},{blue})")

    text = Text()
    for word, used in zip(words, layers, strict=True):
        text.append(visible(word).replace("\n", "↵\n"), style(used))
    text.append(f"\n\nlayers used: {low:g} ")
    for i in range(9):
        text.append("  ", style(low + (high - low) * i / 8))
    text.append(f" {high:g}")
    return text


def picture(words: Sequence[str], layers: Sequence[float], low: float, high: float, path: Path, title: str) -> None:
    """The same as an SVG or PNG file, by the suffix of `path`.

    Raises:
        SkipjackError: matplotlib is not installed, or the suffix is another.
    """
    pyplot = pyplot_svg()
    cells = _placed(words, layers)
    lines = max((line for line, _, _, _ in cells), default=0) + 1
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * lines))
    for line, column, word, used in cells:
        red, green, blue = shade(used, low, high)
        colour = (red / 255, green / 255, blue / 255)
        axes.add_patch(pyplot.Rectangle((column, line), len(word), 1, facecolor=colour, lw=0))
        ink = "black" if sum(colour) > 1.5 else "white"
        shown = word.replace("$", "\\$")
        axes.text(column, line + 0.5, shown, family="monospace", fontsize=7.5, color=ink, va="center")
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(lines, 0)
    axes.axis("off")
    axes.set_title(title, fontsize=8)
    steps = [tuple(part / 255 for part in shade(i, 0, 255)) for i in range(256)]
    scale = pyplot.cm.ScalarMappable(pyplot.Normalize(low, high), pyplot.matplotlib.colors.ListedColormap(steps))
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", fraction=0.08, pad=0.04, shrink=0.5)
    bar.set_label("layers used", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    save(pyplot, figure, path)


def _placed(words: Sequence[str], layers: Sequence[float]) -> list[tuple[int, int, str, float]]:
    """Line, column, text and layers of each token, wrapped at WIDTH; a token that ends a line says so."""
    cells: list[tuple[int, int, str, float]] = []
    line = column = 0
    for word, used in zip(words, layers, strict=True):
        shown = visible(word).replace("\n", "↵")[:WIDTH] or "·"
        if column + len(shown) > WIDTH:
            line, column = line + 1, 0
        cells.append((line, column, shown, used))
        column += len(shown)
        if "\n" in word:
            line, column = line + 1, 0
    return cells
