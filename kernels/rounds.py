"""The bookkeeping of a round on the device: how far a draft goes, and what a verdict does to the sequences."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers
from .values import Drafted, Progress

BLOCK = 32


@triton.jit(
    do_not_specialize=["sequences", "stride_out"],
    do_not_specialize_on_alignment=[
        "count_ptr",
        "going_ptr",
        "token_ptr",
        "value_ptr",
        "log_sum_exp_ptr",
        "room_ptr",
        "out_token_ptr",
    ],
)
def _extend_kernel(
    count_ptr,
    going_ptr,
    room_ptr,
    token_ptr,
    value_ptr,
    log_sum_exp_ptr,
    threshold_ptr,
    out_count_ptr,
    out_going_ptr,
    out_token_ptr,
    stride_out,
    sequences,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """count + going; going and count < room and exp(value − log_sum_exp) ≥ threshold; the token, or 0: [S] each."""
    offs = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = offs < sequences
    wait_for_producers(PDL)
    going = tl.load(going_ptr + offs, mask=mask, other=0) != 0
    count = going.to(tl.int64)
    if count_ptr is not None:
        count += tl.load(count_ptr + offs, mask=mask, other=0)
    token = tl.maximum(tl.load(token_ptr + offs, mask=mask, other=0), 0)
    goes_on = going & (count < tl.load(room_ptr + offs, mask=mask, other=0))
    if threshold_ptr is not None:
        value = tl.load(value_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        log_sum_exp = tl.load(log_sum_exp_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        goes_on = goes_on & (tl.exp(value - log_sum_exp) >= tl.load(threshold_ptr))
    tl.store(out_count_ptr + offs, count, mask=mask)
    tl.store(out_going_ptr + offs, goes_on, mask=mask)
    tl.store(out_token_ptr + offs * stride_out, tl.where(going, token, 0), mask=mask)


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
    drafted = Drafted(torch.empty_like(token), torch.empty_like(going))
    sequences = token.shape[0]
    _extend_kernel[(-(-sequences // BLOCK),)](
        count,
        going,
        room,
        token,
        value if threshold is not None else None,
        log_sum_exp if threshold is not None else None,
        threshold,
        *drafted,
        out,
        out.stride(0),
        sequences,
        BLOCK_S=BLOCK,
        **launch.options(1, 1),
    )
    return drafted


@triton.jit(
    do_not_specialize=["k", "told", "slots", "stride_draft", "stride_times", "stride_slot", "capacity"],
    do_not_specialize_on_alignment=[
        "accepted_ptr",
        "token_ptr",
        "count_ptr",
        "draft_ptr",
        "report_ptr",
        "path_ptr",
        "depth_ptr",
    ],
)
def _commit_kernel(
    accepted_ptr,
    token_ptr,
    count_ptr,
    draft_ptr,
    last_ptr,
    length_ptr,
    left_ptr,
    room_ptr,
    alive_ptr,
    drafting_ptr,
    commits_ptr,
    report_ptr,
    path_ptr,
    depth_ptr,
    times_ptr,
    text_ptr,
    stride_draft,
    stride_times,
    stride_slot,
    k,
    told,
    slots,
    capacity,
    NODES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A sequence with tokens left: last = token, length += accepted + 1, left −= accepted + 1; report of every one.

    report [slots, S, told + 4], that of number commits: accepted, -1 where nothing was left, count, depth, token,
    draft, of a tree its rows path[1:]; draft [S, k]; path, depth [S, k + 1] or None, a chain; alive, drafting bool [S];
    the rest [S]; all int64. times int32 [S, V]: + 1 for each of the accepted + 1 tokens; text int32 [S, capacity]:
    those from length + 1 on.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, NODES)
    mask = offs < k
    wait_for_producers(PDL)
    left = tl.load(left_ptr + pid_s)
    alive = left > 0
    accepted = left * 0
    if accepted_ptr is not None:
        accepted = tl.load(accepted_ptr + pid_s)
    accepted = tl.where(alive, accepted, -1)
    token = tl.load(token_ptr + pid_s)
    count = left * 0
    if count_ptr is not None:
        count = tl.load(count_ptr + pid_s)
    deepest = count
    if depth_ptr is not None:
        depth = tl.load(depth_ptr + pid_s * (k + 1) + offs, mask=(offs <= k) & (offs <= count), other=0)
        deepest = tl.max(depth, axis=0)
    row = offs.to(tl.int64) + 1
    if path_ptr is not None:
        row = tl.load(path_ptr + pid_s * (k + 1) + offs + 1, mask=mask, other=0)
    commits = tl.load(commits_ptr + pid_s)
    report_ptr += commits % slots * stride_slot + pid_s * (told + 4)
    tl.store(report_ptr, accepted)
    tl.store(report_ptr + 1, count)
    tl.store(report_ptr + 2, deepest)
    tl.store(report_ptr + 3, token)
    token = tl.maximum(token, 0)
    draft = row * 0
    if draft_ptr is not None:
        draft = tl.load(draft_ptr + pid_s * stride_draft + row - 1, mask=mask & (row > 0), other=0)
        tl.store(report_ptr + 4 + offs, draft, mask=offs < told)
    tl.store(last_ptr + pid_s, tl.where(alive, token, tl.load(last_ptr + pid_s)))
    length = tl.load(length_ptr + pid_s)
    if text_ptr is not None:
        text_ptr += pid_s * capacity + length + 1
        tl.store(text_ptr + offs, draft, mask=offs < accepted)
        tl.store(text_ptr + accepted, token, mask=alive)
    left -= accepted + 1
    tl.store(length_ptr + pid_s, length + accepted + 1)
    tl.store(left_ptr + pid_s, left)
    tl.store(room_ptr + pid_s, left - 1)
    tl.store(alive_ptr + pid_s, left > 0)
    tl.store(drafting_ptr + pid_s, left > 1)
    tl.store(commits_ptr + pid_s, commits + 1)
    if times_ptr is not None:
        given = tl.where(offs < accepted, draft, token)
        one = tl.full((NODES,), 1, tl.int32)
        tl.atomic_add(times_ptr + pid_s * stride_times + given, one, mask=offs <= accepted, sem="relaxed")


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
    k = 0 if draft is None else draft.shape[1]
    if draft is not None:
        draft = None if k == 0 else draft if draft.stride(1) == 1 else draft.contiguous()
    _commit_kernel[(token.shape[0],)](
        accepted,
        token.contiguous(),
        None if count is None else count.contiguous(),
        draft,
        *progress,
        report,
        None if path is None else path.contiguous(),
        None if depth is None else depth.contiguous(),
        times,
        text,
        0 if draft is None else draft.stride(0),
        0 if times is None else times.stride(0),
        report.stride(0),
        k,
        report.shape[2] - 4,
        report.shape[0],
        0 if text is None else text.shape[1],
        NODES=max(16, 1 << k.bit_length()),
        **launch.options(1, 1),
    )
