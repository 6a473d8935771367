"""Drafting with a part of the model itself, one pass a depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..batch import Batch, Draft
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..sampling import choose
from ..sequence import Sequence
from .base import no_draft, sampled

# Noise stream 0 is the full model's, 1 and 2 are those of the acceptance test and of the draw after it.
FIRST_DRAFT_STREAM = 3
# How many siblings a depth has by the probability of the most likely one (SWIFT, §4.2), and the rest.
WIDTHS = ((0.95, 1), (0.8, 3), (0.5, 5))
WIDEST = 10


@dataclass(frozen=True)
class Drafting:
    """How a draft grows: depth, the probability below which it ends, and whether it is a tree.

    Tokens come from the first `vocabulary` ones, 0 being all: a smaller LM head, and tokens outside are never drafted.
    A `rejection` draft has noise of its own and keeps the scores its tokens were drawn with.
    """

    num_draft_tokens: int
    threshold: float
    rejection: bool = False
    tree: bool = False
    max_nodes: int = 32
    vocabulary: int = 0


def by_mask(full: LayerPlan, how: Drafting, sequences: list[Sequence], *, limited: bool = False) -> Recipe:
    """How the device drafts chains with sets that are soon replaced: one graph for all of them.

    `limited`: of lengths that are, up to that of `how`.
    """
    return Recipe(
        full,
        full,
        how.num_draft_tokens,
        masked=True,
        limited=limited,
        confident=how.threshold > 0,
        rejection=how.rejection and sampled(sequences),
        vocabulary=how.vocabulary,
    )


def grow(model: Model, cache: KVCache, batch: Batch, plan: LayerPlan, how: Drafting) -> tuple[Draft, Tensor]:
    """Draft with `plan` until the model is unsure; the unsure token stays in the draft (SWIFT, arXiv 2410.06916, §4.2).

    In a tree every depth has siblings, more of them the less sure the model is, and the first one is expanded. Also
    returns the residual streams [S, depth, H] the expanded rows were drafted from.
    """
    device, sequences = batch.device, len(batch)
    limit = batch.room.clamp(min=0, max=how.max_nodes if how.tree else how.num_draft_tokens)
    nodes, widest = int(limit.max()), siblings(model, how.vocabulary) if how.tree else 1
    confident = how.tree or how.threshold > 0
    rejection = how.rejection and not batch.sequences[0].params.greedy
    count, spine = torch.zeros_like(batch.length), torch.zeros_like(batch.length)
    path = functional.pad(batch.last[:, None], (0, nodes))
    parent = torch.zeros(sequences, nodes, dtype=torch.int64, device=device)
    states, scores = list[Tensor](), list[Tensor]()
    expanded = batch.last[:, None]
    drafting = limit > 0
    for step in range(min(how.num_draft_tokens, nodes)):
        with model.mark("draft", sequences, sequences, step):
            rows = batch.rows(expanded[:, -1:], batch.length + step, drafting.long())
            states.append(model.forward(rows, cache, plan))
            stream = FIRST_DRAFT_STREAM + step if rejection else 0
            chosen = choose(
                model,
                states[-1],
                batch,
                expanded,
                count=widest if how.tree else None,
                stream=stream,
                vocabulary=how.vocabulary,
                confidence=confident,
            )
            tokens, sure = chosen.token.view(sequences, widest), chosen.probability if confident else None
            if rejection and chosen.scores is not None:
                scores.append(torch.where(drafting[:, None], chosen.scores[:, 0], 0))
            place = torch.arange(widest, device=device)
            new = (
                drafting[:, None]
                & (place < (_width(sure) if how.tree and sure is not None else 1))
                & (count[:, None] + place < limit[:, None])
            )
            new &= (place == 0) | (tokens != tokens[:, :1])
            s, i = torch.nonzero(new, as_tuple=True)
            row = count[s] + i
            path[s, row + 1], parent[s, row] = tokens[s, i], spine[s]
            spine = torch.where(drafting, count + 1, spine)
            count = count + new.sum(dim=1)
            expanded = torch.cat([expanded, tokens[:, :1]], dim=1)
            drafting = drafting & (count < limit)
            if sure is not None:
                drafting &= sure[:, 0] >= how.threshold
            if not bool(drafting.any()):
                break
    if not states:
        return no_draft(batch), torch.empty(sequences, 0, model.config.hidden_size, dtype=model.dtype, device=device)
    used = int(count.max())
    draft = Draft(
        path[:, 1 : used + 1].contiguous(),
        count,
        parent=parent[:, :used].contiguous() if how.tree else None,
        scores=torch.stack(scores, dim=1) if scores else None,
    )
    return draft, torch.stack(states, dim=1)


def sift(model: Model, cache: KVCache, batch: Batch, plan: LayerPlan, guess: Draft) -> Draft:
    """A chain that came for nothing, as far as `plan` agrees with it, and the token `plan` has instead or after it.

    One pass over all rows: what the full model would reject is mostly rejected here, for less (a cascade of drafters,
    arXiv 2312.11462, with the model's own layers as the second).
    """
    path = torch.cat([batch.last[:, None], guess.tokens], dim=1)
    with model.mark("draft", len(batch), path.numel(), 0):
        hidden = model.forward(batch.rows(path, batch.length, guess.length + 1), cache, plan)
        chosen = choose(model, hidden, batch, path).token
        kept = model.ops.verify(chosen, guess.tokens, guess.length, batch.length)
    tokens = functional.pad(guess.tokens, (0, 1))
    tokens.scatter_(1, kept.accepted[:, None], kept.token[:, None])
    return Draft(tokens, torch.minimum(kept.accepted + 1, batch.room.clamp(min=0)), rows=guess.length + 1)


def siblings(model: Model, vocabulary: int) -> int:
    """How many siblings there are at most where drafts come from a vocabulary of this size."""
    size = len(model.vocabulary(vocabulary).ids) if model.reduces(vocabulary) else model.config.vocab_size
    return min(WIDEST, size)


def _width(sure: Tensor) -> Tensor:
    """Siblings of a depth whose most likely token has probability `sure` [S, 1]."""
    width = torch.full_like(sure, WIDEST, dtype=torch.int64)
    for above, count in reversed(WIDTHS):
        width = torch.where(sure > above, count, width)
    return width
