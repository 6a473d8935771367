"""From the residual stream to tokens, the same way for drafts and for the full model.

A token is argmax(log p + Gumbel(seed, position, id)) with p fully warped, so that a draft and its verification use the
same noise (coupled sampling): speculative output then equals plain sampling token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..kernels.values import Logprobs
from .batch import Batch, Sampling
from .model import Model
from .request import Piece, TokenLogprob
from .reshaping import reshaping
from .rows import Lineage
from .sequence import Sequence, most_logprobs


class Chosen(NamedTuple):
    """Tokens int64 [S, n], or [S, n, count], and the probability [S, n] the unwarped model gives the (first) token.

    Where they were needed: the logits [S, n, V], and the scores they became after penalties and bias.
    """

    tokens: Tensor
    probability: Tensor
    logits: Tensor | None
    scores: Tensor | None


def choose(
    model: Model,
    hidden: Tensor,
    batch: Batch,
    path: Tensor,
    lineage: Lineage | None = None,
    *,
    count: int | None = None,
    stream: int = 0,
    vocabulary: int = 0,
) -> Chosen:
    """The token after each of the last n columns of `path`, or the `count` best ones there.

    path int64 [S, J] starts with each sequence's newest token and goes on with its draft, as a chain or, with
    `lineage`, as a tree, of which n is all rows; hidden [S·n, H] is the residual stream of its last n columns. `stream`
    other than 0 draws with noise that the full model's own choices do not share. Drafts may choose from the first
    `vocabulary` tokens only; 0 is all of them.
    """
    sequences, width = path.shape
    n = hidden.shape[0] // sequences
    shape = (sequences, n) if count is None else (sequences, n, count)
    params = [s.params for s in batch.sequences]
    if all(p.greedy and not p.reshapes_logits and p.logprobs is None for p in params):
        token, value, log_sum_exp = model.predict(hidden, top_k=count, vocabulary=vocabulary)
        first = value if count is None else value[:, 0]
        probability = (first.float() - log_sum_exp.float()).exp()
        return Chosen(token.view(shape), probability.view(sequences, n), None, None)

    if lineage is None:
        depth = torch.arange(width - n, width, device=batch.device).expand(sequences, n)
    else:
        depth = lineage.depth
    logits = model.logits(hidden, vocabulary)
    scores = logits
    if any(p.reshapes_logits for p in params):
        how = reshaping(batch.sequences, logits.shape[1], batch.device)
        scores = model.ops.reshape_logits(logits, how, batch.length, before(path, depth, lineage))
    rule = Sampling(*(field.repeat_interleave(n) for field in batch.sampling()))
    position = (batch.length[:, None] + depth + 1).flatten()
    token = model.ops.sample(scores, *rule, position, stream=stream, count=count)
    first = token if count is None else token[:, 0]
    probability = (logits.float().gather(1, first[:, None])[:, 0] - logits.float().logsumexp(dim=-1)).exp()
    each = (sequences, n, -1)
    return Chosen(token.view(shape), probability.view(sequences, n), logits.view(each), scores.view(each))


def before(path: Tensor, depth: Tensor, lineage: Lineage | None = None) -> Tensor:
    """The draft tokens that rows `depth` int64 [S, n] deep come after, −1 past their number: int64 [S, n, D].

    path as in `choose`; the rows are its last n columns, or with `lineage` all nodes of the tree.
    """
    if lineage is None:
        tokens = path[:, None, 1:].expand(-1, depth.shape[1], -1)
    else:
        each = torch.arange(path.shape[0], device=path.device)
        tokens = path[each[:, None, None], lineage.path[:, :, 1:]]
    return torch.where(torch.arange(tokens.shape[2], device=path.device) < depth[:, :, None], tokens, -1)


class Drawn(NamedTuple):
    """Tokens int64 [R] or [R, count], the logit of the (first) and the log-sum-exp of each row's, [R], or None.

    If they were drawn: the logits [R, V], and the scores they became after penalties and bias, drawn from.
    """

    token: Tensor
    value: Tensor | None
    log_sum_exp: Tensor | None
    logits: Tensor | None
    scores: Tensor | None


def draw(
    model: Model,
    hidden: Tensor,
    rule: Sampling | None,
    position: Tensor | None,
    active: Tensor | None = None,
    vocabulary: int = 0,
    stream: int = 0,
    *,
    count: int | None = None,
    reshape: Callable[[Tensor], Tensor] | None = None,
    confidence: bool = False,
) -> Drawn:
    """The token after each row of hidden [R, H], or the `count` best, and with `confidence` what its probability is of.

    `rule` and `position` int64 [R] have one entry a row; without a rule tokens are the most likely ones. `reshape`
    makes of the logits [R, V] what is drawn from. The same choices as those of `choose`, without anything that needs
    the host. Rows not `active` bool [R] get anything.
    """
    if rule is None or position is None:
        token, value, log_sum_exp = model.predict(hidden, top_k=count, active=active, vocabulary=vocabulary)
        return Drawn(token, value if count is None else value[:, 0], log_sum_exp, None, None)
    logits = model.logits(hidden, vocabulary, active)
    scores = logits if reshape is None else reshape(logits)
    token = model.ops.sample(scores, *rule, position, stream=stream, count=count)
    if not confidence:
        return Drawn(token, None, None, logits, scores)
    first = token if count is None else token[:, 0]
    known = first if active is None else torch.where(active, first, 0)
    value, log_sum_exp = logits.float().gather(1, known[:, None])[:, 0], logits.float().logsumexp(dim=-1)
    return Drawn(token, value, log_sum_exp, logits, scores)


def tell(
    model: Model,
    sequences: list[Sequence],
    pieces: list[list[Piece]],
    logits: Tensor | None,
    path: Tensor | None = None,
) -> None:
    """Note the log-probabilities of the tokens each sequence was given, if it asks.

    They were chosen from logits [S, n, V], in order, or from the rows `path` int64 [S, K] of them.
    """
    top = most_logprobs(sequences)
    if top is None or logits is None:
        return
    if path is not None:
        logits = logits[torch.arange(len(path), device=path.device)[:, None], path]
    count, n, _ = logits.shape
    token = [piece.token_id for own in pieces for piece in [*own, *[own[-1]] * (n - len(own))]]
    given = [i < len(own) for own in pieces for i in range(n)]
    known = (torch.tensor(each, device=logits.device) for each in (token, given))
    told = model.ops.logprobs(logits.flatten(0, 1), *known, top=top)
    values, ids = (part.view(count, n, part.shape[1]).cpu() for part in told)
    for row, (sequence, own) in enumerate(zip(sequences, pieces, strict=True)):
        note(sequence, own, Logprobs(values[row], ids[row]))


def note(sequence: Sequence, pieces: list[Piece], told: Logprobs) -> None:
    """Keep the log-probabilities of a sequence's newest tokens, which have the first rows of `told`, if it asks."""
    top = sequence.params.logprobs
    if top is None:
        return
    rows = zip(cast("list[list[float]]", told.values.tolist()), cast("list[list[int]]", told.ids.tolist()), strict=True)
    for piece, ((own, *values), ids) in zip(pieces, rows, strict=False):
        ranked = dict(zip(ids[:top], values[:top], strict=True))
        sequence.logprobs.append(TokenLogprob(piece.token_id, own, ranked))
