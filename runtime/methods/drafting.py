"""Drafting with a part of the model itself, one pass a depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.values import Grown
from ..adapter import Adapter, draft_pass
from ..batch import Batch, Draft
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..quantised import drafter
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
    A `rejection` draft has noise of its own and keeps the scores its tokens were drawn with. An `adapter` runs after
    the draft's layers. `quantised`: the draft's matrices are in eight bits.
    """

    num_draft_tokens: int
    threshold: float
    rejection: bool = False
    tree: bool = False
    max_nodes: int = 32
    vocabulary: int = 0
    adapter: Adapter | None = None
    quantised: bool = False

    def pays(self, plan: LayerPlan) -> bool:
        """Whether a draft by `plan` costs less than a pass of the model: it skips something, or reads less of it."""
        return plan.skipped > 0 or self.quantised


def by_set(
    full: LayerPlan,
    how: Drafting,
    sequences: list[Sequence],
    settled: LayerPlan | None = None,
    *,
    limited: bool = False,
) -> Recipe:
    """How the device drafts with skip sets: by a mask, one graph for all that are soon replaced, or the `settled` one.

    `limited`: with drafts of lengths that are replaced too, up to that of `how`.
    """
    nodes = how.max_nodes if how.tree else 0
    return Recipe(
        full,
        settled or full,
        min(how.num_draft_tokens, nodes or how.num_draft_tokens),
        masked=settled is None,
        limited=limited,
        confident=how.threshold > 0,
        rejection=how.rejection and sampled(sequences),
        vocabulary=how.vocabulary,
        max_nodes=nodes,
        quantised=how.quantised,
    )


def grow(model: Model, cache: KVCache, batch: Batch, plan: LayerPlan, how: Drafting) -> tuple[Draft, Tensor]:
    """Draft with `plan` until the model is unsure; the unsure token stays in the draft (SWIFT, arXiv 2410.06916, §4.2).

    In a tree every depth has siblings, more of them the less sure the model is, and the first one is expanded. Also
    returns the residual streams [S, depth, H] of the expanded rows after `plan`.
    """
    limit = batch.room.clamp(min=0, max=how.max_nodes if how.tree else how.num_draft_tokens)
    steps, going = min(how.num_draft_tokens, int(limit.max())), limit > 0
    tree = Grown.bare(limit, how.max_nodes, how.num_draft_tokens) if how.tree else None
    chain = torch.zeros(len(batch), how.num_draft_tokens, dtype=torch.int64, device=batch.device)
    threshold = torch.full((), how.threshold, device=batch.device) if how.threshold > 0 else None
    rejection = how.rejection and not batch.sequences[0].params.greedy
    count: Tensor | None = None
    expanded, states, scores = batch.last[:, None], list[Tensor](), list[Tensor]()
    part = drafter(model, how.quantised)
    for step in range(steps):
        with model.mark("draft", len(batch), len(batch), step):
            rows = batch.rows(expanded[:, -1:], batch.length + step, going.long())
            state, hidden, norm = draft_pass(part, cache, rows, plan, how.adapter)
            states.append(state)
            chosen = choose(
                part,
                hidden,
                batch,
                expanded,
                count=siblings(part, how.vocabulary) if how.tree else None,
                stream=FIRST_DRAFT_STREAM + step if rejection else 0,
                vocabulary=how.vocabulary,
                confidence=how.tree or threshold is not None,
                norm=norm,
            )
            token, value, log_sum_exp, _, warped = (None if each is None else each[:, 0] for each in chosen)
            assert token is not None
            if rejection and warped is not None:
                scores.append(torch.where(going[:, None], warped, 0))
            if tree is None:
                out = chain[:, step]
                count, going = model.ops.extend(count, going, limit, token, value, log_sum_exp, threshold, out)
            else:
                model.ops.branch(tree, limit, token, value, log_sum_exp, threshold, widths=WIDTHS)
                count, going = tree.count, tree.going
            expanded = torch.cat([expanded, token.view(len(batch), -1)[:, :1].clamp(min=0)], dim=1)
            if not bool(going.any()):
                break
    if count is None:
        return no_draft(batch), torch.empty(
            len(batch), 0, model.config.hidden_size, dtype=model.dtype, device=batch.device
        )
    used = int(count.max())
    draft = Draft(
        (chain if tree is None else tree.token)[:, :used].contiguous(),
        count,
        parent=None if tree is None else tree.parent[:, :used].contiguous(),
        scores=torch.stack(scores, dim=1) if scores else None,
    )
    return draft, torch.stack(states, dim=1)


def sift(
    model: Model, cache: KVCache, batch: Batch, plan: LayerPlan, guess: Draft, *, quantised: bool = False
) -> Draft:
    """A chain that came for nothing, as far as `plan` agrees with it, and the token `plan` has instead or after it.

    One pass over all rows: what the full model would reject is mostly rejected here, for less (a cascade of drafters,
    arXiv 2312.11462, with the model's own layers as the second).
    """
    path = torch.cat([batch.last[:, None], guess.tokens], dim=1)
    with model.mark("draft", len(batch), path.numel(), 0):
        part = drafter(model, quantised)
        hidden = part.forward(batch.rows(path, batch.length, guess.length + 1), cache, plan)
        chosen = choose(part, hidden, batch, path).token
        kept = model.ops.verify(chosen, guess.tokens, guess.length, batch.length)
    tokens = functional.pad(guess.tokens, (0, 1))
    tokens.scatter_(1, kept.accepted[:, None], kept.token[:, None].clamp(min=0))
    return Draft(tokens, torch.minimum(kept.accepted + 1, batch.room.clamp(min=0)), rows=guess.length + 1)


def siblings(model: Model, vocabulary: int) -> int:
    """How many siblings there are at most where drafts come from a vocabulary of this size."""
    size = len(model.vocabulary(vocabulary).ids) if model.reduces(vocabulary) else model.config.vocab_size
    return min(WIDEST, size)
