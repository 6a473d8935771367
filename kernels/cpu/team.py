"""The threads PyTorch computes with on a CPU, for kernels that are not its own.

Another pool of threads would fight with them for the cores. They belong to the OpenMP library that PyTorch has loaded,
whose entry for compiled code is called by its address; where it has none a kernel runs on one thread.
"""

from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .instructions import INT, LONG
from .lanes import SOURCE, part


def worker(function) -> Any:
    """What every thread of a team runs: a function of the address of a block of int64, kept on disk as kernels are."""
    function.__qualname__ += f".{SOURCE}"
    try:
        return numba.cfunc("void(CPointer(int64))", cache=True)(function)
    except RuntimeError:
        return numba.cfunc("void(CPointer(int64))")(function)


@part
def dealt(entry, worker, block, threads):
    """Call a worker on so many threads of the team at `entry`, and wait for all; where there is none, on this one."""
    if entry and threads > 1:
        _together(entry, worker, block, threads)
    else:
        _alone(worker, block)


@intrinsic
def _together(context, entry, worker, block, threads):
    """GOMP_parallel, by its address."""

    def build(context, builder, signature, given):
        entry, worker, block, threads = given
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, INT, INT])
        arguments = [builder.inttoptr(worker, byte), builder.inttoptr(block, byte), builder.trunc(threads, INT)]
        builder.call(builder.inttoptr(entry, kind.as_pointer()), [*arguments, ir.Constant(INT, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build


@intrinsic
def _alone(context, worker, block):
    def build(context, builder, signature, given):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        worker, block = (
            builder.inttoptr(x, to.as_pointer()) for x, to in zip(given, (kind, ir.IntType(8)), strict=True)
        )
        builder.call(worker, [block])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def taken(context, address):
    """The int64 at an address, which is one more from then on: each of several threads gets another."""

    def build(context, builder, signature, given):
        counter = builder.inttoptr(given[0], LONG.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(LONG, 1), "monotonic")

    return types.int64(types.int64), build
