"""`skipjack bench unified`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import options

if TYPE_CHECKING:
    from .unified import Batch, Pattern


def unified(
    model: options.Model = "demo",
    prompts: options.Prompts = None,
    per_category: options.PerCategory = 2,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each continuation.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Timed pairs of each speed-up and batch size.")] = 5,
    dtype: options.Dtype = "auto",
    output: options.Output = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the figures as SVG here.", callback=options.drawable)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Unified Layer Skipping: which pattern keeps the text, whether batches agree, and what time is saved."""
    from . import unified as experiments
    from .methods import load
    from .record import header, show, write
    from .unified_picture import draw, sheet

    chosen, note = options.chosen(prompts, per_category), options.notes()
    with load(model, dtype, check=options.able((), chosen)) as engine:
        note(f"{len(chosen)} prompts, {max_tokens} tokens each, {engine.dtype}, {engine.backend}")
        start = header("unified", engine, model)
        patterns = experiments.patterns(engine, chosen, max_tokens, note)
        batches = experiments.batches(engine, chosen, max_tokens, note)
        if any(line.agreement != 1 for line in patterns if line.pattern == "full"):
            options.alarm("the full model does not agree with itself: no speed is measured")
            raise typer.Exit(1)
        if any(line.identical != line.prompts for line in batches):
            options.alarm("BATCHES DIFFER from their members alone: no speed is measured")
            raise typer.Exit(1)
        scaling = experiments.scaling(engine, chosen, max_tokens, pairs, note)
        result = {
            **start,
            "max_tokens": max_tokens,
            "prompts": len(chosen),
            "patterns": [asdict(line) for line in patterns],
            "batches": [asdict(line) for line in batches],
            "scaling": [asdict(line) for line in scaling],
        }
    if output:
        write(result, output)
    if picture:
        draw(result, picture)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(patterns, batches)
        show(sheet(result))


def _show(patterns: Sequence[Pattern], batches: Sequence[Batch]) -> None:
    console = Console(highlight=False)
    names = [name for name in dict.fromkeys(line.pattern for line in patterns) if name != "full"]
    cells = {(line.category, line.speedup, line.pattern): line for line in patterns}
    table = Table("category", "speed-up", "layers", *names, title="agreement with the full model / nats per token")
    for category, speedup in dict.fromkeys((line.category, line.speedup) for line in patterns if line.pattern in names):
        own = [cells[category, speedup, name] for name in names]
        shares = [f"{line.agreement:.2f}/{line.nll:.1f}" for line in own]
        table.add_row(category, f"{speedup:g}", str(own[0].kept), *shares)
    console.print(table)
    table = Table("speed-up", "batch", "identical to alone")
    for line in batches:
        table.add_row(f"{line.speedup:g}", str(line.batch), f"{line.identical} of {line.prompts}")
    console.print(table)
