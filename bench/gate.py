"""The compile gate: proof without a GPU that every kernel compiles to the machine code that was meant.

`python -m skipjack.bench.gate`. The launchers themselves are called, in processes whose Triton has a driver that
compiles and does not launch, so that what is looked at is what the launchers launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..runtime.errors import ConfigError, SkipjackError
from . import options
from .gate_checks import SHARED_OF_CHIP, SHARED_PREFERRED, Case, Finding, beside_next, disagreements

ARCHITECTURES = ("80", "90", "100", "gfx942")
PROCESSES = 2
VARIABLE = "SKIPJACK_GATE_TRITON"


@dataclass(frozen=True)
class Target:
    """One Triton, by the folder to put before the installed packages (None: the installed one), and one chip."""

    triton: str
    folder: Path | None
    arch: str

    @property
    def binding(self) -> bool:
        """Whether a failure fails the gate; compiling for AMD's chip is a report."""
        return not self.arch.startswith("gfx")

    def __str__(self) -> str:
        return f"Triton {self.triton} {chip(self.arch)}"


def chip(arch: str) -> str:
    return arch if arch.startswith("gfx") else f"sm_{arch}"


def tritons() -> dict[str, Path | None]:
    """Versions of Triton and the folders that hold them: the installed one and those set aside.

    Those set aside are named by SKIPJACK_GATE_TRITON, a list of folders like PATH; by default they are the folders
    triton-* of the environment, which `make gate` fills.
    """
    named = os.environ.get(VARIABLE)
    aside = [Path(part) for part in named.split(os.pathsep)] if named else sorted(Path(sys.prefix).glob("triton-*"))
    found: dict[str, Path | None] = {}
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        found[_version(Path(spec.origin).parent)] = None
    for folder in aside:
        if not (folder / "triton" / "__init__.py").is_file():
            raise ConfigError(f"{VARIABLE}: expected a folder with Triton in it, got {folder}")
        found.setdefault(_version(folder / "triton"), folder)
    return dict(sorted(found.items()))


def sample(cases: Sequence[Case], targets: Sequence[Target], size: int) -> list[tuple[Target, str]]:
    """`size` pairs of a target and a group of cases, spread over ops and targets, always the same ones."""

    def number(*parts: object) -> str:
        return sha256(" ".join(map(str, parts)).encode()).hexdigest()

    groups = {case.group: case.op for case in cases}
    turns: list[tuple[int, str, Target, str]] = []
    for target in targets:
        for op in sorted(set(groups.values())):
            chosen = sorted((group for group in groups if groups[group] == op), key=lambda group: number(target, group))
            turns += [(turn, number(target, op), target, group) for turn, group in enumerate(chosen)]
    turns.sort(key=lambda turn: turn[:2])
    return [(target, group) for _, _, target, group in turns[:size]]


def compile_all(work: Mapping[Target, Sequence[str]]) -> list[Finding]:
    """The findings of the named cases for each target, in the order given; progress to stderr."""
    with tempfile.TemporaryDirectory(prefix="skipjack-gate-") as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        with ThreadPoolExecutor(PROCESSES) as pool:
            return [finding for found in pool.map(_compile, work, work.values()) for finding in found]


def _compile(target: Target, cases: Sequence[str]) -> list[Finding]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    if target.folder:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(target.folder.absolute()), *([before] if before else [])])
    found: list[Finding] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as order,
        tempfile.TemporaryFile("w+", encoding="utf-8") as notes,
    ):
        json.dump({"triton": target.triton, "arch": target.arch, "cases": list(cases)}, order)
        order.seek(0)
        command = [sys.executable, "-m", "skipjack.bench.gate_worker"]
        with subprocess.Popen(
            command, stdin=order, stdout=subprocess.PIPE, stderr=notes, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                found.append(finding := finding_of(json.loads(line)))
                if finding.failures:
                    print(f"{target}: FAIL {finding.case}: {'; '.join(finding.failures)}", file=sys.stderr)
                if len(found) % 50 == 0:
                    print(f"{target}: {len(found)} kernels", file=sys.stderr)
        if process.returncode:
            notes.seek(0)
            last = " ".join(notes.read().strip().splitlines()[-1:])[:400]
            reason = f"the process ended with {process.returncode}: {last}"
            found.append(Finding("all", "", "", "", 0, 0, target.arch, target.triton, failures=(reason,)))
    failed = sum(bool(finding.failures) for finding in found)
    print(f"{target}: done, {len(found)} kernels, {failed} with failures", file=sys.stderr)
    return found


def finding_of(fields: Mapping[str, Any]) -> Finding:
    """A finding from its JSON object, whose lists stand for tuples."""
    values: dict[str, Any] = dict(fields)
    for name, value in fields.items():
        if isinstance(value, list):
            values[name] = tuple(cast("list[Any]", value))
    return Finding(**values)


HEADINGS = (
    *("kernel", "case", "chip", "Triton", "registers", "shared KiB", "128-bit loads", "MMA", "opcode"),
    *("reads at least", "fits beside next", "result"),
)


def lines(findings: Sequence[Finding], *, whole: bool) -> Iterable[str]:
    """The table, in columns; `whole`: layers are complete, so that every kernel's neighbour is there."""
    beside: dict[int, bool] = {}
    for arch in SHARED_OF_CHIP if whole else ():
        beside |= beside_next([finding for finding in findings if finding.arch == str(arch)], arch)
    rows = [HEADINGS, *(_row(finding, beside.get(id(finding))) for finding in findings)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(finding: Finding, beside: bool | None) -> tuple[str, ...]:
    shared = f"{finding.shared / 1024:.1f}{' (much)' if finding.shared > SHARED_PREFERRED else ''}"
    floor = f"{finding.floor / 2**20:.2f} MiB" if finding.floor else ""
    return (
        *(finding.kernel, finding.case, chip(finding.arch), finding.triton, str(finding.registers), shared),
        *(str(finding.wide_loads), str(finding.mma), " ".join(finding.mma_opcodes), floor),
        *("" if beside is None else "yes" if beside else "no", "FAIL" if finding.failures else "ok"),
    )


def gate(
    arch: Annotated[list[str] | None, typer.Option(help="80, 90, 100 or gfx942; default: all of them.")] = None,
    triton: Annotated[list[str] | None, typer.Option(help="A version of Triton; default: all that are here.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="An op, such as linear; default: all.")] = None,
    size: Annotated[
        int | None, typer.Option("--sample", min=1, help="Compile this many groups of cases, always the same ones.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything as JSON.", callback=options.writable),
    ] = None,
) -> None:
    """Compile every kernel at the shapes of real models and check the machine code; exit 1 if it is not as meant."""
    from .gate_cases import cases

    here = tritons()
    archs = _chosen("--arch", arch, ARCHITECTURES)
    targets = [Target(version, here[version], a) for version in _chosen("--triton", triton, here) for a in archs]
    every = cases()
    ops = _chosen("--kernel", kernel, dict.fromkeys(case.op for case in every))
    every = [case for case in every if case.op in ops]
    groups = dict.fromkeys(case.group for case in every)
    pairs = sample(every, targets, size) if size else [(target, group) for target in targets for group in groups]
    names = {
        target: [case.name for case in every if (target, case.group) in set(pairs)]
        for target in dict.fromkeys(target for target, _ in pairs)
    }
    findings = compile_all(names)
    binding = [finding for finding in findings if not finding.arch.startswith("gfx")]
    report = [finding for finding in findings if finding.arch.startswith("gfx")]
    differing = disagreements(binding)
    if output:
        document = {
            "bench": "gate",
            "findings": [asdict(finding) for finding in findings],
            "row_dependent": differing,
        }
        output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in lines(binding, whole=size is None and kernel is None) if binding else ():
        typer.echo(line)
    _conclude(binding, report, differing)
    if not findings or differing or any(finding.failures for finding in binding):
        raise typer.Exit(1)


def _conclude(binding: Sequence[Finding], report: Sequence[Finding], differing: Mapping[str, str]) -> None:
    if report:
        compiled = sum(not finding.failures for finding in report)
        typer.echo(f"\nReport on {chip(report[0].arch)}, not part of the gate: {compiled} of {len(report)} compile")
        for line in _grouped(report):
            typer.echo(line)
    typer.echo(f"\n{sum(not finding.failures for finding in binding)} of {len(binding)} kernels are as meant")
    for line in _grouped(binding):
        typer.echo(line)
    for name, reason in differing.items():
        typer.echo(f"{name} | its cases round differently | {reason}")


def _grouped(findings: Sequence[Finding]) -> Iterable[str]:
    """Each reason of a kernel and a group of cases once, with the numbers of rows and the targets it holds for."""
    found: dict[tuple[str, str, str], tuple[dict[int, None], dict[str, None]]] = {}
    for finding in findings:
        for reason in finding.failures:
            rows, where = found.setdefault((finding.kernel, finding.group, reason), ({}, {}))
            rows[finding.rows] = None
            where[f"{chip(finding.arch)}/{finding.triton}"] = None
    for (kernel, group, reason), (rows, where) in found.items():
        counts = ", ".join(str(count) for count in sorted(rows))
        yield f"{kernel} | {group} | rows {counts} | {', '.join(sorted(where))} | {reason}"


def _chosen(option: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    known = list(known)
    if unknown := set(wanted or ()) - set(known):
        raise ConfigError(f"{option}: expected one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return list(dict.fromkeys(wanted)) if wanted else known


def _version(package: Path) -> str:
    found = re.search(r"__version__ = ['\"]([\w.+]+)['\"]", (package / "__init__.py").read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def main() -> None:
    """A mistake is one line on standard error and exit code 2: 1 says that kernels are not as meant."""
    try:
        typer.run(gate)
    except SkipjackError as mistake:
        print("error:", mistake, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
