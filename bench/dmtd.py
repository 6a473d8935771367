"""`skipjack bench dmtd`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from . import options


def dmtd(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A DMTD model folder, or synthetic:SHAPE[:LATE_SCALE].")
    ] = "synthetic:tiny-dmtd:1",
    horizon: Annotated[list[int] | None, typer.Option(min=1, max=64, help="Repeatable; default: 2, 3, 4, 6.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=16, help="Sequences decoded together.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for each.")] = 97,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs measured, after one to warm up.")] = 5,
    dtype: options.Dtype = "auto",
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Direct Multi-Token Decoding: measured speed over plain decoding, the cost model's prediction, and the bound."""
    from . import sheets
    from .cycles import compare
    from .methods import load
    from .record import deliver, header

    note = options.notes()
    with load(model, dtype, "dmtd") as engine:
        note(f"{model}: {engine.dtype}, {engine.backend}")
        lines = compare(engine, horizon or (2, 3, 4, 6), batch, max_tokens, pairs, note)
        result = {
            **header("dmtd", engine, model),
            "lines": [asdict(line) for line in lines],
        }
    if not all(line.identical for line in lines):
        options.alarm("NOT IDENTICAL to a teacher-forced pass: no speed is reported")
        raise typer.Exit(1)
    deliver(result, sheets.dmtd, output, as_json)
