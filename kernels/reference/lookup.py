"""Drafts from the text itself in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from ..values import Found

# How much more a match counts for every further token of it, and in the text itself, which is also set aside for what
# was never seen.
LONGER, OWN = 4, 10
# Between texts, and past the end of one: no token.
GAP = -1


def lookup(
    text: Tensor,
    length: Tensor,
    room: Tensor,
    *,
    max_ngram: int,
    num_draft_tokens: int,
    votes: int | None,
    memory: Tensor | None = None,
    tree: bool = False,
) -> Found:
    """A draft for every sequence from what followed its last tokens where they stood before (prompt lookup decoding).

    text int32 [S, capacity], of which the last token is at `length` int64 [S]; at most `room` int64 [S] and
    k = `num_draft_tokens` tokens are drafted. Places where the last token stands before are ranked by the number of
    tokens up to there that match, at most `max_ngram`, then the newest first. Without `votes` the draft is what
    followed the first of them; where the text runs out it is taken to repeat from the match on. Otherwise the first
    `votes` places vote on every token, one of n tokens with weight 10·4ⁿ⁻¹, and as many in `memory` int32 [M] with
    4ⁿ⁻¹: other texts, the newest last, with -1 between them; its end counts as -1. Those that voted for the draft so
    far choose its next token; ties go to the lowest id, and where -1 is chosen the draft ends. In a `tree` a child has
    its parent's chance times its share of the weight of those, to which 10 is added for what was never seen, and the
    likeliest node that is left comes next, of equally likely ones that of the lowest parent. Entries past a draft are
    0.
    """
    place, matched = _ranked(text, length, text, length, max_ngram, votes or 1)
    limit = room.clamp(0, num_draft_tokens)
    if votes is None:
        limit = torch.where(matched[:, 0] > 0, limit, 0)
        offset = torch.arange(num_draft_tokens, device=text.device)
        at = place + 1 + offset % (length[:, None] - place).clamp(min=1)
        tokens = text.gather(1, at.clamp(max=text.shape[1] - 1)).long()
        return Found(torch.where(offset < limit[:, None], tokens, 0), limit)
    weight, own = OWN * _weight(matched), torch.ones_like(place, dtype=torch.bool)
    # What lies past the end of either is no token.
    texts, start = functional.pad(text, (0, 1), value=GAP), torch.zeros_like(place)
    if memory is not None:
        others = functional.pad(memory, (0, 1), value=GAP).expand(len(text), -1)
        far, matched = _ranked(others, torch.full_like(length, len(memory)), text, length, max_ngram, votes)
        start = torch.cat([start, torch.full_like(far, texts.shape[1])], dim=1)
        own = torch.cat([own, torch.zeros_like(far, dtype=torch.bool)], dim=1)
        place, weight = torch.cat([place, far], dim=1), torch.cat([weight, _weight(matched)], dim=1)
        texts = torch.cat([texts, others], dim=1)

    going, left = weight > 0, torch.zeros_like(own)
    row, token = torch.zeros_like(place), torch.zeros_like(place)
    share = torch.full_like(place, -1, dtype=torch.float64)
    chance, drafted = torch.ones_like(length[:, None], dtype=torch.float64), torch.zeros_like(length)
    tokens, parent = list[Tensor](), list[Tensor]()
    highest = torch.iinfo(torch.int64).max
    for node in range(num_draft_tokens):
        # Those that voted for the newest node vote on its children.
        going = going & (~own | (place < length[:, None]))
        token = torch.where(going, texts.gather(1, torch.where(going, start + place + 1, 0)).long(), token)
        worth = torch.where(going, weight, 0)
        sums = torch.where(token[:, :, None] == token[:, None], worth[:, None], 0).sum(dim=2).double()
        share = torch.where(going, chance * (sums / (worth.sum(dim=1, keepdim=True) + OWN)), share)
        row = torch.where(going, node, row)
        left = left | going & (token != GAP) if tree else going

        chosen = left & (share == torch.where(left, share, -1).amax(dim=1, keepdim=True))
        lowest = torch.where(chosen, row, highest).amin(dim=1, keepdim=True)
        chosen = chosen & (row == lowest)
        newest = torch.where(chosen, token, highest).amin(dim=1, keepdim=True)
        more = left.any(dim=1, keepdim=True) & (newest != GAP) & (node < limit[:, None])
        going = chosen & (token == newest) & more
        left, place = left & ~going, place + going
        if tree:
            chance = torch.where(going, share, 0).amax(dim=1, keepdim=True)
        tokens.append(torch.where(more, newest, 0))
        parent.append(torch.where(more, lowest, 0))
        drafted = drafted + more[:, 0]
    found = Found(torch.cat(tokens, dim=1), drafted)
    return found._replace(**_lineage(torch.cat(parent, dim=1))) if tree else found


def _ranked(
    source: Tensor, end: Tensor, text: Tensor, length: Tensor, max_ngram: int, most: int
) -> tuple[Tensor, Tensor]:
    """The `most` best places of source int32 [S, C] before `end` int64 [S], and how many tokens match there or 0."""
    size = source.shape[1]
    position = torch.arange(size, device=text.device)
    going = position < end[:, None]
    matched = torch.zeros_like(source, dtype=torch.int64)
    for n in range(min(max_ngram, size, text.shape[1])):
        wanted = text.gather(1, (length[:, None] - n).clamp(min=0))
        going = going & (position >= n) & (n <= length[:, None]) & (source.roll(n, dims=1) == wanted)
        matched = matched + going
    place = (matched * size + position).topk(min(most, size)).indices
    return place, matched.gather(1, place)


def _weight(matched: Tensor) -> Tensor:
    return torch.where(matched > 0, LONGER ** (matched - 1).clamp(min=0), 0)


def _lineage(parent: Tensor) -> dict[str, Tensor]:
    """`parent`, `depth` and `path` of Found."""
    up = functional.pad(parent, (1, 0))
    row = torch.arange(up.shape[1], device=up.device).expand(up.shape)
    above = [row]
    for _ in range(parent.shape[1]):
        above.append(up.gather(1, above[-1]))
    upwards = torch.stack(above, dim=2)
    depth = (upwards > 0).sum(dim=2)
    downwards = (depth[:, :, None] - torch.arange(len(above), device=up.device)).clamp(min=0)
    return {"parent": parent, "depth": depth, "path": upwards.gather(2, downwards)}
