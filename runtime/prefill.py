"""Reading a prompt."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor

from .cache import KVCache
from .model import Model
from .rows import Rows, one_sequence
from .sequence import Sequence

if TYPE_CHECKING:
    from .methods.base import Method

# Rows of a prompt that are read in one turn: on a GPU, on a CPU, and there while others wait for their next token.
PREFILL_CHUNK, CPU_CHUNK, SHARED_CHUNK = 1024, 512, 128
Result = TypeVar("Result")
# Between its parts, of each of which it first tells the rows, others take their turns.
Reading: TypeAlias = Generator[int, None, Result]


def read(model: Model, sequence: Sequence, forward: Callable[[Rows], Tensor]) -> Reading[Tensor]:
    """Cache a prompt by `forward` over parts of it: the residual stream [1, H] of its last token.

    The prompt has tiles of its own, of the same size for every prompt and batch: its neighbours cannot change it.
    """
    hidden = torch.empty(0, device=model.device)
    for rows in prompt_rows(model, sequence):
        yield len(rows)
        hidden = forward(rows)
    return hidden[-1:]


def recall(model: Model, cache: KVCache, sequence: Sequence, method: Method) -> None:
    """Have the prefix cache fill as much of a prompt as it knows; the rest is to be read."""
    plain = _is_plain(model, sequence, method)
    sequence.known = cache.recall(method.prompt_kind, sequence.prompt, sequence.pages) if plain else 0


def remember(model: Model, cache: KVCache, sequence: Sequence, method: Method) -> None:
    """Let the prefix cache know of a prompt that has been read."""
    if not sequence.lost and _is_plain(model, sequence, method):
        cache.remember(method.prompt_kind, sequence.prompt, sequence.pages)


def _is_plain(model: Model, sequence: Sequence, method: Method) -> bool:
    """Whether nothing but a prompt's tokens and the method's pass decides its keys and values."""
    return method.plain_prompts and not model.stretched(len(sequence.prompt))


def prefill_chunk(device: torch.device, *, shared: bool = False) -> int:
    """Rows of a prompt that are read in one turn; of smaller parts a CPU makes nearly as much, and others wait less."""
    if device.type != "cpu":
        return PREFILL_CHUNK
    return min(PREFILL_CHUNK, SHARED_CHUNK if shared else CPU_CHUNK)


def prompt_rows(model: Model, sequence: Sequence) -> Iterator[Rows]:
    """The rows of a sequence's prompt, in chunks as long as its turns may be when they come."""
    at, length, tile = sequence.known, len(sequence.prompt), model.ops.prefill_tile
    while at < length:
        part = sequence.prompt[at : at + prefill_chunk(model.device, shared=sequence.shares)]
        yield one_sequence(part, at, sequence.pages, tile, model.device, prompt=length)
        at += len(part)


def whole_prompts(model: Model, sequences: list[Sequence]) -> tuple[Rows, Tensor]:
    """The rows of the prompts of several sequences, none of them `Model.stretched`, and which are the last of each."""
    device, spans = model.device, [range(sequence.known, len(sequence.prompt)) for sequence in sequences]
    width = max(len(sequence.pages) for sequence in sequences)
    rows = Rows(
        torch.tensor([token for sequence in sequences for token in sequence.prompt[sequence.known :]], device=device),
        torch.tensor([position for span in spans for position in span], device=device),
        torch.tensor([number for number, span in enumerate(spans) for _ in span], device=device),
        torch.tensor([s.pages + [0] * (width - len(s.pages)) for s in sequences], device=device),
        model.ops.prefill_tile,
        prompt=max(span.stop for span in spans),
    )
    return rows, torch.tensor(list(accumulate(map(len, spans))), device=device) - 1


def text_rows(model: Model, text: list[int], prompt: int, pages: list[int], *, as_decoded: bool = False) -> list[Rows]:
    """The rows of a text, in chunks: its first `prompt` tokens are a prompt, the rest was generated.

    Either kind rotates as it did then. All have a prompt's tiles; with `as_decoded` those generated have decoding's.
    """
    generated, chunk = model.ops.decode_tile if as_decoded else model.ops.prefill_tile, prefill_chunk(model.device)
    rows: list[Rows] = []
    for first, end, tile, length in (
        (0, prompt, model.ops.prefill_tile, prompt),
        (prompt, len(text), generated, None),
    ):
        for at in range(first, end, chunk):
            part = text[at : min(end, at + chunk)]
            rows.append(one_sequence(part, at, pages, tile, model.device, prompt=length))
    return rows
