"""The ops that choose tokens, in PyTorch: sampling, verification of a draft, and the cache moves after it.

A temperature of 0 is greedy everywhere: the distribution is one-hot at the argmax, the lowest id on ties.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..elementwise import known, steady
from ..noise import ACCEPT_STREAM, DRAW_STREAM, gumbel, uniform
from ..values import Verdict

_CHUNK = 1 << 17


def sample(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    stream: int = 0,
    count: int | None = None,
) -> Tensor:
    """Draw one token per row: argmax of warped log-probability + Gumbel(seed, position, id, stream).

    scores [R, V]; temperature, top_p, min_p float32 [R]; top_k (≤ 0: off), seed, position int64 [R]; → int64 [R].
    Rows with temperature 0 take the argmax. Order: temperature, min-p, top-k, top-p; ties at a threshold stay.

    count (≤ 32): the tokens of the `count` highest sums, in order, ties to the lowest id: a draw without replacement
    (Gumbel top-k; Kool et al., arXiv 1903.06059); → int64 [R, count], of which column 0 is the one token. Where fewer
    ids are possible, the columns left repeat column 0: a repeated sibling is an absent one. A NaN counts as −∞, and
    where nothing is above that, or there is a +∞ to draw from, the token is −1.
    """
    columns = 1 if count is None else count
    scores = known(scores)
    token = _best(scores, columns)
    size = scores.shape[1]
    rule = Rule(temperature, top_k, top_p, min_p)
    for rows in torch.split(torch.nonzero(temperature > 0).flatten(), max(1, _CHUNK // size)):
        if len(rows) > 0:
            warped = warp(scores[rows].float(), rule.rows(rows))
            token[rows] = _best(known(warped + gumbel(seed[rows], position[rows], size, stream)), columns)
    return token[:, 0] if count is None else token


def verify(target: Tensor, draft: Tensor, count: Tensor, length: Tensor, parent: Tensor | None = None) -> Verdict:
    """Walk from row 0 to the child that the target chose, as long as there is one.

    target int64 [S, k + 1]: the target's token after row 0, a sequence's newest token, and after each row j + 1, draft
    token j; draft int64 [S, k] of which the first count [S] are real; length int64 [S] tokens cached before the round.
    parent int64 [S, k]: the row draft token j follows, at most j, siblings distinct tokens; None: a chain, row j.
    """
    k = draft.shape[1]
    real = torch.arange(k, device=draft.device) < count[:, None]
    if parent is None:
        accepted = ((draft == target[:, :k]) & real).long().cumprod(dim=1).sum(dim=1)
        path = torch.minimum(torch.arange(k + 1, device=draft.device), accepted[:, None])
    else:
        chosen = (draft == target.gather(1, parent)) & real
        row = torch.zeros_like(count)
        rows, accepted = [row], torch.zeros_like(count)
        for _ in range(k):
            match, child = (chosen & (parent == row[:, None])).long().max(dim=1)
            row = torch.where(match > 0, child + 1, row)
            accepted = accepted + match
            rows.append(row)
        path = torch.stack(rows, dim=1)
    token = target.gather(1, path[:, -1:])[:, 0]
    return Verdict(accepted, token, length + accepted + 1, path)


def verify_rejection(
    scores: Tensor,
    draft: Tensor,
    draft_scores: Tensor | None,
    count: Tensor,
    length: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    *,
    parent: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Verdict:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192), over siblings by recursive rejection.

    scores [S, k + 1, V] of the target; draft_scores [S, n, V] of the drafter, −∞ outside a reduced vocabulary: the
    children of row i were drawn with those of drawn[i], int64 [S, k + 1], or of i without it, and without replacement;
    None: every draft token was certain. temperature, top_k, top_p, min_p, seed [S] as in `sample`, for both p and q;
    draft, count, length, parent as in `verify`.

    From row 0: a child x is accepted with probability min(1, p(x)/q(x)), which moves on to its row; a rejected one
    leaves p ← norm(max(p − q, 0)) and q ← q without x, renormalised. The token after the last accepted row is drawn
    from p as it is left. A token that q cannot give counts as certain; a residual that rounds to zero leaves p. Where p
    has nothing, as `sample` says, no draft is accepted and the token is −1.
    """
    sequences, k = draft.shape
    size = scores.shape[2]
    rule = Rule(temperature, top_k, top_p, min_p)
    if parent is None:
        parent = torch.arange(k, device=draft.device).expand(sequences, k)

    def target_of(at: Tensor, row: int) -> Tensor:
        return _probability(scores[at, row], rule.rows(at))

    def draft_of(at: Tensor, row: int) -> Tensor:
        if draft_scores is None or row == k:
            return torch.zeros(len(at), size, device=draft.device)
        # Where nothing was drawn there are no children, which is what these are for.
        known = row if drawn is None else drawn[at, row].clamp(max=draft_scores.shape[1] - 1)
        return _probability(draft_scores[at, known], rule.rows(at))

    row, accepted = torch.zeros_like(count), torch.zeros_like(count)
    path = torch.zeros(sequences, k + 1, dtype=torch.int64, device=draft.device)
    everyone = torch.arange(sequences, device=draft.device)
    p, q = target_of(everyone, 0), draft_of(everyone, 0)
    for j in range(k):
        at = torch.nonzero((parent[:, j] == row) & (count > j)).flatten()
        if len(at) == 0:
            continue
        x = draft[at, j]
        certain = functional.one_hot(x, size).float()
        given = q[at].gather(1, x[:, None])[:, 0] > 0
        proposal = torch.where(given[:, None], q[at], certain)
        p_x, q_x = p[at].gather(1, x[:, None])[:, 0], proposal.gather(1, x[:, None])[:, 0]
        u = uniform(seed[at], length[at] + accepted[at] + 1, j + 1, ACCEPT_STREAM)[:, j]
        accept = (u * q_x <= p_x) & (p_x > 0)

        moved, stayed = at[accept], at[~accept]
        row[moved] = j + 1
        accepted[moved] += 1
        path[moved, accepted[moved]] = j + 1
        p[moved], q[moved] = target_of(moved, j + 1), draft_of(moved, j + 1)
        residual = (p[stayed] - proposal[~accept]).clamp_min(0)
        p[stayed] = _normalised(residual, otherwise=p[stayed])
        others = q[stayed] * (1 - certain[~accept])
        q[stayed] = _normalised(others, otherwise=others)

    race = p / -steady(torch.log, uniform(seed, length + accepted + 1, size, DRAW_STREAM))
    best, token = torch.where(race > 0, race, 0).max(dim=-1)
    later = torch.arange(k + 1, device=draft.device) > accepted[:, None]
    path = torch.where(later, row[:, None], path)
    return Verdict(accepted, torch.where(best > 0, token, -1), length + accepted + 1, path)


def compact(keys: Tensor, values: Tensor, block_table: Tensor, path: Tensor, accepted: Tensor, length: Tensor) -> None:
    """Move the keys and values of accepted rows to where a chain would have them, in place, in all layers.

    keys, values [L, pages, kv_heads, P, D]; block_table [S, W] of pages; path [S, n + 1], as many columns of a
    verdict's as may be accepted, and its accepted [S] ≤ n; length int64 [S] tokens cached before the round: logical
    slot length + path[d] → length + d for d ≤ accepted. Every source is read before a destination is written.
    """
    page_size = keys.shape[3]
    depth = torch.arange(path.shape[1], device=path.device)
    sequence, d = torch.nonzero((depth <= accepted[:, None]) & (path != depth), as_tuple=True)
    source, target = length[sequence] + path[sequence, d], length[sequence] + d
    source_page = block_table[sequence, source // page_size].long()
    target_page = block_table[sequence, target // page_size].long()
    for cache in (keys, values):
        cache[:, target_page, :, target % page_size] = cache[:, source_page, :, source % page_size]


class Rule(NamedTuple):
    """How rows are warped: temperature, top_p and min_p float32 [R], top_k int64 [R]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def rows(self, rows: Tensor) -> "Rule":
        return Rule(*(field[rows] for field in self))


def warp(scores: Tensor, rule: Rule) -> Tensor:
    """(scores − max)/temperature, −∞ outside min-p, top-k and top-p: float32 [R, V], temperatures positive."""
    size = scores.shape[1]
    peak = scores.amax(dim=-1, keepdim=True)
    warped = (scores - peak) / rule.temperature[:, None]
    threshold = torch.where(rule.min_p > 0, steady(torch.log, rule.min_p), -torch.inf)[:, None]
    limited = (rule.top_k > 0) & (rule.top_k < size)
    if bool(limited.any()):
        ordered = warped.topk(int(rule.top_k[limited].max())).values
        last = ordered.gather(1, torch.where(limited, rule.top_k - 1, 0)[:, None])
        threshold = torch.where(limited[:, None], torch.maximum(threshold, last), threshold)
    warped = warped.masked_fill(warped < threshold, -torch.inf)
    nucleus = torch.nonzero(rule.top_p < 1).flatten()
    if len(nucleus) > 0:
        inside = warped[nucleus]
        warped[nucleus] = inside.masked_fill(inside < _nucleus_threshold(inside, rule.top_p[nucleus]), -torch.inf)
    return warped


def _nucleus_threshold(warped: Tensor, top_p: Tensor, first: int = 1024) -> Tensor:
    """The smallest logit of the smallest set of most likely ids whose probability reaches `top_p`, [R, 1]."""
    probability = warped.softmax(dim=-1)
    size = min(first, warped.shape[1])
    while True:
        ordered, ids = warped.topk(size)
        missing = probability.gather(1, ids).cumsum(dim=1, dtype=torch.float64) < top_p[:, None]
        if size == warped.shape[1] or not bool(missing[:, -1].any()):
            return ordered.gather(1, missing.sum(dim=1, keepdim=True).clamp_max(size - 1))
        size = warped.shape[1]


def _best(values: Tensor, count: int) -> Tensor:
    """The ids of the `count` highest of each row [R, V] in order; the first again, or −1, where only −∞ is left."""
    most, first = values.max(dim=-1, keepdim=True)
    first = torch.where(most > -torch.inf, first, -1)
    columns = [first]
    for _ in range(1, count):
        values = values.scatter(1, columns[-1].clamp(min=0), -torch.inf)
        best, token = values.max(dim=-1, keepdim=True)
        columns.append(torch.where(best > -torch.inf, token, first))
    return torch.cat(columns, dim=1)


def _probability(scores: Tensor, rule: Rule) -> Tensor:
    """softmax of the warped rows, one-hot at the argmax where the temperature is 0: float32 [R, V]."""
    greedy, scores = rule.temperature <= 0, known(scores)
    p = warp(scores.float(), rule._replace(temperature=torch.where(greedy, 1.0, rule.temperature))).softmax(dim=-1)
    best = functional.one_hot(scores.argmax(dim=-1), scores.shape[1]).to(p.dtype)
    return torch.where(greedy[:, None], best * (scores.amax(dim=-1, keepdim=True) > -torch.inf), p)


def _normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Rows of `weights` [R, V] divided by their sums; those of `otherwise` where a sum is zero."""
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / total, otherwise)
