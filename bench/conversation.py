"""What the prefix cache saves in a conversation: the time to the first token of each answer, with it and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Annotated, Any, cast

import typer

from ..runtime.engine import Engine
from ..runtime.prefixes import Prefixes
from ..runtime.prompts import Prompt as Source
from ..runtime.prompts import is_written
from ..runtime.request import Output, SamplingParams
from . import options
from .record import Sheet, Spread, deliver, header, title

DEFINITIONS = (
    "First token: from the request to its first token, median of conversations with the prefix cache and without, by "
    "turns. A turn's prompt is all that was said before it; a conversation with the cache begins with an empty "
    "one. Answers are greedy, and those with the cache equal to those without.",
)


@dataclass(frozen=True)
class Row:
    """One turn; times are seconds. `ratio`: with the cache ÷ without, of each pair of conversations."""

    turn: int
    prompt_tokens: int
    cached_tokens: int
    without: Spread | None
    cached: Spread | None
    ratio: Spread | None


@dataclass(frozen=True)
class Turn:
    """What one turn of one conversation came to."""

    first_s: float
    output: Output


def measure(
    engine: Engine, questions: Sequence[Source], params: SamplingParams, pairs: int, progress: Callable[[str], None]
) -> tuple[list[Row], bool]:
    """The turns of a conversation of these questions, and whether all answers were equal, after one to warm up."""
    cache = engine._loaded()[1]
    met: dict[bool, list[list[Turn]]] = {False: [], True: []}
    for number in range(pairs + 1):
        for caching in (False, True) if number % 2 else (True, False):
            cache.prefixes = Prefixes(cache.page_size) if caching else None
            met[caching].append(_converse(engine, questions, params))
        progress(f"conversations: {number} of {pairs}, and one to warm up")
    cache.prefixes = None
    same = all(
        [turn.output.token_ids for turn in talk] == [turn.output.token_ids for turn in met[False][0]]
        for talks in met.values()
        for talk in talks
    )
    return [_row(turn, met[False][1:], met[True][1:]) for turn in range(len(questions))], same


def _row(turn: int, without: list[list[Turn]], cached: list[list[Turn]]) -> Row:
    """What a turn came to in the conversations without the cache and in those with it."""
    plain, copied = ([talk[turn] for talk in talks] for talks in (without, cached))
    stats = copied[-1].output.stats
    return Row(
        turn + 1,
        stats.prompt_tokens,
        stats.cached_tokens,
        Spread.of([one.first_s for one in plain]),
        Spread.of([one.first_s for one in copied]),
        Spread.of([a.first_s / b.first_s for a, b in zip(copied, plain, strict=True)]),
    )


def chat(
    model: options.Model = "demo",
    prompts: options.Prompts = None,
    turns: Annotated[int, typer.Option(min=1, max=100, help="Questions of a conversation.")] = 6,
    pairs: Annotated[int, typer.Option(min=1, help="Conversations with the prefix cache, and as many without.")] = 5,
    method: Annotated[str, typer.Option(metavar="NAME[:key=value,…]")] = "autoregressive",
    max_tokens: options.MaxTokens = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    cache_tokens: options.CacheTokens = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """The time to the first token of each answer of a conversation, with the prefix cache and without."""
    from .peers import folder_of
    from .prompts import source

    chosen, notes = options.chosen(prompts, turns), options.notes()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    check = options.able([method], chosen[:1], max_tokens)
    with (
        folder_of(model) as folder,
        Engine.load(
            folder, method=method, device=device, dtype=dtype, cache_tokens=cache_tokens, check=check
        ) as engine,
    ):
        questions = [source(chosen[i % len(chosen)], engine.tokenizer, engine.config) for i in range(turns)]
        rows, same = measure(engine, questions, params, pairs, notes)
        result = header("chat", engine, model)
    if not same:
        options.alarm("NOT IDENTICAL: answers with the prefix cache are not those without it: no time is reported")
        raise typer.Exit(1)
    result |= {"method": method, "max_tokens": max_tokens, "rows": [asdict(row) for row in rows]}
    deliver(result, sheet, output, as_json)


def sheet(result: dict[str, Any]) -> Sheet:
    """The turns as a table, milliseconds."""
    columns = ("turn", "prompt tokens", "of them cached", "first token, ms", "with the cache, ms", "ratio", "p10–p90")
    rows = tuple(
        (
            str(row["turn"]),
            str(row["prompt_tokens"]),
            str(row["cached_tokens"]),
            f"{1e3 * row['without']['p50']:.1f}",
            f"{1e3 * row['cached']['p50']:.1f}",
            f"{row['ratio']['p50']:.2f}",
            f"{row['ratio']['p10']:.2f}–{row['ratio']['p90']:.2f}",
        )
        for row in result["rows"]
    )
    return Sheet(f"Conversation by {result['method']}: {title(result)}", columns, rows, DEFINITIONS)


def _converse(engine: Engine, questions: Sequence[Source], params: SamplingParams) -> list[Turn]:
    said: list[Any] = []
    turns: list[Turn] = []
    for question in questions:
        said += cast("list[Any]", question)
        start, first = perf_counter(), None
        with engine.stream(list(said), params) as stream:
            for _ in stream:
                first = perf_counter() - start if first is None else first
        turns.append(Turn(first or 0.0, stream.outputs[0]))
        answer = stream.outputs[0]
        said += [{"role": "assistant", "content": answer.text}] if is_written(said) else answer.token_ids
    return turns
