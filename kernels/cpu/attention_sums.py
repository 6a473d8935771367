"""Sums of attention in the registers of a CPU: of a few queries with a few keys, and of a few queries' weighed values.

Queries, weights and the like are given by a tuple of addresses, whose length says how many there are.
"""

from itertools import product

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .instructions import (
    FLOATS,
    INT,
    INTS,
    LINE,
    LONG,
    MANY_REGISTERS,
    WIDTH,
    ask,
    fused,
    load,
    paired,
    splatted,
    totals,
)
from .lanes import LANES

# How many queries, keys, and vectors of a value are taken together: the sums of each with each fit into the registers.
FEW = 4 if MANY_REGISTERS else 2
# How many positions ahead memory is asked for keys and values: the processor does not see where the next page is.
AHEAD = 16


@intrinsic(prefer_literal=True)
def listed(context, count, address):
    """The `count` int64 from an address on."""
    kind = types.UniTuple(types.int64, count.literal_value)

    def build(context, builder, signature, given):
        return context.make_tuple(builder, kind, [load(builder, given[1], 8 * i, LONG) for i in range(kind.count)])

    return kind(count, address), build


@intrinsic
def no_products(context, queries):
    """The sums of some queries with a few keys before the first column."""
    kind = types.UniTuple(LANES, FEW * queries.count)
    return kind(queries), lambda context, builder, signature, given: ir.Constant(context.get_value_type(kind), None)


def _scoring(vector, added):
    """An intrinsic that goes on with sums, those of a query side by side, by a vector of each query and key."""

    @intrinsic
    def step(context, sums, queries, keys, places, at):
        def build(context, builder, signature, given):
            sums, queries, keys, places, at = given
            keys = builder.add(keys, at)
            some = [builder.add(address, at) for address in _items(builder, queries)]
            for i in range(FEW):
                some.append(builder.add(keys, load(builder, places, 8 * i, LONG)))
                ask(builder, builder.add(keys, load(builder, places, 8 * (i + AHEAD), LONG)))
            count, found = signature.args[1].count, [vector(builder, address) for address in some]
            pairs = product(found[:count], found[count:])
            new = [added(builder, *pair, x) for pair, x in zip(pairs, _items(builder, sums), strict=True)]
            return context.make_tuple(builder, signature.args[0], new)

        return sums(sums, queries, types.int64, types.int64, types.int64), build

    return step


def _floats(builder, address):
    return load(builder, address, 0, FLOATS)


def _pairs(builder, address):
    """Thirty-two bfloat16, two in a lane."""
    return load(builder, address, 0, INTS)


def _few_pairs(builder, address):
    """Sixteen of them, and zeros."""
    kind = ir.VectorType(INT, WIDTH // 2)
    lanes = ir.Constant(INTS, list(range(WIDTH)))
    return builder.shuffle_vector(load(builder, address, 0, kind), ir.Constant(kind, None), lanes)


with_floats, with_pairs = _scoring(_floats, fused), _scoring(_pairs, paired)
with_few_pairs = _scoring(_few_pairs, paired)


@intrinsic
def put_totals(context, sums, addresses, at):
    """The totals of a query's sums, side by side, to its address."""

    def build(context, builder, signature, given):
        sums, addresses, at = given
        found = totals(builder, _items(builder, sums))
        for i, address in enumerate(_items(builder, addresses)):
            lanes = ir.Constant(ir.VectorType(INT, FEW), list(range(FEW * i, FEW * (i + 1))))
            _store(builder, builder.shuffle_vector(found, found, lanes), builder.add(address, at))
        return context.get_dummy_value()

    return types.void(sums, addresses, types.int64), build


@intrinsic(prefer_literal=True)
def get_sums(context, vectors, addresses, at):
    """So many vectors of each address."""
    vectors = vectors.literal_value
    kind = types.UniTuple(LANES, vectors * addresses.count)

    def build(context, builder, signature, given):
        starts = [builder.add(address, given[2]) for address in _items(builder, given[1])]
        found = [load(builder, start, 4 * WIDTH * i, FLOATS) for start in starts for i in range(vectors)]
        return context.make_tuple(builder, kind, found)

    return kind(types.literal(vectors), addresses, types.int64), build


@intrinsic
def put_sums(context, sums, addresses, at):
    """Sums to where they came from."""

    def build(context, builder, signature, given):
        sums, addresses, at = given
        places = product(_items(builder, addresses), range(signature.args[0].count // signature.args[1].count))
        for x, (address, i) in zip(_items(builder, sums), places, strict=True):
            _store(builder, x, builder.add(builder.add(address, at), ir.Constant(LONG, 4 * WIDTH * i)))
        return context.get_dummy_value()

    return types.void(sums, addresses, types.int64), build


def _mixing(size, values, added):
    """An intrinsic that goes on with sums by a few vectors of a value, or a pair of them, and what weighs them.

    The values are at two addresses; `ahead` is that of one of later positions.
    """

    @intrinsic
    def step(context, sums, weights, at, first, second, ahead):
        def build(context, builder, signature, given):
            sums, weights, at, first, second, ahead = given
            vectors = signature.args[0].count // signature.args[1].count
            for start in range(0, vectors * WIDTH * size, LINE):
                ask(builder, builder.add(ahead, ir.Constant(LONG, start)))
            found = values(builder, first, second, vectors)
            kind = found[0].type
            shares = [load(builder, builder.add(address, at), 0, kind.element) for address in _items(builder, weights)]
            pairs = product([splatted(builder, share, kind) for share in shares], found)
            new = [added(builder, *pair, x) for pair, x in zip(pairs, _items(builder, sums), strict=True)]
            return context.make_tuple(builder, signature.args[0], new)

        return sums(sums, weights, *[types.int64] * 4), build

    return step


def _single(builder, address, _, vectors):
    return [load(builder, address, 4 * WIDTH * i, FLOATS) for i in range(vectors)]


def _side_by_side(builder, first, second, vectors):
    """The bfloat16 of two values, two in a lane."""
    wide = WIDTH * (2 if vectors % 2 == 0 else 1)
    kind, found = ir.VectorType(ir.IntType(16), wide), []
    for start in range(0, vectors * WIDTH, wide):
        pair = [load(builder, address, 2 * start, kind) for address in (first, second)]
        for begin in range(0, wide, WIDTH):
            lanes = [i + other for i in range(begin, begin + WIDTH) for other in (0, wide)]
            both = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(INT, 2 * WIDTH), lanes))
            found.append(builder.bitcast(both, INTS))
    return found


with_value, with_values = _mixing(4, _single, fused), _mixing(2, _side_by_side, paired)


def _items(builder, given):
    return [builder.extract_value(given, i) for i in range(given.type.count)]


def _store(builder, x, address):
    builder.store(x, builder.inttoptr(address, x.type.as_pointer()), align=4)
