"""From the residual stream to tokens, the same way for drafts and for the full model.

A token is argmax(log p + Gumbel(seed, position, id)) with p fully warped, so that a draft and its verification use the
same noise (coupled sampling): speculative output then equals plain sampling token for token.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.host import ints
from .batch import Batch, Sampling
from .model import Model
from .request import Piece, TokenLogprob
from .rows import Lineage
from .sequence import Sequence


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
        scores = logits.to(torch.float32, copy=True)
        for row in range(scores.shape[0]):
            (s, column), sequence = divmod(row, n), batch.sequences[row // n]
            rows = path[s, : width - n + column + 1] if lineage is None else path[s, lineage.path[s, column]]
            drafted = ints(rows[1 : int(depth[s, column]) + 1])
            if sequence.params.reshapes_logits:
                scores[row] = reshape_logits(scores[row], sequence, sequence.tokens + drafted)
    rule = Sampling(*(field.repeat_interleave(n) for field in batch.sampling()))
    position = (batch.length[:, None] + depth + 1).flatten()
    token = model.ops.sample(
        scores, rule.temperature, rule.top_k, rule.top_p, rule.min_p, rule.seed, position, stream=stream, count=count
    )
    first = token if count is None else token[:, 0]
    probability = (logits.float().gather(1, first[:, None])[:, 0] - logits.float().logsumexp(dim=-1)).exp()
    each = (sequences, n, -1)
    return Chosen(token.view(shape), probability.view(sequences, n), logits.view(each), scores.view(each))


class Drawn(NamedTuple):
    """Tokens int64 [R] or [R, count], the logit of the (first) and the log-sum-exp of each row's, [R], or None.

    logits [R, V]: those the tokens were drawn from, if they were.
    """

    token: Tensor
    value: Tensor | None
    log_sum_exp: Tensor | None
    logits: Tensor | None


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
    confidence: bool = False,
) -> Drawn:
    """The token after each row of hidden [R, H], or the `count` best, and with `confidence` what its probability is of.

    `rule` and `position` int64 [R] have one entry a row; without a rule tokens are the most likely ones. The same
    choices as those of `choose`, without anything that needs the host. Rows not `active` bool [R] get anything.
    """
    if rule is None or position is None:
        token, value, log_sum_exp = model.predict(hidden, top_k=count, active=active, vocabulary=vocabulary)
        return Drawn(token, value if count is None else value[:, 0], log_sum_exp, None)
    logits = model.logits(hidden, vocabulary)
    token = model.ops.sample(
        logits, rule.temperature, rule.top_k, rule.top_p, rule.min_p, rule.seed, position, stream=stream, count=count
    )
    if not confidence:
        return Drawn(token, None, None, logits)
    first = token if count is None else token[:, 0]
    known = first if active is None else torch.where(active, first, 0)
    value, log_sum_exp = logits.float().gather(1, known[:, None])[:, 0], logits.float().logsumexp(dim=-1)
    return Drawn(token, value, log_sum_exp, logits)


def reshape_logits(row: Tensor, sequence: Sequence, history: list[int]) -> Tensor:
    """Logit bias, minimum length and penalties, as vLLM defines them; row float32 [V], history = prompt and output."""
    params, prompt = sequence.params, len(sequence.prompt)
    row = row.clone()
    for token, bias in params.logit_bias.items():
        row[token] += bias
    if len(history) - prompt < params.min_tokens:
        row[sorted(sequence.forbidden)] = -torch.inf
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(history)), device=row.device)
        value = row[seen]
        row[seen] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
    counts = Counter(history[prompt:])
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times
    return row


def append(sequence: Sequence, tokens: list[int], logits: Tensor | None) -> list[Piece]:
    """Append accepted draft tokens and the one after them, as far as the sequence's stop rules allow; logits [n, V]."""
    pieces = sequence.extend(tokens, len(tokens) - 1)
    if sequence.params.logprobs is not None and logits is not None:
        sequence.logprobs += [
            logprob(logits[i], piece.token_id, sequence.params.logprobs) for i, piece in enumerate(pieces)
        ]
    return pieces


def logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Natural-log probabilities of `token` and of the `top` most likely ids; logits [V]."""
    values = logits.float().log_softmax(dim=-1)
    ranked = {i: float(values[i]) for i in ints(values.topk(top).indices)}
    return TokenLogprob(token, float(values[token]), ranked)
