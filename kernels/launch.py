"""How kernels are launched: the architecture, dependent launch, and rules of kernels that hold whole rows.

Architectures are compute capabilities times ten, 90 for sm_90; 0 is the interpreter.
"""

from functools import cache
from typing import Any, NamedTuple, cast

from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import environment

INTERPRETED = bool(knobs.runtime.interpret)
DEPENDENT_LAUNCH = environment.dependent_launch()
AHEAD_BYTES = environment.ahead_mib() << 20
AHEAD_PIECE = 16 * 1024
AHEAD_OF = 128 << 20
CACHE_LINE = 128
ROW_MAP_BLOCK = 1024
# Of an H100 or H200 (SXM), on whatever chip: only the depth of pipelines follows from it.
PROCESSORS = 132
# Rows of activations that are one instruction of the matrix units.
DECODE_TILE = 8
STREAMED_ROWS = 64
# What a thread may take, one fewer than there are.
PRODUCT_REGISTERS = 255


class BlockRule(NamedTuple):
    """Parameters of a kernel that holds a row, or walks through it: elements at once, and launch."""

    block: int
    warps: int


class MergeRule(NamedTuple):
    """Parameters of the merge of a head's vocabulary blocks: blocks seen at once, candidates of one lane, launch."""

    lanes: int
    share: int
    warps: int


def padded(columns: int) -> int:
    """Columns a weight is stored with: a multiple of 16, so that every row starts on a 16-byte boundary."""
    return -(-columns // 16) * 16


def tile_of(rows: int, tile: int | None) -> int:
    """The tile of a pass, or the one whose rules are meant for so many rows where it has none."""
    return tile or (DECODE_TILE if rows <= STREAMED_ROWS else 64)


def norm_rule(columns: int) -> BlockRule:
    """One power of two over the row, about sixteen elements a thread."""
    block = 1 << (columns - 1).bit_length()
    return BlockRule(block, warps=min(16, max(1, block // 512)))


def vocabulary_rule(size: int) -> BlockRule:
    """Blocks that a row of scores is walked in, sixteen elements a thread."""
    block = max(16, min(8192, 1 << (size - 1).bit_length()))
    return BlockRule(block, warps=max(1, block // 512))


def merge_rule(blocks: int, kept: int, arch: int) -> MergeRule:
    """`kept` candidates of each of `blocks` vocabulary blocks, the blocks dealt to lanes in turn."""
    lanes = 1024 if arch else 8
    share = -(-blocks // lanes) * kept
    return MergeRule(lanes, 1 << (share - 1).bit_length(), warps=4)


@cache
def architecture() -> int:
    """The architecture kernels are compiled for; 0 in the interpreter."""
    return 0 if INTERPRETED else int(cast("Any", driver.active).get_current_target().arch)


def dependent(arch: int) -> bool:
    """Whether kernels overlap their start with the end of the one before (programmatic dependent launch).

    SKIPJACK_PDL=0 turns it off: to look for races, and because kernel durations in a profile lie under it.
    """
    return DEPENDENT_LAUNCH and arch >= 90


def asks(arch: int) -> bool:
    """Whether kernels ask the L2 cache ahead for the weight of the next one: where they wait for the one before."""
    return _nvidia() and dependent(arch) and AHEAD_BYTES > 0


def ahead_bytes(weight_bytes: int) -> int:
    """Bytes of the next kernel's weight that a kernel asks for, if it `asks` at all.

    The first SKIPJACK_AHEAD_MIB of it, 8 unless that says otherwise: with twice as many an H200 was no faster, and with
    four times slower. Nothing of a weight of more than AHEAD_OF: a step of 8B was never faster by it, and up to 1 %
    slower.
    """
    return 0 if weight_bytes > AHEAD_OF else min(weight_bytes, AHEAD_BYTES) // AHEAD_PIECE * AHEAD_PIECE


@cache
def _nvidia() -> bool:
    return not INTERPRETED and cast("Any", driver.active).get_current_target().backend == "cuda"


def options(warps: int, stages: int = 2, registers: int | None = None) -> dict[str, Any]:
    """Keyword arguments of every launch, PDL among them, which says whether it is a dependent one.

    `registers`: what a thread may take, None leaves it to the assembler.

    NVIDIA's assembler spills now and then to fit one more program on a processor; told a limit, it does not.
    """
    chosen: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    chosen["PDL"] = dependent(architecture())
    if chosen["PDL"]:
        chosen["launch_pdl"] = True
    if registers is not None and _nvidia():
        chosen["maxnreg"] = registers
    return chosen


def rows_of(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
