"""What the model would say after every layer: each one read out through the final norm and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...kernels.host import ints
from ...loaders.config import ModelConfig
from ...loaders.tokenizer import Tokenizer
from ..engine import Engine
from ..errors import RequestError
from ..model import Model, Streams
from ..prefill import text_rows
from ..prompts import Check, to_ids
from ..request import SamplingParams
from .options import parse_ids
from .terminal import DRAFT, GENERATED, answers, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SHOWN_WIDTH = 10
BAR_WIDTH = 30


@dataclass(frozen=True)
class Reading:
    """One token as the exits see it: `predictions[i]`, of that probability, is what exit i + 1 says.

    `position` is the token's place in the text, `decided_at` the first exit from which on all say what the last says.
    """

    position: int
    predictions: tuple[int, ...]
    probabilities: tuple[float, ...]

    @property
    def token_id(self) -> int:
        """What the whole model predicts."""
        return self.predictions[-1]

    @property
    def decided_at(self) -> int:
        exits = len(self.predictions)
        return next((i + 1 for i in range(exits - 1, 0, -1) if self.predictions[i - 1] != self.token_id), 1)


@dataclass(frozen=True)
class Lens:
    """The readings of a text by a model of `exits` layers; exit i is its first i layers, the final norm and the head.

    The tokens a model decides early are those that skipping its last layers can draft (LayerSkip, arXiv 2404.16710
    §3.1).
    """

    exits: int
    prompt_tokens: int
    tokens: tuple[Reading, ...]

    @property
    def decided(self) -> tuple[float, ...]:
        """The share of tokens decided at each exit or before."""
        return self._shares([[i >= token.decided_at for i in range(1, self.exits + 1)] for token in self.tokens])

    @property
    def agrees(self) -> tuple[float, ...]:
        """The share of tokens for which each exit says what the whole model says."""
        return self._shares([[said == token.token_id for said in token.predictions] for token in self.tokens])

    @property
    def mean_decided_at(self) -> float:
        """Layers after which a token is decided, on average."""
        return sum(token.decided_at for token in self.tokens) / len(self.tokens)

    def _shares(self, hits: list[list[bool]]) -> tuple[float, ...]:
        return tuple(sum(column) / len(hits) for column in zip(*hits, strict=True))


def read_request(prompt: str | None, ids: str | None, max_tokens: int) -> str | list[int]:
    """The prompt, as text or from "1,2,3".

    Raises:
        RequestError: not exactly one of the two, what are no ids, or a negative number of tokens.
    """
    if prompt is not None and ids is not None:
        raise RequestError("prompt: expected one of --lens and --lens-ids, got both")
    if max_tokens < 0:
        raise RequestError(f"--max-tokens: expected at least 0, got {max_tokens}")
    return (prompt or "") if ids is None else parse_ids(ids, option="--lens-ids")


def lens_check(prompt: str | list[int]) -> Check:
    """What refuses a prompt that the model cannot take."""

    def check(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None and isinstance(prompt, str):
            raise RequestError("--lens: this model folder has no tokenizer.json: pass token ids with --lens-ids")
        to_ids(prompt, tokenizer, config)

    return check


def lens(engine: Engine, prompt: str | list[int], max_tokens: int = 32) -> Lens:
    """Read every exit for each token generated after `prompt`, or with `max_tokens` 0 for each that follows one of its.

    The tokens are generated greedily; then one teacher-forced pass over the text keeps the residual stream after every
    layer. It has the tiles of prefill and of decoding where generation had them, so that the last exit says exactly
    what was generated.

    Raises:
        RequestError: the prompt cannot be served.
        CapacityError: it needs more cache than there is.
    """
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    ids = to_ids(prompt, engine.tokenizer, engine.config)
    params = SamplingParams(max_tokens=max_tokens) if max_tokens else None
    generated = engine.generate(ids, params, method="autoregressive").token_ids if params else []
    tile = model.ops.decode_tile if generated else model.ops.prefill_tile
    text = [*ids, *generated[:-1]]
    first = len(ids) - 1 if generated else 0
    turns = engine._turn  # pyright: ignore[reportPrivateUsage]

    def read() -> list[Reading]:
        readings, start = list[Reading](), 0
        with torch.inference_mode(), cache.lent(len(text)) as pages:
            for rows in text_rows(model, text, len(ids), pages, as_decoded=True):
                wanted = max(first - start, 0)
                streams: Streams | None = [] if wanted < len(rows) else None
                model.forward(rows, cache, model.full, streams=streams)
                if streams is not None:
                    readings += _read(model, [x[wanted:] for x in streams[2::2]], start + wanted + 1, tile)
                start += len(rows)
        turns.rest()
        return readings

    return Lens(engine.config.num_layers, len(ids), tuple(turns.take(read)))


def report(found: Lens, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The lens as the object `--json` prints; `text` is null without a tokenizer."""
    return {
        "exits": found.exits,
        "prompt_tokens": found.prompt_tokens,
        "mean_decided_at": found.mean_decided_at,
        "decided": list(found.decided),
        "agrees": list(found.agrees),
        "tokens": [
            {
                "position": token.position,
                "token_id": token.token_id,
                "text": tokenizer.decode([token.token_id]) if tokenizer else None,
                "decided_at": token.decided_at,
                "predictions": list(token.predictions),
                "probabilities": list(token.probabilities),
            }
            for token in found.tokens
        ],
    }


def show(found: Lens, tokenizer: Tokenizer | None, console: Console | None = None) -> None:
    """A line per token and a line per exit on standard output; green is what the whole model says too."""
    from rich.table import Table
    from rich.text import Text

    console = console or answers()
    exits = shown_exits(found.exits, console.width)
    table = Table("at", "token", "decided", *(f"exit {i}" for i in exits))
    for token in found.tokens:
        said = [_shown(token, i, tokenizer) for i in exits]
        word = Text(_word(token.token_id, tokenizer), GENERATED)
        table.add_row(Text(str(token.position)), word, Text(f"{token.decided_at} of {found.exits}"), *said)
    shares = Table("exit", "decided", "agrees", "")
    for i, (decided, agrees) in enumerate(zip(found.decided, found.agrees, strict=True), 1):
        shares.add_row(Text(str(i)), Text(f"{decided:.2f}"), Text(f"{agrees:.2f}"), _bar(decided, agrees))
    console.print(table)
    console.print(shares)
    console.print(Text(f"decided after {found.mean_decided_at:.1f} of {found.exits} layers on average"))


def shown_exits(exits: int, width: int) -> list[int]:
    """Evenly spaced exits before the last, as many as fit into `width` columns beside a token and where it is."""
    fixed, column = 2 + SHOWN_WIDTH + 24, SHOWN_WIDTH + 3
    count = min(max((width - fixed) // column, 1), exits - 1)
    return [round(exits * (i + 1) / (count + 1)) for i in range(count)]


def _read(model: Model, after: list[Tensor], position: int, tile: int | None) -> list[Reading]:
    """The readings of rows with the residual streams `after` each layer, [R, H]; the first predicts `position`."""
    said = [model.predict(x, tile=tile) for x in after]
    tokens = [ints(prediction.token) for prediction in said]
    likely = [_floats((p.value.float() - p.log_sum_exp).exp().clamp(max=1.0)) for p in said]
    rows = zip(zip(*tokens, strict=True), zip(*likely, strict=True), strict=True)
    return [Reading(position + i, token, probability) for i, (token, probability) in enumerate(rows)]


def _floats(tensor: Tensor) -> list[float]:
    return cast("list[float]", tensor.tolist())


def _word(token: int, tokenizer: Tokenizer | None) -> str:
    """A token in at most SHOWN_WIDTH columns, its white space visible; its id where it has no text."""
    from rich.cells import cell_len, set_cell_size

    text = tokenizer.decode([token]) if tokenizer else ""
    if not text:
        return str(token)
    word = visible(text).replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return word if cell_len(word) <= SHOWN_WIDTH else set_cell_size(word, SHOWN_WIDTH - 1) + "…"


def _shown(token: Reading, i: int, tokenizer: Tokenizer | None) -> Text:
    from rich.text import Text

    said = token.predictions[i - 1]
    return Text(_word(said, tokenizer), GENERATED if said == token.token_id else "")


def _bar(decided: float, agrees: float) -> Text:
    from rich.text import Text

    full, reach = round(decided * BAR_WIDTH), round(agrees * BAR_WIDTH)
    return Text.assemble(("█" * full, GENERATED), ("░" * (reach - full), DRAFT))
