"""One depth more of draft trees on the device."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers
from .values import Grown

ENTRIES: tl.constexpr = tl.constexpr(16)


@triton.jit(
    do_not_specialize=["nodes", "entries", "stride_token", "stride_value"],
    do_not_specialize_on_alignment=[
        "token_ptr",
        "parent_ptr",
        "depth_ptr",
        "path_ptr",
        "count_ptr",
        "spine_ptr",
        "going_ptr",
        "room_ptr",
        "drawn_ptr",
        "value_ptr",
        "log_sum_exp_ptr",
    ],
)
def _branch_kernel(
    token_ptr,
    parent_ptr,
    depth_ptr,
    path_ptr,
    count_ptr,
    spine_ptr,
    going_ptr,
    room_ptr,
    drawn_ptr,
    value_ptr,
    log_sum_exp_ptr,
    threshold_ptr,
    nodes,
    entries,
    stride_token,
    stride_value,
    SIBLINGS: tl.constexpr,
    ABOVE: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of a tree that is going: up to width(exp(value − log_sum_exp)) distinct tokens more, children of row spine.

    token, parent [S, nodes]; depth [S, nodes + 1]; path [S, nodes + 1, entries]; drawn [S, SIBLINGS]; value [S]; the
    rest [S]. width(p) = WIDTHS[i] for the first i with p > ABOVE[i], SIBLINGS for none.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    if tl.load(going_ptr + pid_s) == 0:
        return
    count = tl.load(count_ptr + pid_s)
    spine = tl.load(spine_ptr + pid_s)
    limit = tl.minimum(tl.load(room_ptr + pid_s), nodes)
    depth_ptr += pid_s * (nodes + 1)
    path_ptr += pid_s * (nodes + 1) * entries
    value = tl.load(value_ptr + pid_s * stride_value).to(tl.float32)
    sure = tl.exp(value - tl.load(log_sum_exp_ptr + pid_s).to(tl.float32))
    width = tl.full((), SIBLINGS, tl.int32)
    for i in tl.static_range(len(ABOVE)):
        width = tl.where(sure > ABOVE[len(ABOVE) - 1 - i], WIDTHS[len(ABOVE) - 1 - i], width)

    drawn_ptr += pid_s * stride_token
    mask = (offs < SIBLINGS) & (offs < width) & (count + offs < limit)
    drawn = tl.maximum(tl.load(drawn_ptr + offs, mask=mask, other=0), 0)
    mask = mask & ((offs == 0) | (drawn != tl.maximum(tl.load(drawn_ptr), 0)))
    deeper = tl.load(depth_ptr + spine) + 1
    node = count + offs
    tl.store(token_ptr + pid_s * nodes + node, drawn, mask=mask)
    tl.store(parent_ptr + pid_s * nodes + node, tl.zeros((BLOCK,), tl.int64) + spine, mask=mask)
    tl.store(depth_ptr + node + 1, tl.zeros((BLOCK,), tl.int64) + deeper, mask=mask)
    for start in range(0, entries, ENTRIES):
        offs_e = start + tl.arange(0, ENTRIES)
        mask_e = offs_e < entries
        above = tl.load(path_ptr + spine * entries + offs_e, mask=mask_e, other=0)
        path = tl.where(offs_e[None, :] < deeper, above[None, :], node[:, None] + 1)
        offs_path = (node[:, None] + 1) * entries + offs_e[None, :]
        tl.store(path_ptr + offs_path, path, mask=mask[:, None] & mask_e[None, :])
    total = count + tl.sum(mask.to(tl.int64), axis=0)
    goes_on = total < limit
    if threshold_ptr is not None:
        goes_on = goes_on & (sure >= tl.load(threshold_ptr))
    tl.store(count_ptr + pid_s, total)
    tl.store(spine_ptr + pid_s, count + 1)
    tl.store(going_ptr + pid_s, goes_on)


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
    sequences, siblings = token.shape
    token = launch.rows_of(token)
    _branch_kernel[(sequences,)](
        *tree,
        room,
        token,
        value,
        log_sum_exp,
        threshold,
        tree.token.shape[1],
        tree.path.shape[2],
        token.stride(0),
        value.stride(0),
        SIBLINGS=siblings,
        ABOVE=tuple(above for above, _ in widths),
        WIDTHS=tuple(count for _, count in widths),
        BLOCK=max(16, 1 << (siblings - 1).bit_length()),
        **launch.options(1, 1),
    )
