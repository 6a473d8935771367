"""The start of a pass and the bookkeeping of a round in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from .values import Drafted, Entry, Rope, Slots


def enter(
    token: Tensor,
    first: Tensor,
    count: Tensor | None,
    alive: Tensor | None,
    block_table: Tensor,
    embedding: Tensor,
    rope: Rope | None,
    *,
    rows: int,
    ahead: int,
    page_size: int,
) -> Entry:
    """Consecutive tokens of every sequence as `rows` rows of a pass, the last of which belong to none.

    token int64 [S, K], of which the first count int64 [S] are real, all without it, and none of a sequence that is not
    alive bool [S]; position first int64 [S] + ahead is that of the first. block_table int64 [S, pages]; embedding
    [V, H]; rope: rotations of every position, float32 [positions, 1, D] each. Rows that are not real are token 0 at
    position 0 of sequence -1, on page 0.
    """
    sequences, width = token.shape
    row = torch.arange(rows, device=token.device)
    owner = (row // width).clamp(max=sequences - 1)
    place, real = row % width, row < sequences * width
    if count is not None:
        real = real & (place < count[owner])
    if alive is not None:
        real = real & alive[owner]
    position = torch.where(real, first[owner] + ahead + place, 0)
    tokens = torch.where(real, token[owner, place], 0)
    page = torch.where(real, block_table[owner, position // page_size], 0)
    turned = None if rope is None else Rope(rope.cos[position], rope.sin[position])
    sequence, slots = torch.where(real, owner, -1), Slots(page, position % page_size)
    return Entry(tokens, position, sequence, slots, real, functional.embedding(tokens, embedding), turned)


def extend(
    count: Tensor,
    going: Tensor,
    room: Tensor,
    token: Tensor,
    value: Tensor | None,
    log_sum_exp: Tensor | None,
    threshold: Tensor | None,
) -> Drafted:
    """One token more for every draft that is `going`; it goes on while it has room and the token was likely enough.

    count, room, token int64 [S]; going bool [S]; value, log_sum_exp [S] of the token's logit and threshold float32 []:
    a draft ends with the first token less probable than that, or does not look without one. Drafts that have stopped
    get token 0, for whatever they would have been given may be no token.
    """
    count = count + going
    goes_on = going & (count < room)
    if threshold is not None and value is not None and log_sum_exp is not None:
        goes_on = goes_on & ((value.float() - log_sum_exp.float()).exp() >= threshold)
    return Drafted(count, goes_on, torch.where(going, token, 0))


def commit(
    accepted: Tensor,
    token: Tensor,
    count: Tensor,
    draft: Tensor,
    last: Tensor,
    length: Tensor,
    left: Tensor,
    report: Tensor,
    text: Tensor | None = None,
) -> None:
    """What a verdict does to the sequences, in place, and what the host is told of it.

    accepted, token, count int64 [S]: draft tokens accepted, the token after them, how many of draft int64 [S, k] there
    were. A sequence with tokens `left` int64 [S] has `token` as its `last`, accepted + 1 tokens more in `length` and as
    many less `left`; one without is as before. report int64 [S, k + 3]: accepted, -1 for one without, count, token and
    draft. The new tokens of a sequence follow in text int32 [S, capacity], whose last one is at `length`.
    """
    alive = left > 0
    accepted = torch.where(alive, accepted, -1)
    report.copy_(torch.cat([torch.stack([accepted, count, token], dim=1), draft], dim=1))
    last.copy_(torch.where(alive, token, last))
    if text is not None:
        new = torch.cat([draft, token[:, None]], dim=1).scatter(1, accepted.clamp(min=0)[:, None], token[:, None])
        offset = torch.arange(text.shape[1], device=text.device) - length[:, None] - 1
        mine = (offset >= 0) & (offset <= accepted[:, None])
        text.copy_(torch.where(mine, new.gather(1, offset.clamp(0, draft.shape[1])), text))
    length.add_(accepted + 1)
    left.sub_(accepted + 1)
