"""How attention is launched: pure rules from shapes and architecture, as those of `product_rules`.

Where a split begins fixes the order of sums, and depends on the shape alone.
"""

from functools import cache
from typing import NamedTuple

from .launch import DECODE_TILE, PROCESSORS

NEAR_SPLITS = 8
FAR_FACTOR = 4
BUSY_PROGRAMS = 128
SCRATCH_BYTES = 1 << 28
# Rows × heads of a product and of a merge, and bytes of keys that are narrow.
PRODUCT_ROWS = 16
NARROW = 128
# Programs of so many rows × heads that a Hopper chip holds at once.
FEW_PROGRAMS = 2 * BUSY_PROGRAMS
# Most rows of a sequence in programs of one product where keys are narrow.
FEW_ROWS = DECODE_TILE


class AttentionRule(NamedTuple):
    """Parameters of attention: rows and (padded) heads of a program, positions of a near split, launch."""

    rows: int
    heads: int
    split: int
    warps: int
    stages: int

    @property
    def apart(self) -> bool:
        """Whether a launch of its own merges splits: of more rows × heads than one program merges at once."""
        return self.rows * self.heads > PRODUCT_ROWS

    @property
    def at_once(self) -> int:
        """Programs that a Hopper chip holds at once: of four warps two on a processor."""
        return PROCESSORS if self.warps > 4 else 2 * PROCESSORS


def attention_rule(
    head_dim: int,
    group: int,
    kv_heads: int,
    tile: int,
    itemsize: int,
    arch: int,
    width: int | None = None,
    sequences: int = 1,
) -> AttentionRule:
    """Passes of tiles of `tile` rows, `group` query heads to a key head: one product takes 16 or more rows × heads.

    32 are enough to read keys once for a verified draft, 16 are what float32 has registers for; sm_90 has wider matrix
    units for prompts, which round otherwise and take 64. Of sequences with `width` rows each a program takes no more
    than these, up to the power of two: the same instructions, fewer of them; and of narrow keys, which cost little to
    be read twice, up to eight take no more than one product, as long as the chip holds all programs at once: splits are
    then merged by the last of them to end. Stages are what fits into shared memory. Splits are short where their keys
    are wide, or where few key heads make few programs.
    """
    size = (1 << (head_dim - 1).bit_length()) * itemsize
    wide = tile > DECODE_TILE and 90 <= arch < 100 and itemsize == 2 and head_dim <= 128
    heads = 1 << (group - 1).bit_length()
    single = itemsize > 2
    split = 64 if head_dim > 64 or kv_heads < 8 else 128
    products = 64 if wide else 16 if single or size > 256 else 32
    rows = max(1, min(1 << (tile.bit_length() - 1), 16, products // heads))
    if arch and width and rows * heads < 64:
        rows = min(rows, 1 << (width - 1).bit_length())
        fewer = max(1, PRODUCT_ROWS // heads)
        programs = sequences * kv_heads * -(-width // fewer) * NEAR_SPLITS
        if size <= NARROW and width <= FEW_ROWS and programs <= FEW_PROGRAMS:
            rows = min(rows, fewer)
    heads = max(heads, 16 // rows)
    queries = rows * heads * (size + 64 * itemsize)
    held = 0 if rows * heads >= 64 else 1
    stages = 1 if single else next((n for n in (3, 2) if queries + (n - held) * 128 * size <= 96 << 10), 1)
    return AttentionRule(rows, heads, split, 4 if size <= 128 and not single else 8, stages)


def attention_splits(positions: int, split: int) -> int:
    """Splits of a sequence: eight of `split` positions, then longer ones, so that long contexts have fewer to merge."""
    near, far = NEAR_SPLITS * split, FAR_FACTOR * split
    return -(-min(positions, near) // split) + -(-max(positions - near, 0) // far)


def attention_in_order(tiles: int, scratch_bytes: int) -> bool:
    """Whether one program folds the splits of each of `tiles` (row group, key head) one after the other.

    What a program takes does not round: splits are merged in order by whoever has them. The rule has a threshold in
    rows and in positions and no way back, so that two passes compile both kinds.
    """
    return tiles >= BUSY_PROGRAMS or scratch_bytes > SCRATCH_BYTES


@cache
def attention_programs(tiles: int, splits: int, at_once: int) -> int:
    """Programs that share the splits of each of `tiles` out of order, where the chip holds `at_once` of all of them.

    Those with the least to wait for: rounds of programs, each as long as its splits and a start, which takes about as
    long as one.
    """

    def waits(programs: int) -> int:
        return -(-tiles * programs // at_once) * (-(-splits // programs) + 1)

    return min(range(splits, 0, -1), key=waits)
