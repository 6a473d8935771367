"""Acceptance over prompt files: what draft tokens are worth, by method, category and depth. No speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from ..runtime.engine import Engine
from ..runtime.methods import registry
from ..runtime.request import SamplingParams
from .prompts import Prompt, source
from .record import Sheet, summarise, title

# Plain decoding drafts nothing, what auto drafts follows the machine's speed, and kangaroo needs the model's adapter.
METHODS = tuple(name for name in registry.lossless() if name not in ("autoregressive", "auto", "kangaroo"))
SHOWN_DEPTHS = 6
DEFINITIONS = (
    "acceptance rate = accepted ÷ drafted tokens; mean length = 1 + accepted ÷ rounds; at depth i: of the rounds whose "
    "draft reached depth i, the share in which the token of that depth was accepted (so an earlier rejection counts "
    "against it).",
    "Acceptance says nothing about speed: a draft that skips nothing is always accepted.",
)


@dataclass(frozen=True)
class Row:
    """One prompt with one method; `kept`, of `layers`, is what a draft step ran at the end, in layers."""

    method: str
    category: str
    prompt_tokens: int
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    drafted_per_position: tuple[int, ...]
    accepted_per_position: tuple[int, ...]
    kept: float
    layers: int


@dataclass(frozen=True)
class Line:
    """The rows of one method and category, added up before anything is divided."""

    method: str
    category: str
    prompts: int
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    acceptance_rate: float
    mean_acceptance_length: float
    acceptance_per_position: tuple[float, ...]
    kept: float
    layers: int


def measure(
    engine: Engine,
    methods: Sequence[str],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    progress: Callable[[Row], None],
) -> list[Row]:
    """Every prompt with every method, one at a time and in order, for methods that learn."""
    rows: list[Row] = []
    for method in methods:
        for prompt in prompts:
            stats = engine.generate(source(prompt, engine.tokenizer, engine.config), params, method=method).stats
            rows.append(
                Row(
                    method,
                    prompt.category,
                    stats.prompt_tokens,
                    stats.completion_tokens,
                    stats.rounds,
                    stats.drafted,
                    stats.accepted,
                    stats.drafted_per_position,
                    stats.accepted_per_position,
                    stats.layers_kept,
                    stats.layers,
                )
            )
            progress(rows[-1])
    return rows


def summary(rows: Sequence[Row]) -> list[Line]:
    """A line for every method and category, and one for all categories of a method."""
    return summarise(rows, _line)


def sheet(result: dict[str, Any]) -> Sheet:
    """The summary as a table."""
    depths = [f"at {i + 1}" for i in range(SHOWN_DEPTHS)]
    columns = ("method", "category", "prompts", "drafted", "accepted", "acceptance rate", "mean length", *depths)
    rows: list[tuple[str, ...]] = []
    for line in result["summary"]:
        shares = [f"{share:.2f}" for share in line["acceptance_per_position"][:SHOWN_DEPTHS]]
        counts = [str(line[name]) for name in ("prompts", "drafted", "accepted")]
        rate = f"{line['acceptance_rate']:.2f}" if line["drafted"] else "nothing drafted"
        cells = (line["method"], line["category"], *counts, rate, f"{line['mean_acceptance_length']:.2f}", *shares)
        rows.append(cells + ("",) * (len(columns) - len(cells)))
    sampling = f"temperature {result['temperature']:g}, {result['max_tokens']} tokens"
    return Sheet(f"Acceptance: {title(result)}, {sampling}", columns, tuple(rows), DEFINITIONS)


def _line(method: str, category: str, rows: Sequence[Row]) -> Line:
    drafted, accepted, rounds = (sum(getattr(row, name) for row in rows) for name in ("drafted", "accepted", "rounds"))
    reached, kept = (
        [sum(counts) for counts in zip_longest(*(getattr(row, name) for row in rows), fillvalue=0)]
        for name in ("drafted_per_position", "accepted_per_position")
    )
    shares = tuple(a / d if d else 0.0 for d, a in zip_longest(reached, kept, fillvalue=0))
    return Line(
        method,
        category,
        len(rows),
        sum(row.tokens for row in rows),
        rounds,
        drafted,
        accepted,
        accepted / drafted if drafted else 0.0,
        1 + accepted / rounds if rounds else 1.0,
        shares,
        sum(row.kept for row in rows) / len(rows),
        rows[0].layers,
    )
