"""`skipjack bench baselines`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..runtime.errors import RequestError


def baselines(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='A model folder, "demo", or synthetic:SHAPE:LATE_SCALE.')
    ] = "demo",
    skipped: Annotated[
        list[int] | None, typer.Option(min=1, help="Layers to do without; repeatable, default 4 and 8.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=FOLDER", help="A routed checkpoint and the method it is made for; repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(envvar="SKIPJACK_PROMPTS", help="JSON lines with category and turns; default: our own."),
    ] = None,
    per_category: Annotated[int, typer.Option(min=1, help="Prompts taken of each category.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Write every figure as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Early exit, ShortGPT, LaCo, MindSkip and FlexiDepth: agreement with the full model and perplexity."""
    from . import sheets
    from .baselines import compare
    from .prompts import load as load_prompts
    from .record import deliver

    chosen, counts = load_prompts(prompts, per_category), skipped or [4, 8]
    folders = dict(_checkpoint(entry) for entry in checkpoint or ())
    notes = Console(stderr=True, highlight=False)

    def progress(text: str) -> None:
        notes.print(text, end="\x1b[K\r" if sys.stderr.isatty() else "\n", markup=False)

    about, lines = compare(model, dtype, chosen, max_tokens, counts, folders, progress)
    result = {**about, "checkpoints": folders, "max_tokens": max_tokens, "lines": [asdict(line) for line in lines]}
    deliver(result, sheets.baselines, output, as_json)


def _checkpoint(entry: str) -> tuple[str, str]:
    method, equals, folder = entry.partition("=")
    if not method or not equals or not folder:
        raise RequestError(f"--checkpoint: expected METHOD=FOLDER, got {entry!r}")
    return method, folder
