"""The start of a pass in one launch: where its rows stand, what they write to, their embeddings and rotations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers
from .values import Entry, Rope, Slots, Tree

ENTRIES: tl.constexpr = tl.constexpr(16)


@triton.jit(
    do_not_specialize=[
        "sequences",
        "given",
        "width",
        "ahead",
        "entries",
        "stride_token",
        "stride_draft",
        "stride_table",
    ],
    do_not_specialize_on_alignment=[
        "token_ptr",
        "draft_ptr",
        "first_ptr",
        "count_ptr",
        "alive_ptr",
        "table_ptr",
        "depth_ptr",
        "path_ptr",
    ],
)
def _enter_kernel(
    token_ptr,
    draft_ptr,
    first_ptr,
    count_ptr,
    alive_ptr,
    table_ptr,
    embedding_ptr,
    cos_ptr,
    sin_ptr,
    depth_ptr,
    path_ptr,
    out_token_ptr,
    position_ptr,
    sequence_ptr,
    page_ptr,
    offset_ptr,
    real_ptr,
    x_ptr,
    out_cos_ptr,
    out_sin_ptr,
    tree_length_ptr,
    tree_slot_ptr,
    arrivals_ptr,
    stride_token,
    stride_draft,
    stride_table,
    sequences,
    given,
    width,
    ahead,
    entries,
    PAGE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row r is token r mod K of sequence r div K, real while r mod K < count; its embedding and rotation → x, cos, sin.

    token [S, K], or token [S, given] and draft [S, K − given], of which count are real; first, count int64, alive bool
    [S]; table int64 [S, pages]; embedding [V, H]; cos, sin [positions, D]; depth int64 [S, K] and path int64
    [S, K, entries] of a tree, or None; outputs [R], [R, H], [R, D], [R, entries], arrivals int32 [R, KV_HEADS] of
    zeros: sequence -1, position, page and token 0 for rows that are not real.
    """
    pid_r = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    wait_for_producers(PDL)
    place = pid_r % width
    known = pid_r // width < sequences
    sequence = tl.where(known, pid_r // width, 0)
    real = known
    if count_ptr is not None:
        count = tl.load(count_ptr + sequence)
        if draft_ptr is not None:
            count += given
        real = real & (place < count)
    if alive_ptr is not None:
        real = real & (tl.load(alive_ptr + sequence) != 0)
    first = tl.load(first_ptr + sequence) + ahead
    slot = tl.where(real, first + place, 0)
    position = slot
    if depth_ptr is not None:
        row = sequence * width + place
        position = tl.where(real, first + tl.load(depth_ptr + row), 0)
        tl.store(tree_length_ptr + pid_r, tl.where(real, first, 0))
        for start in range(0, entries, ENTRIES):
            offs_e = start + tl.arange(0, ENTRIES)
            path = tl.load(path_ptr + row * entries + offs_e, mask=offs_e < entries, other=0)
            tl.store(tree_slot_ptr + pid_r * entries + offs_e, tl.where(real, first + path, 0), mask=offs_e < entries)
    token = tl.load(token_ptr + sequence * stride_token + place, mask=real & (place < given), other=0)
    if draft_ptr is not None:
        token += tl.load(draft_ptr + sequence * stride_draft + place - given, mask=real & (place >= given), other=0)
    page = tl.load(table_ptr + sequence * stride_table + slot // PAGE, mask=real, other=0)
    tl.store(out_token_ptr + pid_r, token)
    tl.store(position_ptr + pid_r, position)
    tl.store(sequence_ptr + pid_r, tl.where(real, sequence, -1))
    tl.store(page_ptr + pid_r, page)
    tl.store(offset_ptr + pid_r, slot % PAGE)
    tl.store(real_ptr + pid_r, real)
    offs_kv = tl.arange(0, triton.next_power_of_2(KV_HEADS))
    tl.store(arrivals_ptr + pid_r * KV_HEADS + offs_kv, tl.zeros_like(offs_kv), mask=offs_kv < KV_HEADS)
    for start in range(0, H, BLOCK_H):
        mask_h = start + offs_h < H
        x = tl.load(embedding_ptr + token * H + start + offs_h, mask=mask_h, other=0.0)
        tl.store(x_ptr + pid_r * H + start + offs_h, x, mask=mask_h)
    if cos_ptr is not None:
        mask_d = offs_d < D
        cos = tl.load(cos_ptr + position * D + offs_d, mask=mask_d, other=0.0)
        sin = tl.load(sin_ptr + position * D + offs_d, mask=mask_d, other=0.0)
        tl.store(out_cos_ptr + pid_r * D + offs_d, cos, mask=mask_d)
        tl.store(out_sin_ptr + pid_r * D + offs_d, sin, mask=mask_d)


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
    sequences, given = token.shape
    width = given + (0 if draft is None else draft.shape[1])
    hidden, device = embedding.shape[1], embedding.device
    token = token if token.stride(1) == 1 or given == 1 else token.contiguous()
    draft = draft if draft is None or draft.stride(1) == 1 else draft.contiguous()
    laid = torch.empty((5, -(-rows // 2) * 2), dtype=torch.int64, device=device)[:, :rows]
    real = torch.empty(rows, dtype=torch.bool, device=device)
    arrivals = torch.empty(rows * kv_heads, dtype=torch.int32, device=device)
    x = torch.empty((rows, hidden), dtype=embedding.dtype, device=device)
    dim = 16 if rope is None else rope.cos.shape[-1]
    turned = None if rope is None else Rope(*torch.empty((2, rows, 1, dim), dtype=rope.cos.dtype, device=device))
    entries = 0 if path is None else path.shape[2]
    tree = None
    if path is not None:
        length = torch.empty(rows, dtype=torch.int64, device=device)
        tree = Tree(length, torch.empty((rows, entries), dtype=torch.int64, device=device))
    block = 1 << min(10, (hidden - 1).bit_length())
    _enter_kernel[(rows,)](
        token,
        draft,
        first,
        count,
        alive,
        block_table,
        embedding,
        None if rope is None else rope.cos,
        None if rope is None else rope.sin,
        None if depth is None else depth.contiguous(),
        None if path is None else path.contiguous(),
        *laid,
        real,
        x,
        None if turned is None else turned.cos,
        None if turned is None else turned.sin,
        None if tree is None else tree.length,
        None if tree is None else tree.slot,
        arrivals,
        token.stride(0),
        0 if draft is None else draft.stride(0),
        block_table.stride(0),
        sequences,
        given,
        width,
        ahead,
        entries,
        PAGE=page_size,
        H=hidden,
        D=dim,
        KV_HEADS=kv_heads,
        BLOCK_H=block,
        BLOCK_D=1 << (dim - 1).bit_length(),
        **launch.options(4, 1),
    )
    tokens, position, sequence, page, offset = laid
    return Entry(tokens, position, sequence, Slots(page, offset), real, x, turned, tree, arrivals)
