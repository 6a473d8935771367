"""How a lookup is launched: a pure rule from the length of the text and the votes that are wanted."""

from typing import NamedTuple

LOOKUP_BLOCK = 1024
LOOKUP_BLOCKS = 64


class LookupRule(NamedTuple):
    """Parameters of a lookup: positions of a block, blocks a text has at most, places kept of each, launch."""

    block: int
    blocks: int
    kept: int
    warps: int


def lookup_rule(capacity: int, votes: int | None) -> LookupRule:
    """Blocks of one size for texts of up to 64 Ki tokens, larger ones for longer texts: never more than 64 of them."""
    block = max(LOOKUP_BLOCK, 1 << (-(-capacity // LOOKUP_BLOCKS) - 1).bit_length())
    kept = max(16, 1 << ((votes or 1) - 1).bit_length())
    return LookupRule(block, LOOKUP_BLOCKS, kept, warps=8 if kept >= 128 else 4)
