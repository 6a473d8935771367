"""Every picture and table that documents show, made from result files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import ConfigError, SkipjackError
from . import (
    accept,
    conversation,
    gpu_sheets,
    host,
    latency,
    numerics,
    plots,
    profile,
    project,
    sheets,
    tables,
    unified_picture,
)
from .record import Sheet, markdown, read


@dataclass(frozen=True)
class Picture:
    """A picture drawn from each result of `bench`, which `command` makes."""

    name: str
    bench: str
    command: str
    draw: Callable[[dict[str, Any], Path], None]


PICTURES = (
    Picture("roofline", "micro", "make bench", plots.roofline),
    Picture("bandwidth", "gpu-steps", "bench/gpu.sh steps", plots.bandwidth),
    Picture("draft-cost", "decode", "skipjack bench decode MODEL --output FILE", plots.draft_line),
    Picture("acceptance", "decode", "skipjack bench decode MODEL --output FILE", plots.acceptance),
    Picture("methods", "methods", "skipjack bench methods MODEL --output FILE", plots.methods),
    Picture("round", "methods", "skipjack bench methods MODEL --output FILE", plots.one_round),
    Picture("timeline", "profile", "skipjack bench profile MODEL --output FILE", plots.timeline),
    Picture("peers", "peers", "skipjack bench peers MODEL --output FILE", plots.peers),
    Picture("unified", "unified", "skipjack bench unified MODEL --output FILE", unified_picture.draw),
    Picture("projection", "project", "skipjack bench project --costs FILE --output FILE", plots.projection),
)
SHEETS: dict[str, Callable[[dict[str, Any]], Sheet | tuple[Sheet, ...]]] = {
    "exact": sheets.exact,
    "methods": sheets.methods,
    "peers": sheets.peers,
    "accept": accept.sheet,
    "serve": latency.sheet,
    "chat": conversation.sheet,
    "numerics": numerics.sheets,
    "project": project.sheet,
    "unified": unified_picture.sheet,
    "decode": tables.decode,
    "micro": tables.micro,
    "baselines": sheets.baselines,
    "dmtd": sheets.dmtd,
    "forced": sheets.forced,
    "layers": sheets.layers,
    "host": host.sheet,
    "profile": profile.sheets,
}


# What the results of the parts of `bench/gpu.sh` are called.
PART_OF_GPU = "gpu-"


def draw(results: Path, output: Path, notify: Callable[[str], None]) -> list[Path]:
    """Draw every picture there is a result for, `output`/NAME-RESULT.svg; `notify` is told of the others.

    A picture shows one result file, so that devices never mix.

    Raises:
        ConfigError: `results` is no folder, or holds a file that is no result.
    """
    if not results.is_dir():
        raise ConfigError(f"RESULTS: no such folder: {results}")
    found = {path: read(path) for path in sorted(results.glob("*.json"))}
    drawn: list[Path] = []
    for picture in PICTURES:
        own = {path: result for path, result in found.items() if result["bench"] == picture.bench}
        if not own:
            notify(f"{picture.name}: skipped, no result in {results}: {picture.command}")
        for path, result in own.items():
            target = output / f"{picture.name}-{path.stem}.svg"
            try:
                picture.draw(result, target)
            except plots.NothingToDraw as nothing:
                notify(f"{picture.name}: skipped, {path}: {nothing}; {picture.command}")
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}: expected a result of `{picture.command}`: {error!r}") from error
            else:
                drawn.append(target)
    return drawn


def table(paths: Sequence[Path]) -> str:
    """Result files as Markdown tables; those of one bench, model, dtype and device share a table.

    Raises:
        ConfigError: a file is no result, or of a bench without a table.
    """
    made: list[Sheet] = []
    for path in paths:
        result = read(path)
        bench, on_gpu = result["bench"], str(result["bench"]).startswith(PART_OF_GPU)
        if bench not in SHEETS and not on_gpu:
            known = ", ".join([*SHEETS, f"{PART_OF_GPU}PART"])
            raise ConfigError(f"{path}: no table for results of {bench!r}; there is one for {known}")
        try:
            sheets_of = gpu_sheets.sheets(result) if on_gpu else SHEETS[bench](result)
        except (KeyError, TypeError, ValueError, IndexError, SkipjackError) as error:
            command = f"bench/gpu.sh {bench[len(PART_OF_GPU) :]}" if on_gpu else f"skipjack bench {bench}"
            raise ConfigError(f"{path}: expected a result of `{command}`: {error!r}") from error
        made += [sheets_of] if isinstance(sheets_of, Sheet) else sheets_of
    return markdown(made)
