"""The fastest launch parameters of the decode kernels on the GPU at hand, to make rules of `product_rules.py` from.

They are looked for in the chain: a pass of one row, or of MANY, through a few layers as one captured graph. Kernels
overlap there, so that what is fastest alone may not be. Kernel after kernel is launched by each of its candidates in
turn and keeps the fastest while those after it have theirs; the head, of which a pass has one, is timed alone.

The rule of one row fixes the order of sums, and so the bits of a model's output. To change one is to change the
numerics of every row alike. What MANY rows are tried with is free: it changes no bit. `make gpu-check` comes after
either: nothing here looks at a result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product, starmap
from typing import Any, NamedTuple

import torch

from ..kernels import attention_rules, launch, product_rules
from ..runtime.model import Model
from .gpu_check import in_processes
from .gpu_setting import Setting
from .step import FEW_ROWS, SAMPLES, Bed, Clock, Figure, Times, launches
from .targets import SHAPES

# Enough for their weights to exceed the L2 cache several times, where the shape allows it.
LAYERS = {"135m": 10, "1b": 8, "8b": 4}
UNTIMED_LAYERS = 2
FEW_SAMPLES = 5
MANY = 16
CHAIN = ("qkv", "attend", "output", "up", "down")
KERNELS = (*CHAIN, "head")
NORMED = ("qkv", "up", "head")


class Product(NamedTuple):
    """What replaces a part of `ProductRule`: weight rows and columns of a step, stages, warps where it has fewer.

    registers: what a thread may take.
    """

    block_n: int
    block_k: int
    stages: int
    warps: int = 4
    registers: int = launch.PRODUCT_REGISTERS


class Blocks(NamedTuple):
    """What replaces a part of `ProductRule` for many rows: rows and weight rows of a program, `run`, stages, the norm.

    run 0 is None, whole steps; norm_apart says nothing where a product has no norm; registers are those of a thread.
    """

    rows: int
    block_n: int
    run: int
    stages: int
    norm_apart: bool
    registers: int = launch.PRODUCT_REGISTERS


class Attention(NamedTuple):
    """What replaces a part of `AttentionRule`: positions of a near split, and warps."""

    split: int
    warps: int


Candidate = Product | Blocks | Attention
Chosen = Mapping[str, Candidate]

# fmt: off
PRODUCTS = tuple(starmap(Product, (
    (16, 256, 3), (16, 256, 5), (16, 512, 2), (16, 512, 3), (16, 512, 4), (16, 512, 6), (16, 1024, 2), (16, 1024, 3),
    (32, 128, 5), (32, 256, 3), (32, 256, 5), (32, 512, 2), (32, 512, 3), (64, 128, 3), (64, 256, 3),
    # 64 KiB of a weight in flight before the wait, all of it where it has no more columns.
    (16, 2048, 2, 8), (32, 1024, 2, 8),
    # More of it in flight behind the wait.
    (32, 256, 4), (32, 512, 4), (64, 256, 4), (64, 512, 2), (16, 2048, 3, 8), (32, 1024, 3, 8),
    # Few programs, so that activations are read seldom.
    (64, 512, 3, 8), (64, 1024, 2, 8), (128, 512, 2, 8),
    # Two programs of eight warps on a processor.
    (32, 512, 3, 8, 128), (32, 1024, 2, 8, 128), (64, 256, 3, 8, 128), (64, 512, 2, 8, 128), (128, 256, 2, 8, 128),
)))
# fmt: on
ATTENTIONS = tuple(starmap(Attention, product((64, 128), (4, 8))))
# Of a Hopper processor's 227 KiB, less what sums over parts may take.
MOST_SHARED = 220 * 1024
# Of a thread, where a processor is to hold two programs of eight warps.
TWO_PROGRAMS = 128
DRY_PRODUCTS, DRY_ATTENTIONS = (Product(16, 32, 2),), (Attention(64, 4),)


class Timed(NamedTuple):
    """What is timed, how often it calls what a figure is for, and the bytes one of these cannot avoid."""

    run: Callable[[], object]
    calls: int
    bytes: int


def fastest(setting: Setting, rows: int = 1) -> Iterator[Figure]:
    """The time of every candidate for every shape; then the chain and whole steps, by the rules in use and as kept."""
    shapes, clock = setting.named(SHAPES), Clock(setting.device, setting.dry)
    if not setting.dry:
        for _ in in_processes(compile_candidates, list(product(shapes.values(), KERNELS, (setting,), (rows,)))):
            pass  # What does not compile is noted where it is timed.
    for label, shape in shapes.items():
        bed = Bed.of(shape, setting.device, setting.dry, UNTIMED_LAYERS if setting.dry else LAYERS[label])
        kept: dict[str, Candidate] = {}
        yield from descend(clock, bed, kept, rows)
        usual, chain = _compared(clock, bed, "chain", rows, _chain(bed, rows), kept)
        yield usual
        yield replace(chain, note="; ".join([chain.note, *(f"{kernel} {_name(own)}" for kernel, own in kept.items())]))
        bed = Bed.of(shape, setting.device, setting.dry)
        for count in _steps(rows):
            yield from _compared(clock, bed, "step", count, Timed(bed.step(count), 1, bed.step_bytes), kept)


def _steps(rows: int) -> tuple[int, ...]:
    """The rows of the steps that a rule of so many rows is for."""
    return FEW_ROWS if rows == 1 else (rows,)


def compile_candidates(shape: str, kernel: str, setting: Setting, rows: int) -> None:
    """Fill Triton's cache with a kernel by the rules in use, and by every candidate."""
    with torch.inference_mode():
        bed = Bed.of(shape, setting.device, setting.dry, UNTIMED_LAYERS)
        for count in _steps(rows):
            launches(bed, count)[kernel].run(0)
        own = launches(bed, rows)[kernel]
        for candidate in candidates(bed.model, kernel, setting.dry, rows):
            with suppress(Exception), replaced(bed.model, {kernel: candidate}):
                own.run(0)


def descend(clock: Clock, bed: Bed, kept: dict[str, Candidate], rows: int = 1) -> Iterator[Figure]:
    """The time of every candidate beside those kept so far; `kept` receives what is faster than the rule in use."""
    for kernel in KERNELS:
        timed = _head(bed, rows) if kernel == "head" else _chain(bed, rows)
        name = f"rule, {kernel} {_name(in_use(bed.model, kernel, rows))}"
        usual = best = _figure(clock, bed, name, rows, timed, kept, FEW_SAMPLES)
        yield usual
        for candidate in candidates(bed.model, kernel, clock.dry, rows):
            name, chosen = f"rule, {kernel} {_name(candidate)}", kept | {kernel: candidate}
            figure = _figure(clock, bed, name, rows, timed, chosen, FEW_SAMPLES, usual)
            if figure.median is not None and best.median is not None and figure.median < best.median:
                best, kept[kernel] = figure, candidate
            yield figure


def candidates(model: Model, kernel: str, dry: bool, rows: int = 1) -> list[Candidate]:
    """What a kernel is tried with beside the rule in use; a weight is not tried with more than its columns fill."""
    every: list[Candidate] = []
    if rows > 1:
        every += [] if kernel == "attend" else blocks(rule_of(model, kernel, rows), kernel)[: 1 if dry else None]
    elif kernel == "attend":
        every += DRY_ATTENTIONS if dry else ATTENTIONS
    else:
        columns = _weights(model)[kernel][1]
        every += [c for c in (DRY_PRODUCTS if dry else PRODUCTS) if _filled(c, columns)]
    if kernel == "qkv":
        # Its steps have four parts, which more warps would compute twice.
        every = [c for c in every if not isinstance(c, Product) or c.warps <= 4]
    return [candidate for candidate in every if candidate != in_use(model, kernel, rows)]


def blocks(rule: product_rules.ProductRule, kernel: str) -> list[Blocks]:
    """The blocks that shared memory has room for, with one buffer on its way and with as many as are of use.

    A step keeps its columns and parts, whose sums they are; a head sums over a program's weight rows and keeps those.
    Programs of 8 rows, two for each reading of the weight, take whole steps as they do where there are no more.
    """
    found: list[Blocks] = []
    normed, per_part = kernel in NORMED, rule.block_k // rule.parts
    for block_n in (rule.block_n,) if kernel == "head" else (16, 32, 64):
        for wide, run in ((8, 0), *((MANY, run) for run in (32, 64, 128, 256, 0))):
            room = MOST_SHARED // ((block_n + wide) * rule._replace(run=run or None).chunk * 2)
            # A norm inside the product sums squares in the order of whole steps.
            apart = (normed,) if run else {normed and wide > 8, False}
            for buffers, norm_apart in product({1, min(3, room)}, apart):
                if 0 < buffers <= room and run < per_part:
                    found.append(Blocks(wide, block_n, run, 1 + buffers, norm_apart))
                    if rule.parts >= 8 and 2 * buffers <= room:
                        found.append(found[-1]._replace(registers=TWO_PROGRAMS))
    return found


def rule_of(model: Model, kernel: str, rows: int) -> product_rules.ProductRule:
    """What the code says of a product's launch."""
    config, tile, size, arch = model.config, model.tile(rows), model.dtype.itemsize, launch.architecture()
    given = (*_weights(model)[kernel], rows, tile, size, arch)
    if kernel == "qkv":
        return product_rules.projection_rule(config.head_dim, config.qk_norm, *given)
    return product_rules.product_rule(*given, normed=kernel in NORMED, summed=kernel == "head")


def in_use(model: Model, kernel: str, rows: int = 1) -> Candidate:
    """What the rule in the code says, as a candidate."""
    if kernel == "attend":
        config, size, arch = model.config, model.dtype.itemsize, launch.architecture()
        group, tile = config.num_heads // config.num_kv_heads, launch.tile_of(rows, model.tile(rows))
        rule = attention_rules.attention_rule(config.head_dim, group, config.num_kv_heads, tile, size, arch, 1)
        return Attention(rule.split, rule.warps)
    rule = rule_of(model, kernel, rows)
    if rows > 1:
        run = 0 if rule.chunk == rule.block_k else rule.run or 0
        apart = rule.norm_apart and kernel in NORMED
        return Blocks(rule.rows, rule.block_n, run, rule.stages, apart, rule.registers)
    return Product(rule.block_n, rule.block_k, rule.stages, rule.warps, rule.registers)


@contextmanager
def replaced(model: Model, chosen: Chosen) -> Generator[None]:
    """Launch these kernels by these candidates and the others by the rules in use; weights are known by their shape."""
    usual = product_rules.product_rule, product_rules.projection_rule, attention_rules.attention_rule
    weights = _weights(model)
    own = {weights[kernel]: candidate for kernel, candidate in chosen.items() if not isinstance(candidate, Attention)}

    def product_rule(*given: Any, **options: Any) -> product_rules.ProductRule:
        return _with(usual[0](*given, **options), own.get(given[:2]))

    def projection_rule(*given: Any, **options: Any) -> product_rules.ProductRule:
        return _with(usual[1](*given, **options), own.get(given[2:4]))

    def attention_rule(*given: Any) -> attention_rules.AttentionRule:
        rule, candidate = usual[2](*given), chosen.get("attend")
        return rule if candidate is None else rule._replace(**candidate._asdict())

    product_rules.product_rule, product_rules.projection_rule, attention_rules.attention_rule = (
        product_rule,
        projection_rule,
        attention_rule,
    )
    try:
        yield
    finally:
        product_rules.product_rule, product_rules.projection_rule, attention_rules.attention_rule = usual


def _with(rule: product_rules.ProductRule, candidate: Product | Blocks | Attention | None) -> product_rules.ProductRule:
    if isinstance(candidate, Blocks):
        fields = candidate._asdict() | {"run": candidate.run or None, "warps": max(4, rule.parts)}
    elif isinstance(candidate, Product):
        fields = candidate._asdict() | {"warps": max(rule.warps, candidate.warps)}
    else:
        return rule
    return rule._replace(**fields)


def _filled(candidate: Product, columns: int) -> bool:
    """Whether a weight has columns for the step, and for its stages, of which the first two are always there."""
    return candidate.block_k < 2 * columns and candidate.stages <= max(2, -(-columns // candidate.block_k))


def _weights(model: Model) -> dict[str, tuple[int, int]]:
    """Rows and columns of every product's weight."""
    layer, config = model.layers[0], model.config
    own = {"qkv": layer.qkv, "output": layer.output, "up": layer.up, "down": layer.down}
    shapes = {kernel: (weight.rows, weight.columns) for kernel, weight in own.items()}
    return shapes | {"head": (config.vocab_size, config.hidden_size)}


def _chain(bed: Bed, rows: int = 1) -> Timed:
    chain, model, own = bed.chain(rows), bed.model, launches(bed, rows)

    def run() -> object:
        return model.forward(chain, bed.cache, model.full)

    return Timed(run, model.config.num_layers, sum(own[kernel].bytes for kernel in CHAIN))


def _head(bed: Bed, rows: int = 1) -> Timed:
    head = launches(bed, rows)["head"]
    return Timed(lambda: head.run(0), 1, head.bytes)


def _compared(clock: Clock, bed: Bed, what: str, rows: int, timed: Timed, kept: Chosen) -> tuple[Figure, Figure]:
    usual = _figure(clock, bed, f"{what}, rules in use", rows, timed, {}, SAMPLES)
    return usual, _figure(clock, bed, f"{what}, rules kept", rows, timed, kept, SAMPLES, usual)


def _figure(
    clock: Clock,
    bed: Bed,
    name: str,
    rows: int,
    timed: Timed,
    chosen: Chosen,
    samples: int,
    usual: Figure | None = None,
) -> Figure:
    """By these candidates; beside `usual` they may fail: some do not compile, or want too much shared memory."""
    try:
        with replaced(bed.model, chosen):
            times = clock.times(timed.run, timed.calls, samples)
    except Exception as error:
        if usual is None:
            raise
        times: Times = (None, None, None)
        note = f"does not run: {type(error).__name__}: {str(error)[:200]}"
    else:
        over = usual and usual.median and times[0] and times[0] / usual.median
        note = "in use" if usual is None else f"÷ rule in use {over:.3f}" if over else ""
    return Figure(name, bed.shape, rows, *times, timed.bytes, timed.bytes * timed.calls, None, note)


def _name(candidate: Candidate) -> str:
    fields = candidate._asdict()
    most = fields.pop("registers", launch.PRODUCT_REGISTERS)
    return "x".join(map(str, fields.values())) + ("" if most == launch.PRODUCT_REGISTERS else f"r{most}")
