"""The rows a pass starts with, for a CPU: `reference.rounds.enter` in one call instead of twenty small ones."""

import torch
from torch import Tensor

from ..reference import rounds as reference_rounds
from ..values import Entry, Rope, Slots, Tree
from .lanes import byte, copy, kernel, put_byte, put_whole, whole

_WORD = 8


@kernel(f"void({', '.join(['int64'] * 26)})")
def lay(
    token, first, count, alive, table, depth, path, embedding, cos, sin, laid, real, x, turned_cos, turned_sin, length,
    slot, rows, sequences, width, pages, entries, ahead, page_size, wide, turn,
):  # fmt: skip
    """Addresses as `enter` has the tensors, 0 for those it lacks; laid int64 [5, rows]: token, position, sequence, page
    and offset; rows of the embedding and of the rotations take `wide` and `turn` bytes.
    """
    for row in range(rows):
        owner, place = row // width, row % width
        here = owner < sequences
        if here and count:
            here = place < whole(count + 8 * owner)
        if here and alive:
            here = byte(alive + owner) != 0
        entered, at, position, page, root = 0, 0, 0, 0, 0
        if here:
            root = whole(first + 8 * owner) + ahead
            at, entered = root + place, whole(token + 8 * row)
            position = root + whole(depth + 8 * row) if depth else at
            page = whole(table + 8 * (owner * pages + at // page_size))
        put_whole(laid + 8 * row, entered)
        put_whole(laid + 8 * (rows + row), position)
        put_whole(laid + 8 * (2 * rows + row), owner if here else -1)
        put_whole(laid + 8 * (3 * rows + row), page)
        put_whole(laid + 8 * (4 * rows + row), at % page_size)
        put_byte(real + row, here)
        copy(embedding + entered * wide, x + row * wide, wide)
        if turn:
            copy(cos + position * turn, turned_cos + row * turn, turn)
            copy(sin + position * turn, turned_sin + row * turn, turn)
        if path:
            put_whole(length + 8 * row, root)
            for j in range(entries):
                above = root + whole(path + 8 * (row * entries + j)) if here else 0
                put_whole(slot + 8 * (row * entries + j), above)


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
    """As `reference.rounds.enter`."""
    if draft is not None:
        token, count = torch.cat([token, draft], dim=1), count if count is None else count + token.shape[1]
    wide = embedding.shape[1] * embedding.itemsize
    turn = 0 if rope is None else rope.cos.shape[-1] * rope.cos.itemsize
    if wide % _WORD or turn % _WORD:
        return reference_rounds.enter(
            token, first, count, alive, block_table, embedding, rope,
            rows=rows, ahead=ahead, page_size=page_size, kv_heads=kv_heads, depth=depth, path=path,
        )  # fmt: skip
    (sequences, width), entries = token.shape, 0 if path is None else path.shape[2]
    given = [
        None if tensor is None else tensor.contiguous()
        for tensor in (token, first, count, alive, block_table, depth, path, embedding, *(rope or (None, None)))
    ]
    device, dim = token.device, 0 if rope is None else rope.cos.shape[-1]
    laid = torch.empty((5, rows), dtype=torch.int64, device=device)
    real = torch.empty(rows, dtype=torch.bool, device=device)
    x = torch.empty((rows, embedding.shape[1]), dtype=embedding.dtype, device=device)
    turned = None if rope is None else Rope(*torch.empty((2, rows, 1, dim), dtype=rope.cos.dtype, device=device))
    tree = None
    if path is not None:
        length = torch.empty(rows, dtype=torch.int64, device=device)
        tree = Tree(length, torch.empty((rows, entries), dtype=torch.int64, device=device))
    made = [laid, real, x, *(turned or (None, None)), *(tree or (None, None))]
    lay(
        *(0 if tensor is None else tensor.data_ptr() for tensor in (*given, *made)),
        *(rows, sequences, width, block_table.shape[1], entries, ahead, page_size, wide, turn),
    )
    tokens, position, sequence, page, offset = laid
    return Entry(tokens, position, sequence, Slots(page, offset), real, x, turned, tree)
