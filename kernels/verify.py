"""Verification of drafts on the device: the tokens of a round from the target's own choices."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers
from .rejection import empty_verdict, verify_rejection
from .values import Verdict

__all__ = ["verify", "verify_rejection"]


@triton.jit(
    do_not_specialize=["k", "stride_target", "stride_draft", "stride_parent"],
    do_not_specialize_on_alignment=["target_ptr", "draft_ptr", "parent_ptr", "count_ptr", "length_ptr"],
)
def _verify_kernel(
    target_ptr,
    draft_ptr,
    parent_ptr,
    count_ptr,
    length_ptr,
    accepted_ptr,
    token_ptr,
    next_length_ptr,
    path_ptr,
    stride_target,
    stride_draft,
    stride_parent,
    k,
    NODES: tl.constexpr,
    PDL: tl.constexpr,
):
    """From row 0 to the child whose token is the target's, as long as there is one.

    target [S, k + 1]; draft, parent [S, k], parent None for a chain; path [S, k + 1]; the rest [S]; all int64.
    """
    pid_s = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, NODES)
    wait_for_producers(PDL)
    mask = offs < tl.minimum(tl.load(count_ptr + pid_s), k)
    if parent_ptr is not None:
        parent = tl.load(parent_ptr + pid_s * stride_parent + offs, mask=mask, other=-1)
    else:
        parent = offs.to(tl.int64)
    draft = tl.load(draft_ptr + pid_s * stride_draft + offs, mask=mask, other=-1)
    target = tl.load(target_ptr + pid_s * stride_target + parent, mask=mask, other=-1)
    chosen = mask & (draft == target)

    row = tl.zeros((), tl.int32)
    if parent_ptr is None:
        accepted = tl.min(tl.where(chosen, NODES, offs), axis=0)
        row = accepted
        tl.store(path_ptr + pid_s * (k + 1) + offs, tl.minimum(offs, accepted).to(tl.int64), mask=offs <= k)
    else:
        accepted = tl.zeros((), tl.int32)
        tl.store(path_ptr + pid_s * (k + 1), row.to(tl.int64))
        for step in range(NODES):
            child = tl.min(tl.where(chosen & (parent == row), offs, NODES), axis=0)
            accepted += (child < NODES).to(tl.int32)
            row = tl.where(child < NODES, child + 1, row)
            tl.store(path_ptr + pid_s * (k + 1) + step + 1, row.to(tl.int64), mask=step < k)
    tl.store(accepted_ptr + pid_s, accepted.to(tl.int64))
    tl.store(token_ptr + pid_s, tl.load(target_ptr + pid_s * stride_target + row))
    tl.store(next_length_ptr + pid_s, tl.load(length_ptr + pid_s) + accepted + 1)


def verify(target: Tensor, draft: Tensor, count: Tensor, length: Tensor, parent: Tensor | None = None) -> Verdict:
    """Walk from row 0 to the child that the target chose, as long as there is one.

    target int64 [S, k + 1]: the target's token after row 0, a sequence's newest token, and after each row j + 1, draft
    token j; draft int64 [S, k] of which the first count [S] are real; length int64 [S] tokens cached before the round.
    parent int64 [S, k]: the row draft token j follows, at most j, siblings distinct tokens; None: a chain, row j.
    """
    k = draft.shape[1]
    target, draft = launch.rows_of(target), launch.rows_of(draft)
    parent = None if parent is None else launch.rows_of(parent)
    verdict = empty_verdict(draft)
    _verify_kernel[(draft.shape[0],)](
        target,
        draft,
        parent,
        count.contiguous(),
        length.contiguous(),
        *verdict,
        target.stride(0),
        draft.stride(0),
        0 if parent is None else parent.stride(0),
        k,
        NODES=max(16, 1 << k.bit_length()),
        **launch.options(1),
    )
    return verdict
