"""Reading a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import KVCache
from .model import Model
from .plan import LayerPlan
from .rows import Rows, one_sequence
from .sequence import Sequence

PREFILL_CHUNK = 1024


def read(model: Model, cache: KVCache, sequence: Sequence, plan: LayerPlan) -> Tensor:
    """Cache a prompt: the residual stream [1, H] of its last token.

    The prompt has tiles of its own, of the same size for every prompt and batch: its neighbours cannot change it.
    """
    hidden = torch.empty(0, device=model.device)
    for rows in prompt_rows(model, sequence):
        hidden = model.forward(rows, cache, plan)
    return hidden[-1:]


def prompt_rows(model: Model, sequence: Sequence) -> list[Rows]:
    """The rows of a sequence's prompt, in chunks."""
    return [
        one_sequence(
            sequence.prompt[first : first + PREFILL_CHUNK],
            first,
            sequence.pages,
            model.ops.prefill_tile,
            model.device,
            prompt=len(sequence.prompt),
        )
        for first in range(0, len(sequence.prompt), PREFILL_CHUNK)
    ]
