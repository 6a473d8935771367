"""`skipjack bench baselines`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..runtime.errors import RequestError
from . import options


def baselines(
    model: options.Model = "demo",
    skipped: Annotated[
        list[int] | None, typer.Option(min=1, help="Layers to do without; repeatable, default 4 and 8.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=FOLDER", help="A routed checkpoint and the method it is made for; repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:OPTIONS]", help="Score this lossy method instead of the baselines; repeatable."),
    ] = None,
    prompts: options.Prompts = None,
    per_category: options.PerCategory = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")] = 64,
    dtype: options.Dtype = "auto",
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Ways to leave layers out, from early exit to FlexiDepth: agreement with the full model and perplexity."""
    from . import sheets
    from .baselines import compare
    from .record import deliver

    chosen, counts = options.chosen(prompts, per_category), skipped or [4, 8]
    folders = dict(_checkpoint(entry) for entry in checkpoint or ())
    for option, given in (("--skipped", skipped), ("--checkpoint", checkpoint)):
        if method and given:
            raise RequestError(f"{option}: expected without --method, whose methods say what they skip, got both")
    about, lines = compare(model, dtype, chosen, max_tokens, counts, folders, options.notes(), method or ())
    result = {**about, "checkpoints": folders, "max_tokens": max_tokens, "lines": [asdict(line) for line in lines]}
    deliver(result, sheets.baselines, output, as_json)


def _checkpoint(entry: str) -> tuple[str, str]:
    method, equals, folder = entry.partition("=")
    if not method or not equals or not folder:
        raise RequestError(f"--checkpoint: expected METHOD=FOLDER, got {entry!r}")
    return method, folder
