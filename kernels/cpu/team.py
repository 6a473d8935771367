"""The threads PyTorch computes with on a CPU, for kernels that are not its own.

Another pool of threads would fight with them for the cores. They belong to the OpenMP library that PyTorch has loaded,
whose entry for compiled code is called by its address; where it has none a kernel runs on one thread.

A team is the address of a few int64 (`openmp.team`), 0 for none. Calling it together takes some microseconds, and each
time the slowest to come is waited for. So what deals out work often, a pass, makes a crew of a team, which is called
together once.
"""

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .instructions import INT, LINE, LONG
from .lanes import SOURCE, part, put_whole, whole

# Of a team: the addresses of GOMP_parallel and sched_yield, and whether it is a crew. Of a crew, in lines of their own:
# its state, the work that is dealt out, and how many have come.
_PARALLEL, _YIELD, _TOGETHER = 0, 1, 2
_STATE, _WORKER, _BLOCK, _CAME, _SIZE = (LINE // 8 * at for at in (1, 2, 3, 4, 5))
_NEXT, _OVER = 1 << 16, -(1 << 62)
_PATIENCE = 2048


def worker(function) -> Any:
    """What every thread of a team runs: a function of the address of a block of int64, kept on disk as kernels are."""
    function.__qualname__ += f".{SOURCE}"
    try:
        return numba.cfunc("void(CPointer(int64))", cache=True)(function)
    except RuntimeError:
        return numba.cfunc("void(CPointer(int64))")(function)


@part
def dealt(team, worker, block, threads):
    """Have so many threads of a team call a worker, and wait until its work is done; without a team, this one alone."""
    if team == 0 or threads < 2:
        _alone(worker, block)
    elif whole(team + 8 * _TOGETHER) == 0:
        _together(whole(team + 8 * _PARALLEL), worker, block, threads)
    else:
        put_whole(team + 8 * _WORKER, worker)
        put_whole(team + 8 * _BLOCK, block)
        added(team + 8 * _STATE, _NEXT)
        _alone(worker, block)
        added(team + 8 * _STATE, _NEXT)
        turns = 0
        while loaded(team + 8 * _STATE) % _NEXT:
            turns = _waited(team, turns)


@part
def assembled(team):
    """The block of a crew: threads of this team that stay together while the first of them deals out work.

    Each thread calls `joined_first`, and goes on or, if it says no, calls `help_out`; the first calls `dismissed`.
    To deal work to a crew takes no call of the OpenMP library, and work that is done is over: it is not waited for a
    thread that has not come, because the system gave its core to another process.
    """
    crew = np.zeros(_SIZE, np.int64)
    crew[_PARALLEL], crew[_YIELD], crew[_TOGETHER] = whole(team), whole(team + 8 * _YIELD), 1
    return crew


@part
def joined_first(crew):
    return added(crew + 8 * _CAME, 1) == 0


@part
def help_out(crew):
    """Do a share of what is dealt out, until the crew is dismissed. The state's high part is odd while there is work,
    its low part counts those who are at it."""
    last = turns = 0
    state = loaded(crew + 8 * _STATE)
    while state >= 0:
        piece = state // _NEXT
        if piece % 2 and piece != last and exchanged(crew + 8 * _STATE, state, state + 1):
            _alone(whole(crew + 8 * _WORKER), whole(crew + 8 * _BLOCK))
            added(crew + 8 * _STATE, -1)
            last, turns = piece, 0
        else:
            turns = _waited(crew, turns)
        state = loaded(crew + 8 * _STATE)


@part
def dismissed(crew):
    added(crew + 8 * _STATE, _OVER)


@part
def _waited(team, turns):
    """Wait a moment; every so many times another process may have the core."""
    breathe()
    if turns % _PATIENCE == _PATIENCE - 1:
        yielded(whole(team + 8 * _YIELD))
    return turns + 1


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


def _added(order):
    @intrinsic
    def add(context, address, value):
        def build(context, builder, signature, given):
            return builder.atomic_rmw("add", builder.inttoptr(given[0], LONG.as_pointer()), given[1], order)

        return types.int64(types.int64, types.int64), build

    return add


# The int64 at an address before something is added to it, which makes what was written before visible to who sees it.
added, _counted = _added("acq_rel"), _added("monotonic")


@part
def taken(address):
    """The int64 at an address, which is one more from then on: each of several threads gets another."""
    return _counted(address, 1)


@intrinsic
def loaded(context, address):
    """The int64 at an address, and with it all that was written before it by who changed it."""

    def build(context, builder, signature, given):
        return builder.load_atomic(builder.inttoptr(given[0], LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), build


@intrinsic
def exchanged(context, address, old, new):
    """Whether the int64 at an address was `old`; it is `new` then."""

    def build(context, builder, signature, given):
        address, old, new = given
        pair = builder.cmpxchg(builder.inttoptr(address, LONG.as_pointer()), old, new, "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), build


@intrinsic
def breathe(context):
    """Tell the processor that this thread does nothing but wait."""

    def build(context, builder, signature, given):
        name, arguments = {
            "x86_64": ("llvm.x86.sse2.pause", []),
            "AMD64": ("llvm.x86.sse2.pause", []),
            "aarch64": ("llvm.aarch64.hint", [ir.Constant(INT, 1)]),
        }.get(platform.machine(), ("", []))
        if name:
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def yielded(context, address):
    """sched_yield, by its address, if there is one."""

    def build(context, builder, signature, given):
        with builder.if_then(builder.icmp_signed("!=", given[0], ir.Constant(LONG, 0))):
            builder.call(builder.inttoptr(given[0], ir.FunctionType(INT, []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), build
