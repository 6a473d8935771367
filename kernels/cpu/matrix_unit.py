"""The matrix unit of a processor (AMX): products of tiles, of sixteen rows of thirty-two bfloat16.

An instruction adds thirty-two products to each of sixteen by sixteen sums: those of the even columns in one chain,
those of the odd ones in another, and both to the sum. How many rows there are does not enter a row's bits.
"""

import ctypes
import platform
import sys
from functools import cache

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .. import environment
from .instructions import FEATURES, LINE, LONG, ask
from .lanes import part, put_whole

# Rows of a tile, and columns of one of activations or weights.
ROWS, COLUMNS = 16, 32
EXISTS = bool(FEATURES.get("amx-tile")) and bool(FEATURES.get("amx-bf16"))
# Six tiles of sums, for two of activations by three of weights.
SIDE = 3
ACTIVATIONS, WEIGHTS = 6, 7
_BYTE = ir.IntType(8)
_ARCH_PRCTL, _ASK_FOR, _TILE_DATA = 158, 0x1023, 18


@cache
def permitted() -> bool:
    """Whether there is one, and the system lets this process use it: Linux wants to be asked.

    SKIPJACK_CPU_KERNELS=pairs does without, for the bits of processors that have none.
    """
    if not EXISTS or environment.cpu_kernels() == "pairs":
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(*map(ctypes.c_long, (_ARCH_PRCTL, _ASK_FOR, _TILE_DATA))) == 0


@part
def shape(memory, rows):
    """Let tiles of activations and sums have `rows` rows, told by 64 zeroed bytes of memory; all tiles are cleared."""
    put_whole(memory, 1)
    # Bytes of a row, of four tiles each.
    put_whole(memory + 16, 0x0040004000400040)
    put_whole(memory + 24, 0x0040004000400040)
    put_whole(memory + 48, (ROWS << 56) + rows * 0x0001010101010101)
    _take_shape(memory)


@intrinsic
def _take_shape(context, memory):
    def build(context, builder, signature, given):
        _call(builder, "ldtilecfg", _at(builder, given[0]))
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def leave(context):
    """Let go of all tiles: a switch between threads would have to save them."""

    def build(context, builder, signature, given):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic(prefer_literal=True)
def clear(context, blocks):
    """No sums yet, of so many tiles of rows."""

    def build(context, builder, signature, given):
        for tile in range(SIDE * blocks.literal_value):
            _call(builder, "tilezero", ir.Constant(_BYTE, tile))
        return context.get_dummy_value()

    return types.void(blocks), build


@intrinsic(prefer_literal=True)
def add(context, blocks, x, stride, weights, width, ahead):
    """Add thirty-two columns to the sums of one or two tiles of rows.

    Rows of x are `stride` bytes apart; three tiles of weights, of two columns of sixteen outputs a row, are side by
    side in rows of `width` bytes. Weights `ahead` bytes on are asked for, unless that is 0.
    """

    def build(context, builder, signature, given):
        _, x, stride, weights, width, _ = given
        if ahead.literal_value:
            for start in range(0, ROWS * SIDE * LINE, LINE):
                ask(builder, builder.add(weights, ir.Constant(LONG, ahead.literal_value + start)))
        for block in range(blocks.literal_value):
            _fetch(builder, ACTIVATIONS, builder.add(x, builder.mul(stride, ir.Constant(LONG, ROWS * block))), stride)
            for i in range(SIDE):
                _fetch(builder, WEIGHTS, builder.add(weights, ir.Constant(LONG, LINE * i)), width)
                _multiply(builder, SIDE * block + i)
        return context.get_dummy_value()

    return types.void(blocks, types.int64, types.int64, types.int64, types.int64, ahead), build


@intrinsic(prefer_literal=True)
def put(context, blocks, sums, width):
    """Sums to memory, in rows of `width` bytes."""

    def build(context, builder, signature, given):
        _, sums, width = given
        for tile in range(SIDE * blocks.literal_value):
            rows = builder.mul(width, ir.Constant(LONG, ROWS * (tile // SIDE)))
            at = builder.add(builder.add(sums, rows), ir.Constant(LONG, LINE * (tile % SIDE)))
            _store(builder, tile, at, width)
        return context.get_dummy_value()

    return types.void(blocks, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def fetch(context, tile, address, width):
    """A tile from memory, in rows of `width` bytes."""

    def build(context, builder, signature, given):
        _fetch(builder, tile.literal_value, *given[1:])
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def store(context, tile, address, width):
    """A tile to memory, in rows of `width` bytes."""

    def build(context, builder, signature, given):
        _store(builder, tile.literal_value, *given[1:])
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def multiply(context, tile):
    """Add to a tile of sums what the tiles of activations and weights give."""

    def build(context, builder, signature, given):
        _multiply(builder, tile.literal_value)
        return context.get_dummy_value()

    return types.void(tile), build


def _fetch(builder, tile, address, stride):
    _call(builder, "tileloadd64", ir.Constant(_BYTE, tile), _at(builder, address), stride)


def _store(builder, tile, address, stride):
    _call(builder, "tilestored64", ir.Constant(_BYTE, tile), _at(builder, address), stride)


def _multiply(builder, sums):
    _call(builder, "tdpbf16ps", *(ir.Constant(_BYTE, tile) for tile in (sums, ACTIVATIONS, WEIGHTS)))


def _call(builder, name, *arguments):
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _at(builder, address):
    return builder.inttoptr(address, _BYTE.as_pointer())
