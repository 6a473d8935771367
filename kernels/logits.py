"""Logits beside the choice of a token: penalties and bias before it, log-probabilities after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers
from .ranking import NONE, candidate, token_of, value_of
from .values import Logprobs, Reshaping
from .warping import log


@triton.jit(
    do_not_specialize=["n", "depth", "stride_sequence", "stride_row", "stride_token"],
    do_not_specialize_on_alignment=["length_ptr", "draft_ptr"],
)
def _reshape_logits_kernel(
    logits_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    bias_ptr,
    forbidden_ptr,
    least_ptr,
    prompt_ptr,
    times_ptr,
    length_ptr,
    draft_ptr,
    scores_ptr,
    stride_logits,
    stride_sequence,
    stride_row,
    stride_token,
    n,
    depth,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x + bias; −∞ where forbidden and short; x/r or x·r where seen; − (presence + frequency·times) where times > 0.

    Row i is row i % n of sequence s = i // n; times counts draft [s, i % n, :depth] with the answer, seen are those in
    it or in the prompt. logits, scores float32 [S·n, V]; bias, forbidden, prompt, times [S, V]; the rest [S].
    """
    pid_row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    offs = tl.arange(0, BLOCK)
    ids = start + offs
    mask = ids < V
    sequence = pid_row // n
    row_ptr = logits_ptr + pid_row * stride_logits
    draft_ptr += sequence * stride_sequence + (pid_row % n) * stride_row
    wait_for_producers(PDL)
    times = tl.load(times_ptr + sequence * V + ids, mask=mask, other=0)
    tokens = tl.load(length_ptr + sequence) + 1
    for i in range(depth):
        token = tl.load(draft_ptr + i * stride_token)
        times += (ids == token).to(tl.int32)
        tokens += (token >= 0).to(tl.int64)
    x = tl.load(row_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + sequence * V + ids, mask=mask, other=0.0)
    forbidden = tl.load(forbidden_ptr + sequence * V + ids, mask=mask, other=0) != 0
    x = tl.where(forbidden & (tokens < tl.load(least_ptr + sequence)), float("-inf"), x)
    prompt = tl.load(prompt_ptr + sequence * V + ids, mask=mask, other=0) != 0
    # Products are fused with no sum: every row and every shape rounds as PyTorch does.
    repetition = tl.load(repetition_ptr + sequence)
    repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), tl.fma(x, repetition, 0.0))
    x = tl.where(prompt | (times > 0), repeated, x)
    frequency = tl.fma(tl.load(frequency_ptr + sequence), times.to(tl.float32), 0.0)
    x = tl.where(times > 0, x - (tl.load(presence_ptr + sequence) + frequency), x)
    tl.store(scores_ptr + pid_row * V + ids, x, mask=mask)


def reshape_logits(logits: Tensor, how: Reshaping, length: Tensor, draft: Tensor) -> Tensor:
    """Logit bias, minimum length and penalties, in this order, as vLLM defines them: [S·n, V] → float32 [S·n, V].

    length int64 [S]: tokens before each sequence's newest. draft int64 [S, n, D]: the draft tokens between the newest
    one and each of its n rows, which count as if they stood in the answer; −1 stands for none.
    """
    logits = launch.rows_of(logits)
    rows, size = logits.shape
    _, n, depth = draft.shape
    rule = launch.vocabulary_rule(size)
    scores = torch.empty((rows, size), dtype=torch.float32, device=logits.device)
    _reshape_logits_kernel[(rows, -(-size // rule.block))](
        logits,
        *how,
        length,
        draft,
        scores,
        logits.stride(0),
        *draft.stride(),
        n,
        depth,
        V=size,
        BLOCK=rule.block,
        **launch.options(rule.warps),
    )
    return scores


@triton.jit(do_not_specialize=["top"], do_not_specialize_on_alignment=["token_ptr", "active_ptr"])
def _logprobs_kernel(
    logits_ptr,
    token_ptr,
    active_ptr,
    values_ptr,
    ids_ptr,
    stride_logits,
    top,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x − max x − ln Σ exp(x − max x) of a row's token and of its `top` highest x, lowest id first among equal ones.

    logits [R, V]; token int64, active bool [R]; values float32 [R, 1 + top]; ids int32 [R, top].
    """
    pid_row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    offs_b = tl.arange(0, BLOCKS)
    row_ptr = logits_ptr + pid_row * stride_logits
    wait_for_producers(PDL)
    if tl.load(active_ptr + pid_row) == 0:
        return
    # The best candidate not yet told of each block of ids.
    bests = tl.full((BLOCKS,), NONE, tl.int64)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
        best = tl.max(tl.where(start + offs < V, candidate(x, start + offs), NONE), axis=0)
        bests = tl.where(offs_b == start // BLOCK, best, bests)
    highest = value_of(tl.max(bests, axis=0))
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
        acc += tl.exp(x - highest)
    total = log(tl.sum(acc, axis=0))
    values_ptr += pid_row * (top + 1)
    own = tl.load(row_ptr + tl.load(token_ptr + pid_row)).to(tl.float32)
    tl.store(values_ptr, own - highest - total)
    for column in range(top):
        best = tl.max(bests, axis=0)
        token = token_of(best).to(tl.int32)
        tl.store(ids_ptr + pid_row * top + column, token)
        tl.store(values_ptr + 1 + column, value_of(best) - highest - total)
        start = token // BLOCK * BLOCK
        x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
        share = tl.where(start + offs < V, candidate(x, start + offs), NONE)
        following = tl.max(tl.where(share < best, share, NONE), axis=0)
        bests = tl.where(offs_b == token // BLOCK, following, bests)


def logprobs(logits: Tensor, token: Tensor, active: Tensor, *, top: int) -> Logprobs:
    """Log-probabilities of `token` int64 [R] and of the `top` (≤ V) most likely ids of the rows of logits [R, V].

    Equal logits are told lowest id first. The results of rows that are not `active` bool [R] are undefined.
    """
    logits = launch.rows_of(logits)
    rows, size = logits.shape
    rule = launch.vocabulary_rule(size)
    values = torch.empty((rows, 1 + top), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, top), dtype=torch.int32, device=logits.device)
    _logprobs_kernel[(rows,)](
        logits,
        token,
        active,
        values,
        ids,
        logits.stride(0),
        top,
        V=size,
        BLOCK=rule.block,
        BLOCKS=1 << (-(-size // rule.block) - 1).bit_length(),
        **launch.options(rule.warps),
    )
    return Logprobs(values, ids)
