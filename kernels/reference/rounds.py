"""The start of a pass and the bookkeeping of a round in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from ..values import Drafted, Entry, Grown, Progress, Rope, Slots, Tree


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
    kv_heads: int,
    draft: Tensor | None = None,
    depth: Tensor | None = None,
    path: Tensor | None = None,
) -> Entry:
    """Consecutive tokens of every sequence as `rows` rows of a pass, the last of which belong to none.

    token int64 [S, K], of which the first count int64 [S] are real, all without it, and none of a sequence that is not
    alive bool [S]; or token int64 [S, J], all real, and after them draft int64 [S, K − J], of which the first count
    are. Position first int64 [S] + ahead is that of the first. block_table int64 [S, pages]; embedding [V, H]; rope:
    rotations of every position, float32 [positions, 1, D] each. Rows that are not real are token 0 at position 0 of
    sequence -1, on page 0. With depth int64 [S, K] and path int64 [S, K, n] tokens are nodes of a tree: row j of a
    sequence lies in the slot of its place and stands at position first + ahead + depth[j], after the rows path[j].
    """
    if draft is not None:
        token, count = torch.cat([token, draft], dim=1), count if count is None else count + token.shape[1]
    sequences, width = token.shape
    row = torch.arange(rows, device=token.device)
    owner = (row // width).clamp(max=sequences - 1)
    place, real = row % width, row < sequences * width
    if count is not None:
        real = real & (place < count[owner])
    if alive is not None:
        real = real & alive[owner]
    start = first[owner] + ahead
    slot = torch.where(real, start + place, 0)
    position, tree = slot, None
    if depth is not None and path is not None:
        position = torch.where(real, start + depth[owner, place], 0)
        above = torch.where(real[:, None], start[:, None] + path[owner, place], 0)
        tree = Tree(torch.where(real, start, 0), above)
    tokens = torch.where(real, token[owner, place], 0)
    page = torch.where(real, block_table[owner, slot // page_size], 0)
    turned = None if rope is None else Rope(rope.cos[position], rope.sin[position])
    sequence, slots = torch.where(real, owner, -1), Slots(page, slot % page_size)
    return Entry(tokens, position, sequence, slots, real, functional.embedding(tokens, embedding), turned, tree)


def extend(
    count: Tensor | None,
    going: Tensor,
    room: Tensor,
    token: Tensor,
    value: Tensor | None,
    log_sum_exp: Tensor | None,
    threshold: Tensor | None,
    out: Tensor,
) -> Drafted:
    """One token more for every draft that is `going`; it goes on while it has room and the token was likely enough.

    count int64 [S] tokens so far, none without it; room, token int64 [S]; going bool [S]; value, log_sum_exp [S] of the
    token's logit and threshold float32 []: a draft ends with the first token less probable than that, or does not look
    without one. out int64 [S] becomes the tokens, 0 for drafts that have stopped: whatever they would have been given
    may be no token.
    """
    count = going.long() if count is None else count + going
    goes_on = going & (count < room)
    if threshold is not None and value is not None and log_sum_exp is not None:
        goes_on = goes_on & ((value.float() - log_sum_exp.float()).exp() >= threshold)
    out.copy_(torch.where(going, token.clamp(min=0), 0))
    return Drafted(count, goes_on)


def commit(
    accepted: Tensor | None,
    token: Tensor,
    count: Tensor | None,
    draft: Tensor | None,
    progress: Progress,
    report: Tensor,
    path: Tensor | None = None,
    depth: Tensor | None = None,
    times: Tensor | None = None,
    text: Tensor | None = None,
) -> None:
    """What a verdict does to the sequences, in place, and what the host is told of it.

    accepted, token, count int64 [S]: draft tokens accepted, the token after them, how many of draft int64 [S, k] there
    were; 0 and none without them. In a tree path int64 [S, k + 1] are the accepted rows in order, row 0 first, and
    depth int64 [S, k + 1] tells how deep every row lies. A sequence with tokens left has `token` as its last, accepted
    + 1 tokens more in its length and as many less left; one without is as before. report int64 [slots, S, n + 4], which
    may lie on the host, in pinned memory: the slot whose number is the commits so far, modulo the slots, becomes
    accepted, -1 for a sequence without tokens left, count, the depth of the draft, token, and the first n ≤ k tokens of
    the draft, of a tree's accepted path. times int32 [S, V] counts those accepted + 1 tokens; they follow in text int32
    [S, capacity], whose last one is at `length`.
    """
    last, length, left, room, alive, drafting, commits = progress
    accepted = torch.where(left > 0, 0 if accepted is None else accepted, -1)
    count = torch.zeros_like(token) if count is None else count
    draft = token[:, None][:, :0] if draft is None else draft
    deepest = count
    if depth is not None:
        real = torch.arange(depth.shape[1], device=depth.device) <= count[:, None]
        deepest = torch.where(real, depth, 0).amax(dim=1)
    if path is not None:
        draft = torch.where(path > 0, draft.gather(1, (path - 1).clamp(min=0)), 0)[:, 1:]
    told = torch.cat([torch.stack([accepted, count, deepest, token], dim=1), draft[:, : report.shape[2] - 4]], dim=1)
    report[commits % report.shape[0], torch.arange(len(token), device=token.device)] = told
    token = token.clamp(min=0)
    last.copy_(torch.where(left > 0, token, last))
    if text is not None:
        new = torch.cat([draft, token[:, None]], dim=1).scatter(1, accepted.clamp(min=0)[:, None], token[:, None])
        offset = torch.arange(text.shape[1], device=text.device) - length[:, None] - 1
        mine = (offset >= 0) & (offset <= accepted[:, None])
        text.copy_(torch.where(mine, new.gather(1, offset.clamp(0, draft.shape[1])), text))
    length.add_(accepted + 1)
    left.sub_(accepted + 1)
    room.copy_(left - 1)
    alive.copy_(left > 0)
    drafting.copy_(left > 1)
    commits.add_(1)
    if times is not None:
        place, accepted = torch.arange(draft.shape[1] + 1, device=draft.device), accepted[:, None]
        given = torch.where(place < accepted, functional.pad(draft, (0, 1)), token[:, None])
        times.scatter_add_(1, torch.where(place <= accepted, given, 0), (place <= accepted).int())


def branch(
    tree: Grown,
    room: Tensor,
    token: Tensor,
    value: Tensor,
    log_sum_exp: Tensor,
    threshold: Tensor | None,
    *,
    widths: tuple[tuple[float, int], ...],
) -> None:
    """One depth more of every tree that is going, in place: siblings that follow its spine, the first the new spine.

    token int64 [S, w]: the siblings there may be, most likely first; where there are fewer the last repeat the first.
    value, log_sum_exp [S] of the first one's logit give its probability p: a depth has as many siblings as the first of
    `widths` says whose first number is below p, w where none is. room int64 [S] nodes a tree may have at most. It goes
    on while it has fewer than that and than fit, and p ≥ threshold float32 [], if there is one.
    """
    nodes, entries = tree.token.shape[1], tree.path.shape[2]
    token = token.clamp(min=0)
    place, limit = torch.arange(token.shape[1], device=token.device), room.clamp(max=nodes)
    sure = (value.float() - log_sum_exp.float()).exp()
    width = torch.full_like(tree.count, token.shape[1])
    for above, siblings in reversed(widths):
        width = torch.where(sure > above, siblings, width)
    new = tree.going[:, None] & (place < width[:, None]) & (tree.count[:, None] + place < limit[:, None])
    new &= (place == 0) | (token != token[:, :1])

    s, i = torch.nonzero(new, as_tuple=True)
    node, spine = tree.count[s] + i, tree.spine[s]
    deeper = tree.depth[s, spine] + 1
    tree.token[s, node], tree.parent[s, node], tree.depth[s, node + 1] = token[s, i], spine, deeper
    entry = torch.arange(entries, device=token.device)
    tree.path[s, node + 1] = torch.where(entry < deeper[:, None], tree.path[s, spine], node[:, None] + 1)
    tree.spine.copy_(torch.where(tree.going, tree.count + 1, tree.spine))
    tree.count.add_(new.sum(dim=1))
    tree.going.logical_and_(tree.count < limit)
    if threshold is not None:
        tree.going.logical_and_(sure >= threshold)
