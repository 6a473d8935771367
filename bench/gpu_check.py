"""What only a GPU can prove about the kernels' results, in a few minutes.

Every op in half precision against float64; rows whose bits do not depend on their number; tokens of speculative
decoding equal to those of plain decoding; a long run with and without dependent launch; no compilation after warm-up.
`--dry-run` walks the same code at tiny shapes in Triton's interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, TypeVar, cast

import torch
import typer
from rich.console import Console

from ..kernels.ops import obstacle
from . import interpreter, machine
from .gpu_parts import PARTS, long_run
from .gpu_setting import DRY, GPU, Finding, Setting
from .gpu_sheets import sheets
from .record import show, write

# Of a process that checks beside others, and how many of these share a GPU's memory.
THREADS = 2
PROCESSES = 8
# What takes longest begins first, or the others would have ended long before it.
LONG = ("race", "compile")

app = typer.Typer(add_completion=False)


@app.command()
def check(
    part: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(PARTS)}.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Tiny shapes in Triton's interpreter.")] = False,
) -> None:
    """Check the kernels on this GPU; exit 1 if anything failed."""
    unknown = sorted(set(part or ()) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"expected {', '.join(PARTS)}, got {', '.join(unknown)}", param_hint="--part")
    setting = setting_of(dry_run)
    findings: list[Finding] = []
    result: dict[str, Any] = {"bench": "gpu-check", "machine": facts(setting), "findings": []}
    for finding in run(setting, part or PARTS):
        findings.append(finding)
        result["findings"] = [asdict(one) for one in findings]
        if output:
            write(result, output)
    for sheet in sheets(result):
        show(sheet)
    if any(finding.passed is False for finding in findings):
        raise typer.Exit(1)


def run(setting: Setting, names: Iterable[str]) -> Iterator[Finding]:
    """The findings of these parts, of which a GPU makes several at once: no time among them is a speed."""
    in_order = sorted(names, key=lambda name: name not in LONG)
    jobs = [(name, own) for name in in_order for own in ([setting] if setting.dry else setting.split(name))]
    notes = Console(stderr=True, highlight=False)
    start = perf_counter()
    for name, findings in together(jobs) if len(jobs) > 1 and not setting.dry else one_by_one(jobs):
        for finding in findings:
            if finding.passed is False:
                notes.print(f"FAILED {finding.part} {finding.name}: {finding.detail}", style="bold red", markup=False)
            yield finding
        notes.print(f"{name}: done after {perf_counter() - start:.0f} s")


Jobs = Sequence[tuple[str, Setting]]
Job = TypeVar("Job", bound=tuple[Any, ...])
Result = TypeVar("Result")


def one_by_one(jobs: Jobs) -> Iterator[tuple[str, Iterable[Finding]]]:
    """Each part's name and findings; a part that breaks is a failed check, and the others still run."""
    for name, setting in jobs:
        yield name, _guarded(name, PARTS[name], setting)


def together(jobs: Jobs) -> Iterator[tuple[str, Iterable[Finding]]]:
    """`one_by_one`, every part in a process of its own, so that one which loses the device loses it alone."""
    for (name, _), done in in_processes(_alone, jobs):
        error = done.exception()
        yield name, done.result() if error is None else [_broken(name, error)]


def in_processes(run: Callable[..., Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Future[Result]]]:
    """`run` with each job's arguments, in a process of its own, several at once; as they are done."""
    spawn = multiprocessing.get_context("spawn")

    def alone(job: Job) -> Result:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return process.submit(run, *job).result()

    with ThreadPoolExecutor(max(1, min(PROCESSES, (os.cpu_count() or 1) // THREADS))) as threads:
        futures = {threads.submit(alone, job): job for job in jobs}
        for done in as_completed(futures):
            yield futures[done], done


def _alone(name: str, setting: Setting) -> list[Finding]:
    torch.set_num_threads(THREADS)
    return list(_guarded(name, PARTS[name], setting))


@app.command(hidden=True)
def tokens(shape: str, count: int, dry_run: Annotated[bool, typer.Option()] = False) -> None:
    """The tokens of one greedy run by layer skipping, as JSON."""
    typer.echo(json.dumps(long_run(shape, count, setting_of(dry_run))))


def setting_of(dry: bool) -> Setting:
    """The GPU, or the interpreter for a dry run.

    Raises:
        BadParameter: what it needs is not there.
    """
    if dry:
        problem = obstacle("triton", DRY.device)
        if problem:
            raise typer.BadParameter(f"{problem}", param_hint="--dry-run")
        interpreter.mend()
        return DRY
    if not torch.cuda.is_available():
        raise typer.BadParameter("no GPU that torch can use; --dry-run walks the code without one")
    return GPU


def _guarded(name: str, run: Callable[[Setting], Iterator[Finding]], setting: Setting) -> Iterator[Finding]:
    try:
        with torch.inference_mode():
            yield from run(setting)
    except Exception as error:
        yield _broken(name, error)


def _broken(name: str, error: BaseException) -> Finding:
    return Finding(name, "broke off", False, f"{type(error).__name__}: {str(error)[:300]}")


def facts(setting: Setting) -> dict[str, Any]:
    """The machine, with its GPU's name and versions."""
    import triton

    found = machine.describe() | {"triton": triton.__version__}
    if setting.dry:
        return found | {"note": "dry run in Triton's interpreter: no figure here was measured on a GPU"}
    card = cast("Any", torch.cuda).get_device_properties(0)
    return found | {"gpu": card.name, "cuda": torch.version.cuda, "memory_gib": round(card.total_memory / 2**30, 1)}


if __name__ == "__main__":
    app()
