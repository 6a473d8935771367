"""Reading a prompt."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from .cache import KVCache
from .model import Model
from .plan import LayerPlan
from .rows import Rows, one_sequence
from .sequence import Sequence

PREFILL_CHUNK, CPU_CHUNK = 1024, 512
Result = TypeVar("Result")
# Between its parts, of each of which it first tells the rows, others take their turns.
Reading: TypeAlias = Generator[int, None, Result]


def read(model: Model, cache: KVCache, sequence: Sequence, plan: LayerPlan) -> Reading[Tensor]:
    """Cache a prompt: the residual stream [1, H] of its last token.

    The prompt has tiles of its own, of the same size for every prompt and batch: its neighbours cannot change it.
    """
    hidden = torch.empty(0, device=model.device)
    for rows in prompt_rows(model, sequence):
        yield len(rows)
        hidden = model.forward(rows, cache, plan)
    return hidden[-1:]


def prefill_chunk(device: torch.device) -> int:
    """Rows of a prompt that are read in one turn; of smaller parts a CPU makes as much in all, and others wait less."""
    return min(PREFILL_CHUNK, CPU_CHUNK) if device.type == "cpu" else PREFILL_CHUNK


def prompt_rows(model: Model, sequence: Sequence) -> list[Rows]:
    """The rows of a sequence's prompt, in chunks."""
    return text_rows(model, sequence.prompt, len(sequence.prompt), sequence.pages)


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
