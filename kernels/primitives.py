"""Triton functions that kernels share."""

import torch
import triton
import triton.language as tl

from . import launch

# The interpreter multiplies bfloat16 as integers: there products are made in float32.
AHEAD_PIECE: tl.constexpr = tl.constexpr(launch.AHEAD_PIECE)
_MOST_BFLOAT16: tl.constexpr = tl.constexpr(torch.finfo(torch.bfloat16).max)
_MOST_FLOAT32: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
_UPCAST: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a·b in float32, a widened to the dtype of b; float32 operands are not rounded to TF32."""
    if _UPCAST:
        b = b.to(tl.float32)
    return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")


@triton.jit
def ordered_sum(x):
    """Sum over the first axis, a power of two, of [N, M]: neighbours in pairs, an order no layout of x changes.

    x is no plain product, which could be fused with the first addition: tl.fma(a, b, 0.0).
    """
    return tl.reshape(_paired_sums(x, 1), (x.shape[1],))


@triton.jit
def gathered_sum(x):
    """`ordered_sum` of [N, …, M]. The terms of a sum are brought to one thread, where they lie with several warps."""
    return _split_sum(tl.permute(x, (1, 0) if len(x.shape) == 2 else (1, 2, 0)))


@triton.jit
def gathered_sum_of_columns(x):
    """`ordered_sum` of [P, N, M] over the first two axes, the first of which lies with several warps."""
    sums = _paired_sums(tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])), x.shape[0])
    return gathered_sum(sums)


@triton.jit
def _paired_sums(x, LEFT: tl.constexpr):
    """Neighbours of [N, M] added in pairs until there are LEFT."""
    if x.shape[0] == LEFT:
        total = x
    else:
        total = _paired_sums(tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1), LEFT)
    return total


@triton.jit
def _split_sum(x):
    """Sum over the last axis, a power of two above 1: neighbours in pairs."""
    if x.shape[-1] == 2:
        lower, upper = tl.split(x)
        total = lower + upper
    else:
        lower, upper = tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 2, 2]))  # noqa: RUF005
        total = _split_sum(lower + upper)
    return total


@triton.jit
def flags(ptr, offs, mask):
    """Which of the bools at ptr + offs are true, none where not `mask`, read in the words of 32 bits they lie in.

    The compiler takes the narrowest load behind an operand of a product as its width, and sums the columns in another
    order: with a load of 8-bit values there, rows that may be inactive would not have the bits of those that may not.
    """
    address = (ptr + offs).to(tl.int64)
    word_ptr = (address & -4).to(tl.pointer_type(tl.int32))
    word = tl.load(word_ptr, mask=mask, other=0, cache_modifier=".cg")
    return (word >> ((address & 3) * 8).to(tl.int32)) & 255 != 0


@triton.jit
def finite(x, dtype: tl.constexpr):
    """x in the range of `dtype`: what is beyond it its greatest number, with the sign of x, and NaN 0."""
    MOST: tl.constexpr = 65504.0 if dtype == tl.float16 else _MOST_BFLOAT16 if dtype == tl.bfloat16 else _MOST_FLOAT32
    return tl.where(x == x, tl.minimum(tl.maximum(x, -MOST), MOST), 0.0)  # noqa: PLR0124 - only NaN is not itself


@triton.jit
def wait_for_producers(PDL: tl.constexpr):
    """Everything earlier kernels wrote is visible after this; before every dependent load, every store, every exit.

    Only then may the kernel after this one be scheduled. Let in at once, several kernels would wait on the
    multiprocessors side by side, and those that come late find room on few of them. So all but the last kernel before
    this one have ended when it starts, and what those wrote may be read before the wait.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def is_last(arrivals_ptr, PROGRAMS):
    """Whether this is the last of so many programs to arrive; it sees what all of them have stored, past the L1 cache.

    The barrier puts every thread's stores before the release of its program, the acquire puts them before the loads of
    the last one.
    """
    tl.debug_barrier()
    return tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") + 1 == PROGRAMS


@triton.jit
def prefetch(ptrs):
    """Ask for the cache lines at ptrs to be brought to the L2 cache. Nothing is read, and nothing waits."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_first(ptr, size):
    """Ask for the first `size` bytes at ptr, a multiple of AHEAD_PIECE, each program of the launch for its share.

    One thread asks for a piece at once (sm_90 and later): nothing waits for the requests to be made.
    """
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    for piece in range(program, size // AHEAD_PIECE, programs):
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [ptr.to(tl.int64) + piece * AHEAD_PIECE, tl.full((), AHEAD_PIECE, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def gelu_tanh(x):
    """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
