"""How kernels built on `row_product` are launched: pure rules from shapes and architecture.

Whatever fixes a sum's order, a product's steps and their parts, is a function of the weight's shape, the dtype and the
architecture, and never of the number of rows, the batch or the context: that is the row-invariance of the numerics
contract. With fast numerics, a tile of None, it may follow them.
"""

from typing import NamedTuple

from .launch import DECODE_TILE, PROCESSORS, PRODUCT_REGISTERS, padded, tile_of

LARGE_WEIGHT = 8192
VOCABULARY = 65536
STEP_BYTES = 32 * 1024
LONG_STEP_ROWS = 16
WIDE_WEIGHT = 2048
WIDE_STEP_ROWS = 8
MANY_ROWS = 64
TWO_PROGRAM_ROWS = 32
RUN = 64
LONG_WEIGHT = 8
FLIGHT_BYTES = 72 * 1024
# Columns of a part of eight bits that threads hold as two operands of an instruction; fewer go through registers.
LIGHT_RUN = 32
# Of a thread's registers, beside which it holds a chunk of weights and one of activations.
SUMS = 64
# What a program may take of shared memory: on some chips more than on others, which end at SHARED_BYTES.
SHARED_BYTES = 99 * 1024
ROOM = {80: 160 * 1024, 90: 200 * 1024, 100: 200 * 1024, 103: 200 * 1024}
REGISTERS = 65536
ENOUGH_PROGRAMS = 96


class ProductRule(NamedTuple):
    """Parameters of a kernel built on `row_product`: weight rows and columns a step, rows of activations, launch.

    most_parts: that a step may have; registers: what a thread may take; run: columns of each part that are loaded at
    once, None being all; norm_apart: a launch of its own computes the norm (`weighed`).
    """

    block_n: int
    block_k: int
    rows: int
    warps: int
    stages: int
    most_parts: int = 4
    registers: int = PRODUCT_REGISTERS
    run: int | None = None
    norm_apart: bool = False

    @property
    def parts(self) -> int:
        """Parts a step's columns are dealt to the warps in, each summed by itself; short steps are one part."""
        return min(self.most_parts, self.block_k // 16) if self.block_k >= 64 else 1

    @property
    def chunk(self) -> int:
        """Columns of a step that are loaded at once."""
        return self.block_k if self.run is None else min(self.block_k, self.parts * self.run)

    @property
    def sums(self) -> int:
        """Of a thread: an element of the result is summed in each part."""
        return self.block_n * self.rows * self.parts // (32 * self.warps)

    def light(self, columns: int, itemsize: int) -> "ProductRule":
        """This rule for a weight of eight bits against activations of `itemsize` bytes.

        A step keeps its columns, since it takes as many registers once it is widened, unless a part has too few of them
        (LIGHT_RUN). Instead more chunks are on their way, as many bytes of weights, where SHARED_BYTES have room for
        them, or what this rule takes anyway. Beside SUMS of a thread there is no room to widen as much, or half of it
        against MANY_ROWS: half the rows are taken; nor for anything in half its registers: it may take all.
        """
        ahead = self.stages - 1
        room = max(SHARED_BYTES, ahead * (self.block_n + self.rows) * self.chunk * itemsize)
        rule = self
        if self.parts > 1:
            run = None if self.run is None else max(self.run, LIGHT_RUN)
            rule = self._replace(block_k=max(self.block_k, self.parts * LIGHT_RUN), most_parts=self.parts, run=run)
        widened = rule.block_n * rule.chunk // (32 * rule.warps)
        if rule.sums >= SUMS and widened >= (SUMS if rule.rows >= MANY_ROWS else 2 * SUMS):
            rule = rule._replace(rows=rule.rows // 2)
        if rule.sums >= SUMS:
            rule = rule._replace(registers=PRODUCT_REGISTERS)
        fit = room // ((rule.block_n + rule.rows * itemsize) * rule.chunk)
        more = min(2 * ahead * self.chunk // rule.chunk, fit, -(-padded(columns) // rule.chunk) - 1)
        return rule._replace(stages=1 + max(1, more))


def product_rule(
    weight_rows: int,
    columns: int,
    rows: int,
    tile: int | None,
    itemsize: int,
    arch: int,
    *,
    normed: bool = True,
    short: bool = False,
    summed: bool = False,
) -> ProductRule:
    """The rule of `row_product` for a weight [weight_rows, columns] against passes of `rows` rows in tiles of `tile`.

    The order of a sum is fixed by the columns of a step, block_k, and its parts: a part is one chain of products of 16
    columns through all steps, and at the end parts are added in pairs. Both follow from the weight and the tile alone.
    What one program takes, block_n and `rows`, fixes nothing, as columns of an instruction are independent, nor does
    what is loaded at once; these follow the power of two that the rows of the pass do not exceed, so that few kernels
    are compiled. The interpreter's products are not independent, so there the rows are the tile. Tiles of 8 stream the
    weight, wider ones compute. `normed`: a norm comes before, which reads all columns first. `short`: a loop for the
    norm's statistics comes before the product's, and registers hold no long step in both. `summed`: the kernel also
    sums over the weight rows of a program, which therefore do not follow `rows`.
    """
    width = padded(columns)
    if arch == 0:
        wide = tile or min(64, max(8, _power(rows)))
        return ProductRule(64, _dividing(width, 128), wide, 4, 1, norm_apart=rows > LONG_STEP_ROWS)
    if tile_of(rows, tile) > DECODE_TILE:
        return _computed(weight_rows, width, rows, tile_of(rows, tile), itemsize)
    large = weight_rows >= LARGE_WEIGHT
    reach = _reach(width, normed)
    rule = _streamed(weight_rows, width, reach, rows, itemsize, large=large, short=short or itemsize == 4)
    if arch in ROOM and large:
        rule = _broad(rule, weight_rows, width, itemsize)
    elif arch in ROOM:
        rule = _alone(rule, weight_rows, width, reach, itemsize, ROOM[arch])
    blocks = (rule.block_n,) if summed else (64, 32, 16)
    return _shared_out(rule, (weight_rows, width), rows, itemsize, arch, blocks, summed=summed)


def _streamed(
    weight_rows: int, width: int, reach: int, rows: int, itemsize: int, *, large: bool, short: bool
) -> ProductRule:
    """Steps so long that one or two programs keep a processor's share of the memory busy.

    With the room in shared memory that they take, programs of the next kernel, which start while these run, spread over
    all processors. The steps of a small weight are no longer than `reach`, which may be past its width.
    Registers hold a long step against LONG_STEP_ROWS rows; `short` steps leave room for float32.

    Eight warps share a step where each has a part of it, or they would repeat each other's products.
    """
    block_n = 32 if large else 16
    longest = (STEP_BYTES // 4 if short else STEP_BYTES) // (block_n * itemsize)
    block_k = _dividing(width, longest) if large or short else min(longest, reach)
    wide = min(LONG_STEP_ROWS, max(8, _power(rows)))
    steps, alone = -(-width // block_k), weight_rows <= block_n * PROCESSORS
    buffers = (2 if alone or steps >= LONG_WEIGHT else 1) * STEP_BYTES // (block_n * block_k * itemsize)
    room = SHARED_BYTES // ((block_n + wide) * block_k * itemsize)
    stages = 1 + max(1, min(buffers, room, steps - 1, 3))
    rule = ProductRule(block_n, block_k, wide, 4, stages, 4 if short else 8)
    if wide <= 8 or rule.parts < 8:
        return rule
    return rule._replace(warps=8)


def _broad(rule: ProductRule, weight_rows: int, width: int, itemsize: int) -> ProductRule:
    """Twice the weight rows a program: half as many programs read the same activations out of the same cache lines.

    Those of a vocabulary take eight steps. What is in flight is 64 KiB in either case.
    """
    if rule.parts < 8 or width < WIDE_WEIGHT or rule.block_n * rule.block_k * itemsize < STEP_BYTES:
        return rule
    block_n = 2 * rule.block_n
    block_k = min(rule.block_k, _power(width // 8 + 1) // 2) if weight_rows >= VOCABULARY else rule.block_k
    return rule._replace(block_n=block_n, block_k=block_k, stages=1 + 2 * STEP_BYTES // (block_n * block_k * itemsize))


def _alone(rule: ProductRule, weight_rows: int, width: int, reach: int, itemsize: int, room: int) -> ProductRule:
    """Steps of 64 KiB for programs that have a processor each, and as many on their way where there is room for two.

    Twice the weight rows a program, or else columns, up to `reach`. Eight warps hold the step.
    """
    block_n = rule.block_n
    if weight_rows > PROCESSORS * block_n and weight_rows >= 2 * ENOUGH_PROGRAMS * block_n:
        block_n *= 2
    block_k = min(reach, 2 * STEP_BYTES // (block_n * itemsize))
    if rule.parts < 8 or weight_rows > PROCESSORS * block_n or block_n * block_k <= rule.block_n * rule.block_k:
        return rule
    buffers = min(2, -(-width // block_k) - 1, room // ((block_n + rule.rows) * block_k * itemsize))
    return rule._replace(block_n=block_n, block_k=block_k, warps=8, stages=1 + max(1, buffers))


def _reach(width: int, normed: bool) -> int:
    """The longest step for so many columns: past them by no more than half, unless a norm is to see all of them."""
    power = _power(width)
    return power if normed or 2 * power <= 3 * width else power // 2


def whole_steps(width: int) -> int:
    """The rows that whole steps of a weight of so many columns are loaded against."""
    return WIDE_STEP_ROWS if width >= WIDE_WEIGHT else LONG_STEP_ROWS


def _shared_out(
    rule: ProductRule,
    shape: tuple[int, int],
    rows: int,
    itemsize: int,
    arch: int,
    blocks: tuple[int, ...],
    summed: bool,
) -> ProductRule:
    """The rule for passes of `rows` rows: in 16 bits more than `whole_steps` of them share one reading of the weight.

    For every byte of a weight programs together read ⌈rows ÷ wide⌉ bytes of it and rows ÷ block_n of activations, most
    of them from the L2 cache. Both shrink as blocks widen: to the first of `blocks` that leaves most processors a
    program, registers for the sums of every part, and room for two chunks of the step. Chunks are as long as the room
    allows: runs of a whole cache line, if it does, and of two for few rows of a small weight.

    A processor holds two programs of eight warps of a large weight, which has that many; in the registers this leaves,
    all spill on sm_100, which has no limit. `summed`: sums over weight rows, as the LM head has them, leave one block
    to choose, which takes twice the rows for it.
    """
    weight_rows, width = shape
    large = weight_rows >= LARGE_WEIGHT
    two = large and rule.warps == 8
    registers = REGISTERS // (2 * 32 * 8) if arch < 100 else PRODUCT_REGISTERS
    if rows <= whole_steps(width) or itemsize == 4:
        return rule._replace(registers=registers) if two else rule
    room, warps = ROOM.get(arch, SHARED_BYTES), max(4, rule.parts)
    sums = (2 * SUMS if summed else SUMS) * 32 * warps // rule.parts
    wide = min(MANY_ROWS, _power(rows), sums // min(blocks))
    rule = rule._replace(rows=wide, warps=warps, norm_apart=True)
    most = max(sums // wide, min(blocks))
    longest = RUN // 2 if summed and wide > TWO_PROGRAM_ROWS else RUN
    fits: dict[int, int] = {}
    for run in (longest, longest // 2, longest // 4):
        rule = rule._replace(run=run)
        chunks = {n: room // ((n + wide) * rule.chunk * itemsize) for n in blocks if n <= most}
        fits = {n: count for n, count in chunks.items() if count >= 2}
        if fits:
            break
    block_n = next((n for n in fits if weight_rows // n * _power(rows) // wide >= ENOUGH_PROGRAMS), min(fits))
    rule = rule._replace(block_n=block_n, stages=1 + min(2 if summed else 3, fits[block_n]))
    if two and wide <= TWO_PROGRAM_ROWS:
        return _by_two(rule, itemsize, room, registers, summed=summed)
    return rule if large or wide > LONG_STEP_ROWS else _longer_runs(rule, itemsize, room)


def _by_two(rule: ProductRule, itemsize: int, room: int, registers: int, *, summed: bool) -> ProductRule:
    """Two programs on a processor, of half the weight rows where these are free, or with room for two chunks."""
    block_n = rule.block_n if summed else min(rule.block_n, 32)
    chunks = room // (2 * (block_n + rule.rows) * rule.chunk * itemsize)
    if summed and chunks < 2:
        return rule
    return rule._replace(block_n=block_n, stages=1 + max(1, min(2, chunks)), registers=registers)


def _longer_runs(rule: ProductRule, itemsize: int, room: int) -> ProductRule:
    """Runs of two cache lines, where there is room for three chunks of them."""
    longer = rule._replace(run=2 * RUN, stages=4)
    chunks = room // ((rule.block_n + rule.rows) * longer.chunk * itemsize)
    return longer if rule.run == RUN and chunks >= 3 else rule


def _computed(weight_rows: int, width: int, rows: int, tile: int, itemsize: int) -> ProductRule:
    """Steps of one part, and blocks as large as leave most processors a program (`_shared_out`)."""
    if itemsize == 4:
        block_n, longest, wide = 32, 16, tile
    else:
        most = max(tile, _power(rows))
        sizes = [size for size in ((128, 128), (128, 64), (64, 128), (64, 64)) if size[1] <= most]
        enough = (size for size in sizes if weight_rows // size[0] * most // size[1] >= ENOUGH_PROGRAMS)
        (block_n, wide), longest = next(enough, sizes[-1]), 64
    block_k = _dividing(width, longest)
    resident = -(-weight_rows // (block_n * PROCESSORS))
    steps = max(3, -(-FLIGHT_BYTES // (block_n * block_k * itemsize * resident)))
    room = SHARED_BYTES // ((block_n + wide) * block_k * itemsize)
    warps, stages = 8 if block_n * wide > 128 * 64 else 4, min(steps + 1, room, 8)
    return ProductRule(block_n, block_k, wide, warps, stages, most_parts=1, norm_apart=True)


def _dividing(width: int, longest: int) -> int:
    """The longest step, a power of two, that divides a weight's columns, a multiple of 16."""
    return min(longest, width & -width)


def _power(rows: int) -> int:
    """The power of two that is not below `rows`."""
    return 1 << (rows - 1).bit_length()


def projection_rule(
    head_dim: int,
    whole: bool,
    weight_rows: int,
    columns: int,
    rows: int,
    tile: int | None,
    itemsize: int,
    arch: int,
    *,
    short: bool = False,
) -> ProductRule:
    """`product_rule` for rows of one attention head in block_n / 2 pairs half a head apart; `whole`: all its pairs.

    Steps that are loaded at once take no more than 8 rows a program: what the rotation holds leaves no registers for
    them. Whole heads take 16 of many.
    """
    tile, width = tile_of(rows, tile), padded(columns)
    rule = product_rule(weight_rows, columns, rows, tile, itemsize, arch, short=short)
    pairs = max(8, 1 << (head_dim // 2 - 1).bit_length())
    if arch and tile <= DECODE_TILE:
        large = width % 512 == 0 and weight_rows >= 32 * PROCESSORS
        reach = _reach(width, normed=True)
        rule = _streamed(weight_rows, width, reach, tile, itemsize, large=large, short=short or itemsize == 4)
        if whole:
            rule = rule._replace(block_k=min(rule.block_k, 128 // itemsize))
        blocks = tuple(n for n in (64, 32, 16) if n <= 2 * pairs)
        rule = rule._replace(most_parts=4)
        rule = _shared_out(rule, (weight_rows, width), rows, itemsize, arch, blocks, summed=False)
    if not whole:
        return rule._replace(block_n=min(rule.block_n, 2 * pairs))
    block_k = min(rule.block_k, 128 // itemsize)
    wide = min(rule.rows, 32 // itemsize if tile <= DECODE_TILE else 128 // itemsize) if arch else tile
    room = SHARED_BYTES // ((2 * pairs + wide) * block_k * itemsize)
    stages = min(room, 8) if arch else 1
    warps = 8 if tile > DECODE_TILE and itemsize == 2 and 2 * pairs * wide > 64 * 64 else rule.warps
    return rule._replace(block_n=2 * pairs, block_k=block_k, rows=wide, warps=warps, stages=stages)


def route_rule(
    weight_rows: int, columns: int, rows: int, tile: int | None, itemsize: int, arch: int, *, short: bool = False
) -> ProductRule:
    """`product_rule` in the narrowest blocks: a router has few weight rows, and few programs stream them.

    One rule for all numbers of rows: the kernel sums over its columns in an order that follows the launch.
    """
    tile = tile_of(rows, tile)
    rule = product_rule(weight_rows, columns, min(rows, tile), tile, itemsize, arch, short=short)
    return rule._replace(block_n=16, block_k=min(rule.block_k, 128 if short else 512), most_parts=4, warps=4)
