"""The round as the device runs it alone: tensors of fixed shapes in, tensors out, and no question to the host."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch, Draft, Exit, Recipe, Sampling
from .cache import KVCache
from .model import Model
from .routes import Routes, layers_used
from .sampling import draw
from .speculate import verify_pass


class State(NamedTuple):
    """What a round reads and what it leaves for the next one; S sequences, of which those with tokens left run.

    last, length int64 [S] as in Batch; left int64 [S] tokens that may still be appended; block_table int64 [S, W]; mask
    bool [2L], the sub-layers that draft; threshold float32 []; sampling, [S] each; report int64 [S, k + 4]: accepted
    (-1: the sequence did not run), drafted, the token after the accepted ones, the sub-layers that ran for its newest
    token in the pass that has the last word, and the k draft tokens.
    """

    last: Tensor
    length: Tensor
    left: Tensor
    block_table: Tensor
    mask: Tensor
    threshold: Tensor
    sampling: Sampling
    report: Tensor

    @staticmethod
    def empty(sequences: int, pages: int, sublayers: int, num_draft_tokens: int, device: torch.device) -> State:
        """A state in which nothing runs."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        temperature, top_p, min_p = (zeros(sequences, dtype=torch.float32) for _ in range(3))
        return State(
            zeros(sequences),
            zeros(sequences),
            zeros(sequences),
            zeros(sequences, pages),
            zeros(sublayers, dtype=torch.bool),
            zeros(dtype=torch.float32),
            Sampling(temperature, top_p, min_p, zeros(sequences), zeros(sequences)),
            zeros(sequences, num_draft_tokens + 4),
        )


def device_round(model: Model, cache: KVCache, state: State, recipe: Recipe) -> None:
    """Draft, verify and commit, as `speculate` does, in place in `state`.

    The tokens are those of `speculate`: the same passes over the same rows. A sequence drafts no more than it has room
    for; rows past its draft belong to no sequence.
    """
    alive = state.left > 0
    room = torch.where(alive, state.left - 1, 0)
    batch = Batch([], state.last, state.length, room, state.block_table, model.ops.decode_tile, alive)
    draft = _draft(model, cache, batch, state, recipe)
    path = torch.cat([batch.last[:, None], draft.tokens], dim=1)
    with model.mark("verify", len(batch), path.numel()):
        routes: Routes | None = None if model.config.routing is None else {}
        hidden = verify_pass(model, cache, batch, path, draft, None, recipe.target, routes=routes)
        width = path.shape[1]
        depth = torch.arange(1, width + 1, device=batch.device)
        rule = Sampling(*(field.repeat_interleave(width) for field in state.sampling)) if recipe.sampled else None
        chosen, _ = draw(model, hidden, rule, (batch.length[:, None] + depth).flatten())
        verdict = model.ops.verify(chosen.view(path.shape), draft.tokens, draft.length, batch.length)
        ran = torch.full_like(batch.length, len(recipe.target.sublayers))
        if routes:
            ran = 2 * layers_used(routes, model.config.num_layers).view(path.shape)[:, 0]
    with model.mark("commit", len(batch), path.numel()):
        accepted = torch.where(alive, verdict.accepted, -1)
        told = torch.stack([accepted, draft.length, verdict.token, ran], dim=1)
        state.report.copy_(torch.cat([told, draft.tokens], dim=1))
        state.last.copy_(torch.where(alive, verdict.token, state.last))
        state.length.add_(accepted + 1)
        state.left.sub_(accepted + 1)


def _draft(model: Model, cache: KVCache, batch: Batch, state: State, recipe: Recipe) -> Draft:
    """A chain of `num_draft_tokens` steps; a sequence that has stopped drafting has no rows in the rest of them."""
    steps = recipe.num_draft_tokens
    count, streams, tokens = torch.zeros_like(batch.length), list[Tensor](), [batch.last]
    drafting = batch.room > 0
    for step in range(steps):
        with model.mark("draft", len(batch), len(batch), step):
            rows = batch.rows(tokens[-1][:, None], batch.length + step, drafting.long())
            if recipe.masked or recipe.confident:
                runs = state.mask if recipe.masked else torch.ones_like(state.mask)
                rows = replace(rows, active=runs[:, None] & drafting)
            streams.append(model.forward(rows, cache, recipe.plan))
            rule = state.sampling if recipe.sampled else None
            token, sure = draw(model, streams[-1], rule, batch.length + step + 1, drafting, recipe.vocabulary)
            tokens.append(token)
            count = count + drafting
            drafting = drafting & (count < batch.room)
            if recipe.confident:
                drafting = drafting & (sure >= state.threshold)
    none = torch.empty(len(batch), 0, dtype=torch.int64, device=batch.device)
    draft = Draft(torch.stack(tokens[1:], dim=1) if steps else none, count)
    if not recipe.reuse or not steps:
        return draft
    return draft._replace(exit=Exit(recipe.plan.span[1] // 2, torch.stack(streams, dim=1)))
