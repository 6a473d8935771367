"""Losslessness on real text: speculative decoding against plain decoding, token by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.engine import Engine
from ..runtime.request import Output, SamplingParams
from . import rotation
from .prompts import Prompt, source
from .rotation import Cell


@dataclass(frozen=True)
class Row:
    """One prompt with one method: what was run and how it compared. `speed` is tokens/s ÷ those of plain decoding.

    `cell` is the number of the method's cell in `rotation`, which another batch size than `batch` may belong to.
    """

    category: str
    name: str
    cell: int
    method: str
    batch: int
    prompt_tokens: int
    tokens: int
    identical: bool
    first_difference: int | None
    drafted: int
    accepted: int
    rounds: int
    speed: float


@dataclass(frozen=True)
class Line:
    """What the rows of one category add up to."""

    category: str
    prompts: int
    tokens: int
    identical: int
    acceptance_rate: float
    mean_acceptance_length: float
    speed_median: float


def compare(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    names: Sequence[str] = rotation.NAMES,
    batch: int = 0,
    cover: bool = False,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Every prompt by plain decoding alone, and by each of `names` in a batch of others, as `groups` says."""
    rows: list[Row] = []
    plain: dict[int, Output] = {}
    for name in names:
        cells = rotation.cells(name)
        for number, (cell, group) in enumerate(groups(name, len(prompts), batch, cover)):
            sources = [source(prompts[i], engine.tokenizer, engine.config) for i in group]
            method = cell.method(engine.config.num_layers, number)
            drafted = engine.generate(sources, params, method=method)
            for i, given, output in zip(group, sources, drafted, strict=True):
                if i not in plain:
                    plain[i] = engine.generate(given, params)
                rows.append(
                    _row(prompts[i].category, (name, number % len(cells), method, len(group)), output, plain[i])
                )
                if progress:
                    progress(rows[-1])
    return rows


def groups(name: str, prompts: int, batch: int = 0, cover: bool = False) -> Iterator[tuple[Cell, list[int]]]:
    """Prompts by their numbers, and the cell of `rotation` that a method runs them with, one cell after another.

    A cell says the size of the batch too; `batch` other than 0 is that size instead. With `cover` the prompts come
    again until every cell has had its turn, and with them every two levels of the method's factors.
    """
    cells = rotation.cells(name)
    start = number = 0
    while start < prompts or (cover and number < len(cells)):
        cell = cells[number % len(cells)]
        end = start + (batch or cell.batch)
        yield cell, [i % prompts for i in range(start, end if cover else min(prompts, end))]
        start, number = end, number + 1


def coverage(rows: Sequence[Row]) -> dict[str, str]:
    """For every method, how many of the pairs of its factors' levels the rows have run."""
    found: dict[str, str] = {}
    for name in dict.fromkeys([*rotation.NAMES, *(row.name for row in rows)]):
        every, ran = set[rotation.Pair](), set[rotation.Pair]()
        for number, cell in enumerate(rotation.cells(name)):
            pairs = rotation.pairs(cell)
            every |= pairs
            for row in rows:
                if (row.name, row.cell) == (name, number):
                    own = row.batch == cell.batch
                    ran |= {pair for pair in pairs if own or "batch" not in dict(pair)}
        found[name] = f"{len(ran)} of {len(every)}"
    return found


def summary(rows: Sequence[Row]) -> list[Line]:
    """One line per category, and one for all of them."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.category].append(row)
    return [_line(name, group) for name, group in [*groups.items(), ("all", list(rows))]]


def _line(name: str, rows: Sequence[Row]) -> Line:
    drafted, accepted = sum(r.drafted for r in rows), sum(r.accepted for r in rows)
    return Line(
        category=name,
        prompts=len(rows),
        tokens=sum(r.tokens for r in rows),
        identical=sum(r.identical for r in rows),
        acceptance_rate=accepted / drafted if drafted else 0.0,
        mean_acceptance_length=1 + accepted / max(1, sum(r.rounds for r in rows)),
        speed_median=float(np.median([r.speed for r in rows])),
    )


def _row(category: str, run: tuple[str, int, str, int], output: Output, plain: Output) -> Row:
    pairs = zip(output.token_ids, plain.token_ids, strict=False)
    shorter = min(len(output.token_ids), len(plain.token_ids))
    identical = output.token_ids == plain.token_ids and output.text == plain.text
    difference = None if identical else next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    stats = output.stats
    speed = stats.tokens_per_s / plain.stats.tokens_per_s if plain.stats.tokens_per_s else 0.0
    return Row(
        category,
        *run,
        stats.prompt_tokens,
        stats.completion_tokens,
        identical,
        difference,
        stats.drafted,
        stats.accepted,
        stats.rounds,
        round(speed, 4),
    )
