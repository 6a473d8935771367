"""`bench/gpu.sh PART`: everything that needs a GPU, in parts of a few minutes each, judged by the targets.

Every part is preceded by a check of the kernels it times, and writes its result file as it goes: what was found before
it broke or ran out of time is kept. A dry run walks the same code at tiny shapes in Triton's interpreter; it measures
nothing and passes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import gpu_methods, gpu_parts, gpu_rounds, gpu_speed, rules, step
from .gpu_check import facts, run, setting_of
from .gpu_setting import Finding, Setting
from .gpu_sheets import sheets
from .record import show, write
from .targets import GPU, Measurement, Row, Target, as_json, judge, of

app = typer.Typer(add_completion=False)
Found = Iterator[step.Figure | Measurement | Finding]


@dataclass(frozen=True)
class Part:
    """A part: what it is for, the targets it decides, how it is measured, and whether the kernels are checked first."""

    what: str
    ids: tuple[str, ...]
    run: Callable[[Setting], Found]
    checked: bool = True


def check(setting: Setting) -> Found:
    """Every check of `gpu_check`; T18 is one of them."""
    for finding in run(setting, gpu_parts.PARTS):
        yield finding
        if finding.part == "compile" and finding.passed is not None:
            yield Measurement("T18", "engine", finding.count, finding.detail)


def _each(*runs: Callable[[Setting], Found]) -> Callable[[Setting], Found]:
    """One after the other; one that breaks off does not keep the next from running."""

    def together(setting: Setting) -> Found:
        broken: Exception | None = None
        for each in runs:
            try:
                yield from each(setting)
            except Exception as error:
                broken = error
        if broken is not None:
            raise broken

    return together


PARTS: dict[str, Part] = {
    "check": Part("correctness", ("T18",), check, checked=False),
    "steps": Part("steps and kernels", ("T1", "T2", "T3", "T4", "T5", "T6", "T7"), gpu_speed.steps),
    "drafts": Part("drafts and rounds", ("T8", "T9", "T10", "T11"), _each(gpu_methods.drafts, gpu_speed.syncs)),
    "peers": Part("other libraries", ("T12", "T13"), gpu_methods.peers, checked=False),
    "exact": Part("losslessness", ("T14",), gpu_speed.exact, checked=False),
    "lossy": Part(
        "lossy methods", ("T15", "T16", "T17"), _each(gpu_speed.unified, gpu_methods.routed, gpu_methods.cycles)
    ),
    "large-peers": Part("other libraries, 8b", ("T12", "T13"), gpu_methods.large_peers, checked=False),
    "rules": Part("launch rules", (), rules.fastest, checked=False),
    "rules-16": Part("launch rules of 16 rows", (), partial(rules.fastest, rows=rules.MANY), checked=False),
    "real": Part("methods on real weights", (), gpu_methods.real, checked=False),
    "rounds": Part("rounds by what drafts, and lookups", (), gpu_rounds.rounds),
}


@app.command()
def measure(
    part: Annotated[str, typer.Argument(help=f"A number or a name: {', '.join(PARTS)}.")],
    output: Annotated[Path, typer.Option(help="The folder for the result file.")] = Path("bench/results"),
    dry_run: Annotated[bool, typer.Option(help="Tiny shapes in Triton's interpreter; nothing is measured.")] = False,
) -> None:
    """Measure one part of the GPU targets; exit 1 if a check failed or the part broke off."""
    name = list(PARTS)[int(part) - 1] if part in map(str, range(1, len(PARTS) + 1)) else part
    if name not in PARTS:
        raise typer.BadParameter(f"expected 1 to {len(PARTS)} or {', '.join(PARTS)}, got {part}", param_hint="PART")
    setting = setting_of(dry_run)
    record = Record(name, PARTS[name], setting, output / f"gpu-{name}{'-dry-run' if dry_run else ''}.json")
    start = perf_counter()
    try:
        record.collect()
    except Exception as error:  # The part is lost, what it had found is not.
        record.broken = f"{type(error).__name__}: {str(error)[:500]}"
    record.seconds = perf_counter() - start
    record.write()
    record.show()
    if record.failed:
        raise typer.Exit(1)


class Record:
    """What a part has found so far, and its result file."""

    def __init__(self, name: str, part: Part, setting: Setting, path: Path) -> None:
        self._name, self._part, self._setting, self._path = name, part, setting, path
        self._machine = facts(setting)
        self._findings: list[Finding] = []
        self._figures: list[step.Figure] = []
        self._measurements: list[Measurement] = []
        self.broken: str | None = None
        self.seconds: float | None = None

    @property
    def rows(self) -> list[Row]:
        """The targets of the part, three levels each."""
        return judge(self._targets, self._measurements)

    @property
    def failed(self) -> bool:
        return self.broken is not None or any(finding.passed is False for finding in self._findings)

    @property
    def _targets(self) -> list[Target]:
        targets = of(self._part.ids)
        large = self._name == "large-peers"
        return [target for target in targets if target.id not in ("T12", "T13") or (target.case == "8b") is large]

    def collect(self) -> None:
        """Run the part: a speed beside a wrong result means nothing, so a failed check ends it."""
        with torch.inference_mode():
            if self._part.checked:
                small = replace(self._setting, shapes=self._setting.shapes[:1], dtypes=self._setting.dtypes[:1])
                for finding in run(small, ("ops",)):
                    self._add(finding)
                if self.failed:
                    self.broken = "no figures: a check failed"
                    return
            for found in self._part.run(self._setting):
                self._add(found)

    def _add(self, found: step.Figure | Measurement | Finding) -> None:
        if isinstance(found, Finding):
            self._findings.append(found)
        elif isinstance(found, step.Figure):
            self._figures.append(found)
        else:
            note = f"dry run, not measured; {found.note}".removesuffix("; ")
            self._measurements.append(replace(found, value=None, note=note) if self._setting.dry else found)
        self.write()

    def write(self) -> None:
        """Write the result file as it stands."""
        write(self._result, self._path)

    @property
    def _result(self) -> dict[str, Any]:
        return {
            "bench": f"gpu-{self._name}",
            "machine": self._machine,
            "seconds": self.seconds,
            "broken": self.broken,
            "rows": as_json(self.rows),
            "findings": [asdict(finding) for finding in self._findings],
            "figures": [asdict(figure) for figure in self._figures],
        }

    def show(self) -> None:
        """Checks, figures, and last the targets."""
        for sheet in sheets(self._result):
            show(sheet)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        card = self._machine.get("gpu")
        if card and GPU not in card:
            console.print(f"measured on {card}: the targets are meant for an {GPU}")
        if self.broken:
            console.print(f"BROKE OFF: {self.broken}", style="bold red")
        console.print(f"{self._name}: {self.seconds or 0:.0f} s, {self._path}")


if __name__ == "__main__":
    app()
