"""Rounds as the device runs them alone: tensors of fixed shapes in, tensors out, and no question to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch, Draft, Exit, Sampling
from .cache import KVCache
from .methods.drafting import FIRST_DRAFT_STREAM
from .model import Model
from .recipe import Recipe, Steps
from .sampling import draw
from .speculate import decide, verify_pass


class State(NamedTuple):
    """What a round reads and what it leaves for the next one; S sequences, of which those with tokens left run.

    last, length, prompt int64 [S] as in Batch; left int64 [S] tokens that may still be appended; block_table int64
    [S, W]; mask bool [2L], the sub-layers that draft; threshold float32 []; limit int64 [], the longest draft;
    sampling, [S] each; memory [S, …], what the recipe's steps remember; text int32 [S, C], the tokens so far where
    drafts come from them. The report is int64 [S, k + 3]: accepted (-1: the sequence did not run), drafted, the token
    after the accepted ones, and the k draft tokens; or [S, steps, 2]: of each step the token and the sub-layers that
    ran (-1: the sequence did not).
    """

    last: Tensor
    length: Tensor
    prompt: Tensor
    left: Tensor
    block_table: Tensor
    mask: Tensor
    threshold: Tensor
    limit: Tensor
    sampling: Sampling
    memory: Tensor
    text: Tensor | None
    report: Tensor

    @staticmethod
    def empty(model: Model, recipe: Recipe, sequences: int, pages: int) -> State:
        """A state in which nothing runs."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        temperature, top_p, min_p = (zeros(sequences, dtype=torch.float32) for _ in range(3))
        steps = recipe.steps or Steps()
        report = (steps.count, 2) if recipe.steps else (recipe.num_draft_tokens + 3,)
        return State(
            zeros(sequences),
            zeros(sequences),
            zeros(sequences),
            zeros(sequences),
            zeros(sequences, pages),
            zeros(2 * model.config.num_layers, dtype=torch.bool),
            zeros(dtype=torch.float32),
            zeros(),
            Sampling(temperature, top_p, min_p, zeros(sequences), zeros(sequences)),
            steps.memory(model, sequences),
            zeros(sequences, pages * model.ops.page_size, dtype=torch.int32) if recipe.ngrams else None,
            zeros(sequences, *report),
        )

    def batch(self, model: Model, alive: Tensor) -> Batch:
        """The sequences as they stand, of which those `alive` bool [S] run."""
        return Batch(
            [], self.last, self.length, self.left - 1, self.prompt, self.block_table, model.ops.decode_tile, alive
        )


def device_round(model: Model, cache: KVCache, state: State, recipe: Recipe) -> None:
    """Draft, verify and commit, as `speculate` does, in place in `state`.

    The tokens are those of `speculate`: the same passes over the same rows. A sequence drafts no more than it has room
    for; rows past its draft belong to no sequence.
    """
    batch = state.batch(model, state.left > 0)
    draft = _draft(model, cache, batch, state, recipe)
    path = torch.cat([batch.last[:, None], draft.tokens], dim=1) if recipe.num_draft_tokens else batch.last[:, None]
    with model.mark("verify", len(batch), path.numel()):
        hidden = verify_pass(model, cache, batch, path, draft, None, recipe.target)
        rule, position = _noise(state, batch, path.shape[1]) if recipe.sampled else (None, None)
        chosen = draw(model, hidden, rule, position)
        scores = None if chosen.logits is None else chosen.logits.view(*path.shape, -1)
        warped = state.sampling if recipe.rejection else None
        verdict = decide(model, batch, draft, chosen.token.view(path.shape), scores, warped)
    with model.mark("commit", len(batch), path.numel()):
        model.ops.commit(
            verdict.accepted,
            verdict.token,
            draft.length,
            draft.tokens,
            state.last,
            state.length,
            state.left,
            state.report,
            state.text,
        )


def device_steps(model: Model, cache: KVCache, state: State, steps: Steps, sampled: bool) -> None:
    """A token after the other for every sequence from the passes of a policy, as `decode`, in place in `state`."""
    for number in range(steps.count):
        alive = state.left > 0
        batch = state.batch(model, alive)
        with model.mark("verify", len(batch), len(batch)):
            hidden, ran = steps.step(model, cache, batch, state.memory, number)
            token = draw(model, hidden, state.sampling if sampled else None, batch.length + 1, alive).token
        with model.mark("commit", len(batch), len(batch)):
            state.report[:, number].copy_(torch.stack([token, torch.where(alive, ran, -1)], dim=1))
            state.last.copy_(torch.where(alive, token, state.last))
            state.length.add_(alive.long())
            state.left.sub_(alive.long())


def _draft(model: Model, cache: KVCache, batch: Batch, state: State, recipe: Recipe) -> Draft:
    """A chain from the text, or one of `num_draft_tokens` steps; a draft that has stopped has no rows in the others."""
    steps, confident = recipe.num_draft_tokens, recipe.confident
    count, tokens = torch.zeros_like(batch.length), [batch.last]
    if not steps:
        return Draft(torch.empty(len(batch), 0, dtype=torch.int64, device=batch.device), count)
    if recipe.ngrams is not None and state.text is not None:
        with model.mark("draft", len(batch), 0, 0):
            return Draft(
                *model.ops.lookup(
                    state.text,
                    batch.length,
                    batch.room,
                    max_ngram=recipe.ngrams.longest,
                    num_draft_tokens=steps,
                    votes=recipe.ngrams.votes,
                )
            )
    room = torch.minimum(batch.room, state.limit) if recipe.limited else batch.room
    going = room > 0
    streams, scores = list[Tensor](), list[Tensor]()
    mask = state.mask if recipe.masked else None
    for step in range(steps):
        with model.mark("draft", len(batch), len(batch), step):
            rows = batch.drafted(tokens[-1], step, going, gated=confident, mask=mask)
            streams.append(model.forward(rows, cache, recipe.plan))
            rule, position = (state.sampling, batch.length + step + 1) if recipe.sampled else (None, None)
            stream = FIRST_DRAFT_STREAM + step if recipe.rejection else 0
            drawn = draw(model, streams[-1], rule, position, going, recipe.vocabulary, stream, confidence=confident)
            if recipe.rejection and drawn.logits is not None:
                scores.append(torch.where(going[:, None], drawn.logits, 0))
            threshold = state.threshold if confident else None
            count, going, token = model.ops.extend(
                count, going, room, drawn.token, drawn.value, drawn.log_sum_exp, threshold
            )
            tokens.append(token)
    draft = Draft(torch.stack(tokens[1:], dim=1), count, scores=torch.stack(scores, dim=1) if scores else None)
    if not recipe.reuse:
        return draft
    return draft._replace(exit=Exit(recipe.plan.span[1] // 2, torch.stack(streams, dim=1)))


def _noise(state: State, batch: Batch, width: int) -> tuple[Sampling, Tensor]:
    """The sampling of each of `width` rows a sequence, and the position of the token after each."""
    depth = torch.arange(1, width + 1, device=batch.device)
    rule = Sampling(*(field.repeat_interleave(width) for field in state.sampling))
    return rule, (batch.length[:, None] + depth).flatten()
