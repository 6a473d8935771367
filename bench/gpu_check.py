"""`make gpu-check`: what only a GPU can prove, in one command of a few minutes.

Every op in half precision against float64; rows whose bits do not depend on their number; tokens of speculative
decoding equal to those of plain decoding; a long run with and without dependent launch; no compilation after warm-up;
then the first figures. `--dry-run` walks the same code at tiny shapes in Triton's interpreter, where no time means
anything and none is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..kernels.ops import obstacle
from . import machine
from .gpu_parts import DRY, GPU, PARTS, Finding, Setting, long_run
from .step import figures, show

app = typer.Typer(add_completion=False)


@app.command()
def check(
    part: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join([*PARTS, 'time'])}.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Tiny shapes in Triton's interpreter; no figures.")] = False,
) -> None:
    """Check the kernels on this GPU and measure them; exit 1 if anything failed."""
    unknown = sorted(set(part or ()) - {*PARTS, "time"})
    if unknown:
        raise typer.BadParameter(
            f"expected {', '.join([*PARTS, 'time'])}, got {', '.join(unknown)}", param_hint="--part"
        )
    setting, notes = _setting(dry_run), Console(stderr=True, highlight=False)
    result: dict[str, Any] = {"bench": "gpu-check", "machine": _machine(setting), "findings": [], "figures": []}
    for name, run in PARTS.items():
        if part and name not in part:
            continue
        start = perf_counter()
        for finding in _guarded(name, run, setting):
            result["findings"].append(asdict(finding))
            if finding.passed is False:
                notes.print(f"FAILED {finding.part} {finding.name}: {finding.detail}", style="bold red", markup=False)
            _write(output, result)
        notes.print(f"{name}: {perf_counter() - start:.0f} s")
    failed = [finding for finding in result["findings"] if finding["passed"] is False]
    if not part or "time" in part:
        # A speed beside a wrong result means nothing.
        if failed:
            notes.print("no figures: a check failed", style="bold red")
        else:
            for figure in figures(setting.device, setting.timed, setting.dry):
                result["figures"].append(asdict(figure))
                _write(output, result)
    _write(output, result)
    _table(result["findings"])
    show(result["figures"])
    if failed:
        raise typer.Exit(1)


@app.command(hidden=True)
def tokens(shape: str, count: int, dry_run: Annotated[bool, typer.Option()] = False) -> None:
    """The tokens of one greedy run by layer skipping, as JSON."""
    typer.echo(json.dumps(long_run(shape, count, _setting(dry_run))))


def _setting(dry: bool) -> Setting:
    if dry:
        problem = obstacle("triton", DRY.device)
        if problem:
            raise typer.BadParameter(f"{problem}", param_hint="--dry-run")
        return DRY
    if not torch.cuda.is_available():
        raise typer.BadParameter("no GPU that torch can use; --dry-run walks the code without one")
    return GPU


def _guarded(name: str, run: Callable[[Setting], Iterator[Finding]], setting: Setting) -> Iterator[Finding]:
    """A part that breaks is a failed check, and the others still run."""
    try:
        with torch.inference_mode():
            yield from run(setting)
    except Exception as error:
        yield Finding(name, "broke off", False, f"{type(error).__name__}: {str(error)[:300]}")


def _machine(setting: Setting) -> dict[str, Any]:
    import triton

    found = machine.describe() | {"triton": triton.__version__}
    if setting.dry:
        return found | {"note": "dry run in Triton's interpreter: no figure here was measured on a GPU"}
    card = cast("Any", torch.cuda).get_device_properties(0)
    return found | {"gpu": card.name, "cuda": torch.version.cuda, "memory_gib": round(card.total_memory / 2**30, 1)}


def _write(output: Path | None, result: dict[str, Any]) -> None:
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _table(findings: list[dict[str, Any]]) -> None:
    table = Table("part", "check", "result", "detail")
    for finding in findings:
        result = {True: "passed", False: "FAILED", None: "not run"}[finding["passed"]]
        table.add_row(finding["part"], finding["name"], result, finding["detail"])
    Console(highlight=False).print(table)


if __name__ == "__main__":
    app()
