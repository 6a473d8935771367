"""Consecutive rows of one sequence, grouped on the device: the host knows no more than how many there can be."""

import torch
import triton
import triton.language as tl

from . import launch
from .attention_index import RowGroups, TritonIndex
from .primitives import wait_for_producers


def row_groups(index: TritonIndex, rows: int) -> RowGroups:
    """Groups of at most `rows` consecutive rows of one sequence, made once per index; the host knows only a bound."""
    if rows not in index.row_groups:
        count = index.sequence.shape[0]
        sequences = index.block_table.shape[0]
        bound = max(1, (count + min(sequences, count) * (rows - 1)) // rows)
        # Both start on 16 bytes whatever the bound, or the kernels that read them would be compiled twice.
        table = torch.zeros(2, -(-bound // 4) * 4, dtype=torch.int32, device=index.sequence.device)
        groups = RowGroups(table[0, :bound], table[1, :bound], bound)
        _row_groups_kernel[(sequences,)](
            index.sequence,
            groups.first,
            groups.count,
            count,
            GROUP_ROWS=rows,
            BLOCK=1024,
            PDL=launch.dependent(launch.architecture()),
            **launch.options(4, 1),
        )
        index.row_groups[rows] = groups
    return index.row_groups[rows]


@triton.jit(do_not_specialize=["rows"])
def _row_groups_kernel(
    sequence_ptr,
    first_ptr,
    count_ptr,
    rows,
    GROUP_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """first row and row count of the groups of sequence pid, int32 [groups]; sequence int64 [rows], -1 for padding.

    The n-th sequence of the pass owns groups from (its first row + n·(GROUP_ROWS − 1)) // GROUP_ROWS on.
    """
    pid_sequence = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    first = rows
    count = 0
    earlier = 0
    for block in range(0, rows, BLOCK):
        offs_row = block + offs
        mask = offs_row < rows
        sequence = tl.load(sequence_ptr + offs_row, mask=mask, other=-1)
        before = tl.load(sequence_ptr + offs_row - 1, mask=mask & (offs_row > 0), other=-1)
        own = sequence == pid_sequence
        first = tl.minimum(first, tl.min(tl.where(own, offs_row, rows), axis=0))
        count += tl.sum(own.to(tl.int32), axis=0)
        begins = (sequence >= 0) & (sequence != before) & (offs_row < first)
        earlier += tl.sum(begins.to(tl.int32), axis=0)
    base = (first + earlier * (GROUP_ROWS - 1)) // GROUP_ROWS
    for block in range(0, count, BLOCK * GROUP_ROWS):
        offs_group = block // GROUP_ROWS + offs
        left = count - offs_group * GROUP_ROWS
        tl.store(first_ptr + base + offs_group, first + offs_group * GROUP_ROWS, mask=left > 0)
        tl.store(count_ptr + base + offs_group, tl.minimum(left, GROUP_ROWS), mask=left > 0)
