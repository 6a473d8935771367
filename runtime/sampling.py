"""From the residual stream to tokens, the same way for drafts and for the full model.

A token is argmax(log p + Gumbel(seed, position, id)) with p fully warped, so that a draft and its verification use the
same noise (coupled sampling): speculative output then equals plain sampling token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..kernels.values import Logprobs, Norm
from .batch import Batch, Sampling
from .model import Model
from .request import Piece, TokenLogprob
from .reshaping import reshaping
from .rows import Lineage
from .sequence import Sequence, most_logprobs


class Drawn(NamedTuple):
    """Tokens int64 [R] or [R, count], the logit of the (first) and the log-sum-exp of each row's, [R], or None.

    A token of −1 says that nothing could be chosen: the logits are no numbers.

    If they were drawn: the logits [R, V], and the scores they became after penalties and bias, drawn from.
    """

    token: Tensor
    value: Tensor | None
    log_sum_exp: Tensor | None
    logits: Tensor | None
    scores: Tensor | None

    @property
    def probability(self) -> Tensor:
        """What the unwarped model gives the (first) token, where the confidence was asked for."""
        assert self.value is not None
        assert self.log_sum_exp is not None
        return (self.value.float() - self.log_sum_exp.float()).exp()


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
    confidence: bool = False,
    norm: Norm | None = None,
) -> Drawn:
    """The token after each of the last n columns of `path`, or the `count` best ones there; all of it [S, n, …].

    path int64 [S, J] starts with each sequence's newest token and goes on with its draft, as a chain or, with
    `lineage`, as a tree, of which n is all rows; hidden [S·n, H] is the residual stream of its last n columns. `stream`
    other than 0 draws with noise that the full model's own choices do not share. Drafts may choose from the first
    `vocabulary` tokens only, 0 is all of them, and after a final `norm` of their own.
    """
    sequences, width = path.shape
    n = hidden.shape[0] // sequences
    params = [s.params for s in batch.sequences]
    rule = position = reshape = None
    if not all(p.greedy and not p.reshapes_logits and p.logprobs is None for p in params):
        if lineage is None:
            depth = torch.arange(width - n, width, device=batch.device).expand(sequences, n)
        else:
            depth = lineage.depth
        position = (batch.length[:, None] + depth + 1).flatten()
        rule = Sampling(*(field.repeat_interleave(n) for field in batch.sampling()))
        if any(p.reshapes_logits for p in params):
            how = reshaping(batch.sequences, model.config.vocab_size, batch.device)
            draft = before(path, depth, lineage)
            reshape = partial(model.ops.reshape_logits, how=how, length=batch.length, draft=draft)
    drawn = draw(
        model,
        hidden,
        rule,
        position,
        vocabulary=vocabulary,
        stream=stream,
        count=count,
        reshape=reshape,
        confidence=confidence,
        norm=norm,
    )

    def by_sequence(part: Tensor) -> Tensor:
        return part.view(sequences, n, *part.shape[1:])

    return Drawn(by_sequence(drawn.token), *(None if part is None else by_sequence(part) for part in drawn[1:]))


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
    norm: Norm | None = None,
) -> Drawn:
    """The token after each row of hidden [R, H], or the `count` best, and with `confidence` what its probability is of.

    `rule` and `position` int64 [R] have one entry a row; without a rule tokens are the most likely ones. `reshape`
    makes of the logits [R, V] what is drawn from. `norm` as in `Model.logits`. Rows not `active` bool [R] get anything.
    """
    if rule is None or position is None:
        token, value, log_sum_exp = model.predict(hidden, top_k=count, active=active, vocabulary=vocabulary, norm=norm)
        return Drawn(token, value if count is None else value[:, 0], log_sum_exp, None, None)
    logits = model.logits(hidden, vocabulary, active, norm)
    scores = logits if reshape is None else reshape(logits)
    token = model.ops.sample(scores, *rule, position, stream=stream, count=count)
    if not confidence:
        return Drawn(token, None, None, logits, scores)
    first = token if count is None else token[:, 0]
    known = (first if active is None else torch.where(active, first, 0)).clamp(min=0)
    value, log_sum_exp = logits.float().gather(1, known[:, None])[:, 0], logits.float().logsumexp(dim=-1)
    return Drawn(token, value, log_sum_exp, logits, scores)


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
    token = [token for own in pieces for token in [*(piece.token_id for piece in own), *[0] * (n - len(own))]]
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
