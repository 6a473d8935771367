"""The instructions that `lanes` and the kernels of a CPU are made of, for LLVM: functions of a builder and values."""

from llvmlite import binding, ir
from numba.core import cgutils, config

WIDTH = 16
LINE = 64
FLOAT, SHORT, INT, LONG = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, SHORTS, INTS = (ir.VectorType(element, WIDTH) for element in (FLOAT, SHORT, INT))
# What this processor has, if it is the one numba compiles for: of another nothing is known.
FEATURES = {} if config.CPU_NAME or config.CPU_FEATURES else binding.get_host_cpu_features()
# Thirty-two registers of as many lanes; an instruction for pairs of products.
MANY_REGISTERS, PAIRED = (bool(FEATURES.get(name)) for name in ("avx512f", "avx512bf16"))


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


def load(builder, address, offset, kind):
    """What lies so many bytes after an address."""
    at = builder.add(address, ir.Constant(LONG, offset))
    return builder.load(builder.inttoptr(at, kind.as_pointer()), align=4)


def widened(builder, address, offset):
    """The lanes of sixteen bfloat16 that lie so many bytes after an address."""
    at = builder.inttoptr(builder.add(address, ir.Constant(LONG, offset)), SHORTS.as_pointer())
    bits = builder.zext(builder.load(at, align=2), INTS)
    return builder.bitcast(builder.shl(bits, constant(16)), FLOATS)


def fused(builder, x, y, z):
    """x·y + z of lanes, rounded once."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [x, y, z])


def paired(builder, x, y, z):
    """z + the products of two bfloat16 in every lane of x and y; the first lies in the lower half of 32 bits."""
    if PAIRED:
        pairs = ir.VectorType(_BFloat(), 2 * WIDTH)
        kind = ir.FunctionType(FLOATS, [FLOATS, pairs, pairs])
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(dot, [z, builder.bitcast(x, pairs), builder.bitcast(y, pairs)])
    for instruction, bits in ((builder.shl, 16), (builder.and_, -65536)):
        z = fused(builder, *(builder.bitcast(instruction(part, constant(bits)), FLOATS) for part in (x, y)), z)
    return z


def narrowed(builder, x):
    """Lanes rounded to bfloat16: the nearest, ties to even; what is no number stays none.

    The instruction for it, where there is one, makes 0 of what is below the least normal number.
    """
    if PAIRED:
        kind = ir.FunctionType(ir.VectorType(_BFloat(), WIDTH), [FLOATS])
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        return builder.bitcast(builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x]), SHORTS)
    bits = builder.bitcast(x, INTS)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    near = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    quiet = builder.or_(bits, constant(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", x, x), quiet, near)
    return builder.trunc(builder.lshr(chosen, constant(16)), SHORTS)


def ask(builder, address, nearness=3):
    """Have a line of memory, `LINE` bytes, brought into the caches: 3 for all of them, 2 for those behind the first."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(hint, [builder.inttoptr(address, byte), *(ir.Constant(INT, value) for value in (0, nearness, 1))])


def totals(builder, sums):
    """What `total` makes of each of 2ⁿ vectors of lanes, side by side."""
    width = WIDTH
    while width > 1:
        width //= 2
        pairs = list(zip(sums[::2], sums[1::2], strict=True)) if len(sums) > 1 else [(sums[0], sums[0])]
        sums = [builder.fadd(*(_half(builder, pair, width, part) for part in (0, 1))) for pair in pairs]
    return sums[0]


def _half(builder, pair, width, part):
    """The lower or upper `width` lanes of every 2·width of two vectors, or of one that is both."""
    count = pair[0].type.count * (1 if pair[0] is pair[1] else 2)
    lanes = [i for i in range(count) if i // width % 2 == part]
    return builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))


def zipped(builder, left, right, count=1):
    """`count` lanes of one, as many of the other, and so on: the first half of them and the last."""
    width = left.type.count
    lanes = [start + i for at in range(0, width, count) for start in (at, at + width) for i in range(count)]
    halves = (lanes[:width], lanes[width:])
    return [builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(INT, width), half)) for half in halves]


def constant(value):
    return ir.Constant(INTS, [value] * WIDTH)


def splatted(builder, value, kind):
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * WIDTH))


def folded(builder, x, combine):
    width = WIDTH
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(INT, width), list(range(start, start + width))))
            for start in (0, width)
        )
        x = combine(low, high)
    return builder.extract_element(x, ir.Constant(INT, 0))
