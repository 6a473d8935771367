"""Sixteen float32 side by side: what the kernels of a CPU are written in.

A sum runs over lanes in the order the code says: nothing is reassociated or contracted, a product is fused with a sum
where `fma` stands, and `total` adds halves. So an element has the same bits in every kernel, for any number of rows and
on any processor (but for bfloat16 below its least normal number, see `write`); how many lanes an instruction takes is
the compiler's affair.

An address is an integer, and elements are counted from it; `half` says that they are bfloat16, not float32.
"""

import hashlib
import math
import operator
from pathlib import Path

import numba
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

from .instructions import (
    FLOAT,
    FLOATS,
    INTS,
    LONG,
    SHORTS,
    WIDTH,
    constant,
    folded,
    fused,
    load,
    narrowed,
    splatted,
    widened,
)

_ROOM = Path(__file__).parent
_FILES = [*sorted(_ROOM.glob("*.py")), _ROOM.parent / "noise.py"]
SOURCE = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()[:8]
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
_ROUNDER, _LEAST, _MOST = 12582912.0, -87.0, 88.0
_MOST_BFLOAT16, _MOST_FLOAT32 = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).max
# The bits of √½.
_ROOT = 0x3F3504F3


class Lanes(types.Type):
    """Numba's type of sixteen float32."""

    def __init__(self) -> None:
        super().__init__("lanes")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, FLOATS)


LANES = Lanes()


def kernel(signature: str):
    """Compile a function for one signature; numba keeps the code on disk where it finds a folder it may write to."""

    def compiled(function):
        # Numba notices changes of a kernel's own file; those of what it is made of are told by the name.
        function.__qualname__ += f".{SOURCE}"
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:
            return numba.njit(signature, nogil=True)(function)

    return compiled


part = numba.njit(nogil=True)


@intrinsic
def splat(context, value):
    """A number in every lane."""

    def build(context, builder, signature, arguments):
        narrow = context.cast(builder, arguments[0], signature.args[0], types.float32)
        return splatted(builder, narrow, FLOATS)

    return LANES(value), build


@intrinsic
def lane(context, x, i):
    """The number in lane i."""
    return types.float32(LANES, i), lambda _, builder, signature, given: builder.extract_element(*given)


@intrinsic
def counted(context, start):
    """start, start + 1, …, start + 15."""

    def build(context, builder, signature, given):
        first = builder.sitofp(given[0], FLOAT)
        return builder.fadd(splatted(builder, first, FLOATS), ir.Constant(FLOATS, [float(i) for i in range(WIDTH)]))

    return LANES(types.int64), build


@intrinsic
def below(context, count, x, y):
    """Lanes 0 to count - 1 of x, the others of y."""

    def build(context, builder, signature, given):
        count, x, y = given
        lanes = ir.Constant(ir.VectorType(LONG, WIDTH), list(range(WIDTH)))
        return builder.select(builder.icmp_signed("<", lanes, splatted(builder, count, lanes.type)), x, y)

    return LANES(types.int64, LANES, LANES), build


@intrinsic
def fma(context, x, y, z):
    """x·y + z, rounded once."""

    def build(context, builder, signature, given):
        return fused(builder, *given)

    return LANES(LANES, LANES, LANES), build


@intrinsic
def greater(context, x, y):
    """The greater of each two, or y where one is no number."""

    def build(context, builder, signature, given):
        return builder.select(builder.fcmp_ordered(">", *given), *given)

    return LANES(LANES, LANES), build


@intrinsic
def lesser(context, x, y):
    """The lesser of each two, or y where one is no number."""

    def build(context, builder, signature, given):
        return builder.select(builder.fcmp_ordered("<", *given), *given)

    return LANES(LANES, LANES), build


@intrinsic
def over(context, x, y, a, b):
    """Lanes of a where x is above y, of b elsewhere."""

    def build(context, builder, signature, given):
        x, y, a, b = given
        return builder.select(builder.fcmp_ordered(">", x, y), a, b)

    return LANES(LANES, LANES, LANES, LANES), build


@intrinsic
def total(context, x):
    """The sum of all lanes, by halves: lane i and i + 8, then i + 4, i + 2, i + 1."""

    def build(context, builder, signature, given):
        return folded(builder, given[0], builder.fadd)

    return types.float32(LANES), build


def _extreme(order):
    @intrinsic
    def apply(context, x):
        def build(context, builder, signature, given):
            return folded(builder, given[0], lambda a, b: builder.select(builder.fcmp_ordered(order, a, b), a, b))

        return types.float32(LANES), build

    return apply


# The greatest and the least of all lanes.
greatest, least = _extreme(">"), _extreme("<")


@intrinsic
def _doubled(context, x, times):
    """x·2ⁿ, n being the lowest bits of the fraction of `times`."""

    def build(context, builder, signature, given):
        x, times = (builder.bitcast(part, INTS) for part in given)
        return builder.bitcast(builder.add(x, builder.shl(times, constant(23))), FLOATS)

    return LANES(LANES, LANES), build


@intrinsic
def _exponent(context, x):
    """n for which x·2⁻ⁿ lies between √½ and √2, of normal x > 0."""

    def build(context, builder, signature, given):
        bits = builder.bitcast(given[0], INTS)
        return builder.sitofp(builder.ashr(builder.sub(bits, constant(_ROOT)), constant(23)), FLOATS)

    return LANES(LANES), build


@intrinsic
def _read_floats(context, address):
    def build(context, builder, signature, given):
        return load(builder, given[0], 0, FLOATS)

    return LANES(types.int64), build


@intrinsic
def _read_halves(context, address):
    def build(context, builder, signature, given):
        return widened(builder, given[0], 0)

    return LANES(types.int64), build


@intrinsic
def _write_floats(context, address, x):
    def build(context, builder, signature, given):
        builder.store(given[1], builder.inttoptr(given[0], FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, LANES), build


@intrinsic
def _write_halves(context, address, x):
    def build(context, builder, signature, given):
        builder.store(narrowed(builder, given[1]), builder.inttoptr(given[0], SHORTS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, LANES), build


def _scalar(kind, element):
    """Reading and writing one number at an address."""

    @intrinsic
    def get(context, address):
        def build(context, builder, signature, given):
            return builder.load(builder.inttoptr(given[0], element.as_pointer()))

        return kind(types.int64), build

    @intrinsic
    def put(context, address, value):
        def build(context, builder, signature, given):
            builder.store(given[1], builder.inttoptr(given[0], element.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, kind), build

    return get, put


whole, put_whole = _scalar(types.int64, LONG)
number, put_number = _scalar(types.float32, FLOAT)
byte, put_byte = _scalar(types.int8, ir.IntType(8))


@numba.njit
def copy(source, target, size):
    """`size` bytes, a multiple of eight."""
    for i in range(0, size, 8):
        put_whole(target + i, whole(source + i))


@numba.njit
def read(base, i, half):
    """Elements i to i + 15 from an address on."""
    if half:
        return _read_halves(base + 2 * i)
    return _read_floats(base + 4 * i)


@numba.njit
def write(base, i, x, half):
    """x to elements i to i + 15, rounded to their type (`narrowed`)."""
    if half:
        _write_halves(base + 2 * i, x)
    else:
        _write_floats(base + 4 * i, x)


@numba.njit
def finite(x, half):
    """x in the range of its type: what is beyond it its greatest number, with the sign of x, and NaN 0."""
    most = splat(_MOST_BFLOAT16 if half else _MOST_FLOAT32)
    x = lesser(most, greater(splat(0.0) - most, x))
    return over(x, splat(-math.inf), x, splat(0.0))


@numba.njit
def exp(x):
    """eˣ to a unit in the last place (Cephes' polynomial), between e⁻⁸⁷ and e⁸⁸; what is no number stays none."""
    x = lesser(splat(_MOST), greater(splat(_LEAST), x))
    times = fma(x, splat(_LOG2E), splat(_ROUNDER))
    n = times - splat(_ROUNDER)
    r = fma(n, splat(-_LN2_LOW), fma(n, splat(-_LN2_HIGH), x))
    p = splat(1.9875691500e-4)
    p = fma(p, r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    return _doubled(fma(p, r * r, r + splat(1.0)), times)


@numba.njit
def log(x):
    """ln x of normal x > 0 to a unit in the last place (Cephes' polynomial), near 1 too."""
    n = _exponent(x)
    f = _doubled(x, splat(_ROUNDER) - n) - splat(1.0)
    p = splat(7.0376836292e-2)
    p = fma(p, f, splat(-1.1514610310e-1))
    p = fma(p, f, splat(1.1676998740e-1))
    p = fma(p, f, splat(-1.2420140846e-1))
    p = fma(p, f, splat(1.4249322787e-1))
    p = fma(p, f, splat(-1.6668057665e-1))
    p = fma(p, f, splat(2.0000714765e-1))
    p = fma(p, f, splat(-2.4999993993e-1))
    p = fma(p, f, splat(3.3333331174e-1))
    square = f * f
    rest = fma(splat(-0.5), square, fma(p * f, square, n * splat(_LN2_LOW)))
    return fma(n, splat(_LN2_HIGH), f + rest)


def _operator(operation, instruction):
    @intrinsic
    def apply(context, x, y):
        def build(context, builder, signature, given):
            return getattr(builder, instruction)(*given)

        return LANES(LANES, LANES), build

    @overload(operation, inline="always")
    def choose(x, y):
        if isinstance(x, Lanes) and isinstance(y, Lanes):
            return lambda x, y: apply(x, y)  # noqa: PLW0108
        return None


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")
