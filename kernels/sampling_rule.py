"""How the kernels that choose tokens are launched: a pure rule from the size of the vocabulary."""

from typing import NamedTuple


class SamplingRule(NamedTuple):
    """Parameters of what draws from rows of scores: blocks, ids of a block, a segment and a tile of segments, launch.

    listed: room for the numbers of the segments of a row; kept: for the scores among which its nucleus ends; parts:
    programs that look for them.
    """

    blocks: int
    block: int
    segment: int
    tile: int
    warps: int
    listed: int
    kept: int
    parts: int


def sampling_rule(size: int) -> SamplingRule:
    """Blocks enough to occupy the processors with one row of a large vocabulary, segments of a cache line or two.

    A tile is eight ids a thread: the segments that hold the 50 likeliest ids are two tiles, more only on ties.
    """
    segment, power = 64, 1 << (size - 1).bit_length()
    block = max(segment, min(1024, power))
    blocks, tile = -(-size // block), max(segment, min(2048, power))
    listed = 1 << (blocks * block // segment - 1).bit_length()
    kept = max(tile, min(16384, power))
    return SamplingRule(blocks, block, segment, tile, max(1, tile // 256), listed, kept, max(1, min(8, listed // 256)))
