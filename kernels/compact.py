"""Cache moves after a draft tree was verified."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import wait_for_producers


@triton.jit(do_not_specialize=["stride_table", "stride_path", "k"])
def _compact_kernel(
    keys_ptr,
    values_ptr,
    table_ptr,
    path_ptr,
    accepted_ptr,
    length_ptr,
    stride_layer,
    stride_page,
    stride_head,
    stride_slot,
    stride_table,
    stride_path,
    k,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logical slot length + path[d] → length + d for 1 ≤ d ≤ accepted, one layer and key head of one sequence.

    keys, values [L, pages, kv_heads, P, D]; table [S, W]; path [S, k + 1]; accepted, length [S].
    """
    pid_s = tl.program_id(0).to(tl.int64)
    pid_layer = tl.program_id(1).to(tl.int64)
    pid_head = tl.program_id(2).to(tl.int64)
    offs_depth = tl.arange(0, DEPTH)
    offs_d = tl.arange(0, BLOCK_D)
    wait_for_producers(PDL)
    accepted = tl.load(accepted_ptr + pid_s)
    mask = offs_depth <= tl.minimum(accepted, k)
    row = tl.load(path_ptr + pid_s * stride_path + offs_depth, mask=mask, other=0)
    moved = mask & (row != offs_depth)
    if tl.sum(moved.to(tl.int32), axis=0) > 0:
        length = tl.load(length_ptr + pid_s)
        source = length + row
        target = length + offs_depth
        source_page = tl.load(table_ptr + pid_s * stride_table + source // PAGE, mask=moved, other=0).to(tl.int64)
        target_page = tl.load(table_ptr + pid_s * stride_table + target // PAGE, mask=moved, other=0).to(tl.int64)
        base = pid_layer * stride_layer + pid_head * stride_head
        offs_source = base + source_page * stride_page + source % PAGE * stride_slot
        offs_target = base + target_page * stride_page + target % PAGE * stride_slot
        offs_source = offs_source[:, None] + offs_d[None, :]
        offs_target = offs_target[:, None] + offs_d[None, :]
        mask_moved = moved[:, None] & (offs_d < D)[None, :]
        key = tl.load(keys_ptr + offs_source, mask=mask_moved)
        value = tl.load(values_ptr + offs_source, mask=mask_moved)
        # A destination may be the source of a lower depth: every thread has read before one writes.
        tl.debug_barrier()
        tl.store(keys_ptr + offs_target, key, mask=mask_moved)
        tl.store(values_ptr + offs_target, value, mask=mask_moved)


def compact(keys: Tensor, values: Tensor, block_table: Tensor, path: Tensor, accepted: Tensor, length: Tensor) -> None:
    """Move the keys and values of accepted rows to where a chain would have them, in place, in all layers.

    keys, values [L, pages, kv_heads, P, D]; block_table [S, W] of pages; path [S, n + 1], as many columns of a
    verdict's as may be accepted, and its accepted [S] ≤ n; length int64 [S] tokens cached before the round: logical
    slot length + path[d] → length + d for d ≤ accepted. Every source is read before a destination is written.
    """
    layers, _, kv_heads, page_size, head_dim = keys.shape
    sequences, rows = path.shape
    if rows == 1:
        return
    block_table = launch.rows_of(block_table)
    path = launch.rows_of(path)
    _compact_kernel[(sequences, layers, kv_heads)](
        keys,
        values,
        block_table,
        path,
        accepted.contiguous(),
        length.contiguous(),
        *keys.stride()[:4],
        block_table.stride(0),
        path.stride(0),
        rows - 1,
        PAGE=page_size,
        D=head_dim,
        DEPTH=max(16, 1 << (rows - 1).bit_length()),
        BLOCK_D=1 << (head_dim - 1).bit_length(),
        **launch.options(4),
    )
