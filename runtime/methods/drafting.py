"""Drafting with a part of the model itself, one token a pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch, Draft
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..sampling import choose
from .base import no_draft


def chain(
    model: Model, cache: KVCache, batch: Batch, plan: LayerPlan, num_draft_tokens: int, threshold: float
) -> tuple[Draft, Tensor]:
    """Draft with `plan` until the model is unsure; the unsure token stays in the draft (SWIFT, §4.2).

    Also returns the residual streams [S, k, H] the draft tokens were chosen from, those of the rows drafted from.
    """
    steps = min(num_draft_tokens, int(batch.room.max()))
    drafting = batch.room > 0
    count = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    path, states = batch.last[:, None], list[Tensor]()
    for step in range(steps):
        if not bool(drafting.any()):
            break
        rows = batch.rows(path[:, -1:], batch.length + step, drafting.long())
        states.append(model.forward(rows, cache, plan))
        chosen = choose(model, states[-1], batch, path)
        path = torch.cat([path, chosen.tokens], dim=1)
        count += drafting
        drafting = drafting & (chosen.probability[:, 0] >= threshold) & (count < batch.room)
    if not states:
        hidden = torch.empty(len(batch), 0, model.config.hidden_size, dtype=model.dtype, device=batch.device)
        return no_draft(batch), hidden
    return Draft(path[:, 1:].contiguous(), count), torch.stack(states, dim=1)
