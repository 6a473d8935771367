"""Drafts from the text itself in PyTorch."""

import torch
from torch import Tensor

from .values import Found

WEIGHT = 4


def lookup(
    text: Tensor, length: Tensor, room: Tensor, *, max_ngram: int, num_draft_tokens: int, votes: int | None
) -> Found:
    """A draft for every sequence from what followed its last tokens where they stood before (prompt lookup decoding).

    text int32 [S, capacity], of which the last token is at `length` int64 [S]; at most `room` int64 [S] and
    `num_draft_tokens` tokens are drafted. Places where the last token stands before are ranked by the number of tokens
    up to there that match, at most `max_ngram`, then the newest first. Without `votes` the draft is what followed the
    first of them; where the text runs out it is taken to repeat from the match on. Otherwise the first `votes` places
    vote on every token, one of n tokens with weight 4ⁿ⁻¹, until none that voted for the draft so far has a next token;
    ties go to the lowest id. Entries past a draft are 0.
    """
    capacity = text.shape[1]
    matched = _matched(text, length, max_ngram)
    rank = matched * capacity + torch.arange(capacity, device=text.device)
    place = rank.topk(min(votes or 1, capacity)).indices
    matched = matched.gather(1, place)
    limit = room.clamp(0, num_draft_tokens)
    if votes is None:
        limit = torch.where(matched[:, 0] > 0, limit, 0)
        offset = torch.arange(num_draft_tokens, device=text.device)
        at = place + 1 + offset % (length[:, None] - place).clamp(min=1)
        tokens = text.gather(1, at.clamp(max=capacity - 1)).long()
        return Found(torch.where(offset < limit[:, None], tokens, 0), limit)
    weight, drafted, tokens = WEIGHT ** (matched - 1).clamp(min=0), torch.zeros_like(length), list[Tensor]()
    going = matched > 0
    for step in range(num_draft_tokens):
        going = going & (place + step < length[:, None])
        token = torch.where(going, text.gather(1, (place + step + 1).clamp(max=capacity - 1)).long(), -1)
        sums = torch.where(token[:, :, None] == token[:, None], torch.where(going, weight, 0)[:, None], 0).sum(dim=2)
        sums = torch.where(going, sums, -1)
        heaviest = going & (sums == sums.amax(dim=1, keepdim=True))
        chosen = torch.where(heaviest, token, torch.iinfo(torch.int64).max).amin(dim=1)
        more = going.any(dim=1) & (step < limit)
        tokens.append(torch.where(more, chosen, 0))
        drafted = drafted + more
        going = going & (token == chosen[:, None])
    return Found(torch.stack(tokens, dim=1), drafted)


def _matched(text: Tensor, length: Tensor, max_ngram: int) -> Tensor:
    """For every position before `length` how many tokens up to it are those up to `length`, at most `max_ngram`."""
    position = torch.arange(text.shape[1], device=text.device)
    going = position < length[:, None]
    matched = torch.zeros_like(text, dtype=torch.int64)
    for n in range(min(max_ngram, text.shape[1])):
        wanted = text.gather(1, (length[:, None] - n).clamp(min=0))
        going = going & (position >= n) & (text.roll(n, dims=1) == wanted)
        matched = matched + going
    return matched
