"""Steps of a product through a panel (`panel_kernels`): sums of rows, and what a column adds to them."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .instructions import (
    FLOAT,
    FLOATS,
    INTS,
    LINE,
    LONG,
    MANY_REGISTERS,
    WIDTH,
    ask,
    constant,
    fused,
    load,
    paired,
    splatted,
)
from .lanes import LANES

VECTORS = 3
PANEL = VECTORS * WIDTH
# Of a step: a column of float32, a pair of columns of bfloat16, or `LIGHT` columns of eight bits.
STEP_BYTES = 4 * PANEL
LIGHT = 4
# Sums of that many rows fit into the registers beside a column of a panel and one number; of bfloat16, where a pair is
# two numbers, those of so many beside a vector of a column.
MOST, MOST_OF_A_VECTOR = (9, 0) if MANY_REGISTERS else (2, 4)
# The fewest rows that ask for memory ahead: the arithmetic of fewer leaves the processor's own prefetching time enough,
# and asking takes it.
_ASKING = 7 if MANY_REGISTERS else 2


def _sums(vectors):
    """An intrinsic for the sums before the first column, of so many vectors a row."""

    @intrinsic(prefer_literal=True)
    def none(context, rows):
        kind = types.UniTuple(LANES, vectors * rows.literal_value)

        def build(context, builder, signature, given):
            return ir.Constant(context.get_value_type(kind), None)

        return kind(rows), build

    return none


none, none_of_a_vector = _sums(VECTORS), _sums(1)


def _step(kind, added, asking, vectors=VECTORS):
    """An intrinsic that goes on with sums by the column, or pair of them, at the addresses of a panel and of x.

    It takes so many vectors of the column. As many bytes as all have are asked for at `ahead`, from `asking` rows on.
    """

    @intrinsic
    def step(context, sums, panel, x, stride, ahead):
        def build(context, builder, signature, given):
            sums, panel, x, stride, ahead = given
            found = sums
            rows = signature.args[0].count // vectors
            weights = [load(builder, panel, 4 * WIDTH * i, kind) for i in range(vectors)]
            for start in range(0, STEP_BYTES if rows >= asking else 0, LINE):
                ask(builder, builder.add(ahead, ir.Constant(LONG, start)), nearness=2)
            for row in range(rows):
                at = builder.add(x, builder.mul(stride, ir.Constant(LONG, row)))
                value = splatted(builder, load(builder, at, 0, kind.element), kind)
                for i, weight in enumerate(weights):
                    place = vectors * row + i
                    total = added(builder, weight, value, builder.extract_value(sums, place))
                    found = builder.insert_value(found, total, place)
            return found

        return sums(sums, types.int64, types.int64, types.int64, types.int64), build

    return step


with_column, with_pair = _step(FLOATS, fused, _ASKING), _step(INTS, paired, _ASKING)
column_and_more, pair_and_more = _step(FLOATS, fused, 1), _step(INTS, paired, 1)


@intrinsic
def next_digits(context, x):
    """The lane after each, of every `LIGHT` lanes by themselves; 0 after the last."""

    def build(context, builder, signature, given):
        after = [i + 1 if (i + 1) % LIGHT else WIDTH for i in range(WIDTH)]
        none = ir.Constant(FLOATS, [0.0] * WIDTH)
        return builder.shuffle_vector(given[0], none, ir.Constant(INTS, after))

    return LANES(LANES), build


@intrinsic
def with_light(context, sums, panel, x, stride, ahead):
    """As `_step`, with `LIGHT` columns of eight bits, digits of a whole number in base 256; asks ahead.

    Shifted left by 24, 16, 8 and 0 bits and made float32, the number is 2²⁴ times the first digit, the second and 1/256
    of the first, and so on: `panel_kernels.spread` has taken from x what is too much. Only the last is rounded, by less
    than 2⁻¹⁷ of a digit.
    """

    def build(context, builder, signature, given):
        sums, panel, x, stride, ahead = given
        rows = signature.args[0].count // VECTORS
        for start in range(0, STEP_BYTES, LINE):
            ask(builder, builder.add(ahead, ir.Constant(LONG, start)), nearness=2)
        joined = [load(builder, panel, 4 * WIDTH * i, INTS) for i in range(VECTORS)]
        for digit in range(LIGHT):
            shift = constant(8 * (LIGHT - 1 - digit))
            weights = [builder.sitofp(builder.shl(number, shift), FLOATS) for number in joined]
            for row in range(rows):
                at = builder.add(x, builder.mul(stride, ir.Constant(LONG, row)))
                value = splatted(builder, load(builder, at, 4 * digit, FLOAT), FLOATS)
                for place, weight in enumerate(weights, VECTORS * row):
                    total = fused(builder, weight, value, builder.extract_value(sums, place))
                    sums = builder.insert_value(sums, total, place)
        return sums

    return sums(sums, types.int64, types.int64, types.int64, types.int64), build


# The first vector of a column asks for all of them, the others for nothing.
vector_and_more, with_vector = _step(INTS, paired, 1, 1), _step(INTS, paired, MOST_OF_A_VECTOR + 1, 1)


def _store(apart):
    """An intrinsic that puts sums to memory, vectors so many bytes apart."""

    @intrinsic
    def put(context, sums, address):
        def build(context, builder, signature, given):
            sums, address = given
            for i in range(signature.args[0].count):
                at = builder.add(address, ir.Constant(LONG, apart * i))
                builder.store(builder.extract_value(sums, i), builder.inttoptr(at, FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(sums, types.int64), build

    return put


put, put_vectors = _store(4 * WIDTH), _store(STEP_BYTES)


@intrinsic
def take_vectors(context, sums, address):
    """What `put_vectors` put there, as many as `sums`."""

    def build(context, builder, signature, given):
        sums, address = given
        for i in range(signature.args[0].count):
            sums = builder.insert_value(sums, load(builder, address, STEP_BYTES * i, FLOATS), i)
        return sums

    return sums(sums, types.int64), build
