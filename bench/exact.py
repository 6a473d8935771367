"""Losslessness on real text: speculative decoding against plain decoding, token by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.engine import Engine
from ..runtime.request import Output, SamplingParams
from .prompts import Prompt

METHODS = ("swift", "swift tree", "lookup", "layerskip", "clasp", "auto", "swift search", "knapspec")
BATCHES = (1, 4, 16)


@dataclass(frozen=True)
class Row:
    """One prompt: what was run and how it compared. `speed` is tokens/s ÷ those of plain decoding."""

    category: str
    method: str
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
    batch: int = 1,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Every prompt by plain decoding alone, and by a lossless method in batches of `batch` (0: of 1, 4 and 16 in turn).

    The method, its draft length 1 to 8, its skip set, threshold, tree and exit layer rotate from batch to batch.
    """
    rows: list[Row] = []
    start = number = 0
    while start < len(prompts):
        group = prompts[start : start + (batch or BATCHES[number % len(BATCHES)])]
        chats = [[{"role": "user", "content": prompt.text}] for prompt in group]
        method = cell(number, engine.config.num_layers)
        start, number = start + len(group), number + 1
        drafted = engine.generate(chats, params, method=method)
        for prompt, chat, output in zip(group, chats, drafted, strict=True):
            rows.append(_row(prompt.category, method, output, engine.generate(chat, params)))
            if progress:
                progress(rows[-1])
    return rows


def cell(number: int, layers: int) -> str:
    """The method and options of one batch; any two of its factors meet in every combination as numbers go on."""
    name = METHODS[number % len(METHODS)]
    turn = number // len(METHODS)
    k = 1 + (turn + number % len(METHODS)) % 8
    if name == "lookup":
        return f"lookup:num_draft_tokens={k},max_ngram={1 + turn % 4}"
    if name == "auto":
        return f"auto:num_draft_tokens={k},max_loss=0.5,search_budget=0.05,skip_ratio=0.15"
    threshold = (0.0, 0.5, 0.8)[turn // 8 % 3]
    if name == "layerskip":
        layer = max(1, layers - 1 - turn % (layers - 1))
        return f"layerskip:num_draft_tokens={k},threshold={threshold},exit_layer={layer},reuse={turn % 2 == 0}"
    if name in ("clasp", "knapspec"):
        return f"{name}:num_draft_tokens={k},threshold={threshold},interval=8,search_budget=1.0"
    tree = ",tree=true" if name == "swift tree" else ""
    drafting = f"num_draft_tokens={k},threshold={threshold}{tree}"
    if name == "swift search":
        return f"swift:{drafting},search_budget=0.2,skip_ratio=0.15,bayes_interval=3,seed={number}"
    size = max(1, (layers - 2) // (4, 6, 10)[turn % 3])
    chosen = np.random.default_rng(number).choice(2 * (layers - 2), size, replace=False)
    attention = "+".join(str(i // 2 + 1) for i in sorted(chosen.tolist()) if i % 2 == 0)
    mlp = "+".join(str(i // 2 + 1) for i in sorted(chosen.tolist()) if i % 2)
    return f"swift:{drafting},skip_attention={attention},skip_mlp={mlp}"


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


def _row(category: str, method: str, output: Output, plain: Output) -> Row:
    pairs = zip(output.token_ids, plain.token_ids, strict=False)
    shorter = min(len(output.token_ids), len(plain.token_ids))
    identical = output.token_ids == plain.token_ids and output.text == plain.text
    difference = None if identical else next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    stats = output.stats
    speed = stats.tokens_per_s / plain.stats.tokens_per_s if plain.stats.tokens_per_s else 0.0
    return Row(
        category,
        method,
        stats.prompt_tokens,
        stats.completion_tokens,
        identical,
        difference,
        stats.drafted,
        stats.accepted,
        stats.rounds,
        round(speed, 4),
    )
