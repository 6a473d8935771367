"""First figures of a GPU: measured bandwidth, the kernels of a layer one by one, and whole steps.

A step is one captured graph of the model's pass and its head. A kernel's figure is one graph of that kernel launched
for every layer in turn, so that its weights come from memory as far as all layers together exceed the L2 cache:
`loop_bytes` says how many there are. Bytes are those a launch cannot avoid, over the copy bandwidth measured first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import attention_rules, launch, product_rules
from ..kernels.ops import select
from ..kernels.values import Matrix, Slots, Split
from ..loaders.config import ModelConfig
from ..loaders.synthetic import synthetic_config, synthetic_weights
from ..loaders.weights import Weights
from ..runtime.cache import KVCache
from ..runtime.model import Model
from ..runtime.plan import LayerPlan
from ..runtime.rows import Chains
from .clock import Spread, bandwidth, sampler
from .passes import chain_after
from .passes import step as pass_of

CONTEXT, DRY_CONTEXT = 512, 16
DRY_FIELDS = {"num_hidden_layers": 5, "vocab_size": 256}
SAMPLES = 20
FEW_ROWS = (1, 8, 16)
ROWS = (*FEW_ROWS, 32, 64)


@dataclass(frozen=True)
class Figure:
    """One measured time, seconds; None in a dry run. `share` is bytes ÷ time ÷ copy bandwidth."""

    name: str
    shape: str
    rows: int
    median: float | None
    p10: float | None
    p90: float | None
    bytes: int
    loop_bytes: int
    share: float | None
    note: str = ""


class Bed(NamedTuple):
    """A model of a named shape on the Triton table, and a cache whose first `context` positions hold random values."""

    shape: str
    model: Model
    weights: Weights
    cache: KVCache
    pages: list[int]
    context: int

    @staticmethod
    def of(shape: str, device: torch.device, dry: bool, layers: int | None = None) -> Bed:
        """Random weights, bfloat16, float32 in a dry run; of `layers` layers where that is given."""
        context = DRY_CONTEXT if dry else CONTEXT
        fields = synthetic_config(shape) | (DRY_FIELDS if dry else {})
        config = ModelConfig.parse(fields | ({"num_hidden_layers": layers} if layers else {}), shape)
        weights = synthetic_weights(config, 0, torch.float32 if dry else torch.bfloat16, device=device)
        model = Model(config, weights, select("triton"))
        cache = model.new_cache(-(-(context + max(ROWS)) // model.ops.page_size) + 1)
        pages = cache.reserve(context + max(ROWS))
        for tensor in (cache.keys, cache.values):
            tensor[:, pages] = torch.randn_like(tensor[:, pages])
        return Bed(shape, model, weights, cache, pages, context)

    def chain(self, count: int) -> Chains:
        """`count` new tokens of the one sequence, after its context."""
        return chain_after(self.model, self.pages, self.context, count)

    def step(self, count: int, plan: LayerPlan | None = None) -> Callable[[], object]:
        """A pass of `count` rows with its head."""
        return pass_of(self.model, self.cache, self.chain(count), plan or self.model.full)

    @property
    def step_bytes(self) -> int:
        """What a full step cannot avoid reading."""
        return weight_bytes(self.weights) + kv_bytes(self.model, self.context)


def figures(device: torch.device, shapes: Iterable[str], dry: bool) -> Iterator[Figure]:
    """Bandwidth, then kernels and steps of every shape."""
    clock = Clock(device, dry)
    copied = clock.bandwidth()
    for name, rate in copied.items():
        yield Figure(f"{name} bandwidth", "", 0, rate, None, None, 0, 0, None, "bytes per second")
    copy = copied.get("copy")
    for shape in shapes:
        bed = Bed.of(shape, device, dry)
        yield from _kernels(clock, bed, copy)
        yield from _steps(clock, bed, copy)
        yield from _ablations(clock, bed)


def _steps(clock: Clock, bed: Bed, copy: float | None) -> Iterator[Figure]:
    first: float | None = None
    for count in ROWS:
        total = bed.step_bytes
        times = clock.times(bed.step(count))
        first = times[0] if count == 1 else first
        note = "" if first is None or times[0] is None else f"÷ decode(1) {times[0] / first:.3f}"
        if count == 1 and times[0] is not None and copy:
            bubble = bubble_per_layer(times[0], total, copy, bed.model.config.num_layers)
            note = f"{1 / times[0]:.0f} tokens/s, bubble {bubble * 1e6:.1f} µs per layer"
        yield Figure("step", bed.shape, count, *times, total, total, _share(total, times[0], copy), note)


def _ablations(clock: Clock, bed: Bed) -> Iterator[Figure]:
    """What a change makes of a step, each timed after the same step without it."""
    fast = bed._replace(model=Model(bed.model.config, bed.weights, select("triton", "fast")))
    for name, other, count, constant in (
        *(("fast", fast, count, None) for count in (1, 16)),
        ("nothing ahead", bed, 1, (launch, "AHEAD_BYTES", 0)),
        ("ahead of any weight", bed, 1, (launch, "AHEAD_OF", 1 << 40)),
        ("whole steps", bed, 16, (product_rules, "WIDE_WEIGHT", 1 << 30)),
        ("attention of 32", bed, 8, (attention_rules, "FEW_ROWS", 0)),
        ("attention of 16", bed, 16, (attention_rules, "FEW_ROWS", 16)),
    ):
        before = clock.times(bed.step(count))
        with _set(constant):
            times = clock.times(other.step(count))
        note = "" if before[0] is None or times[0] is None else f"÷ without {times[0] / before[0]:.3f}"
        yield Figure(f"step, {name}", bed.shape, count, *times, bed.step_bytes, bed.step_bytes, None, note)


@contextmanager
def _set(constant: tuple[ModuleType, str, int] | None) -> Generator[None]:
    """A constant of the launch rules has another value."""
    if constant is None:
        yield
        return
    module, name, value = constant
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)


def bubble_per_layer(seconds: float, read: int, bandwidth: float, layers: int) -> float:
    """What a token's time exceeds that of reading its bytes by, seconds for each layer."""
    return (seconds - read / bandwidth) / layers


class Launch(NamedTuple):
    """One kernel for layer i, the bytes it cannot avoid, and the layers there are."""

    run: Callable[[int], object]
    bytes: int
    layers: int


def _kernels(clock: Clock, bed: Bed, copy: float | None) -> Iterator[Figure]:
    for count in FEW_ROWS:
        for name, kernel in launches(bed, count).items():

            def loop(kernel: Launch = kernel) -> None:
                for i in range(kernel.layers):
                    kernel.run(i)

            times = clock.times(loop, kernel.layers)
            share = _share(kernel.bytes, times[0], copy)
            yield Figure(name, bed.shape, count, *times, kernel.bytes, kernel.bytes * kernel.layers, share)


def launches(bed: Bed, count: int) -> dict[str, Launch]:
    """The kernels of a layer, and the head, for `count` rows after a context."""
    model, cache = bed.model, bed.cache
    config, ops, tile, layers = model.config, model.ops, model.ops.decode_tile, model.layers
    rows = bed.chain(count).spread()
    slots = Slots(*rows.slots(cache.page_size))
    index = ops.index(rows.sequence, rows.position, rows.block_table, page_size=cache.page_size, tile=tile, width=count)
    rope = model.rotations(rows, cache)

    def randn(*shape: int) -> Tensor:
        return torch.randn(len(rows), *shape, device=model.device, dtype=model.dtype)

    x, q, inner = randn(config.hidden_size), randn(config.num_heads, config.head_dim), randn(config.intermediate_size)
    mixed = q.flatten(1)

    def qkv(i: int) -> None:
        layer = layers[i]
        ops.qkv_rope_append(
            x, layer.attention_norm, layer.qkv, layer.qkv_bias, layer.q_norm, layer.k_norm, rope,
            cache.keys[i], cache.values[i], slots, heads=config.num_heads, tile=tile,
        )  # fmt: skip

    def attend(i: int) -> None:
        ops.attend(q, cache.keys[i], cache.values[i], index, scale=config.head_dim**-0.5)

    def output(i: int) -> None:
        ops.linear(mixed, layers[i].output, tile=tile, residual=x)

    def up(i: int) -> None:
        ops.linear(x, layers[i].up, tile=tile, norm=layers[i].mlp_norm, activation="silu_gate")

    def down(i: int) -> None:
        ops.linear(inner, layers[i].down, tile=tile, residual=x)

    def head(_: int) -> None:
        model.predict(x)

    def size(matrix: Matrix | Split) -> int:
        return matrix.rows * matrix.columns * x.element_size()

    number, first = config.num_layers, layers[0]
    return {
        "qkv": Launch(qkv, size(first.qkv), number),
        "attend": Launch(attend, kv_bytes(model, bed.context) // number, number),
        "output": Launch(output, size(first.output), number),
        "up": Launch(up, size(first.up), number),
        "down": Launch(down, size(first.down), number),
        "head": Launch(head, config.vocab_size * config.hidden_size * x.element_size(), 1),
    }


Times = tuple[float, float, float] | tuple[None, None, None]


@dataclass(frozen=True)
class Clock:
    """Median, 10th and 90th percentile of a captured graph; in a dry run functions are only called."""

    device: torch.device
    dry: bool

    def bandwidth(self) -> dict[str, float]:
        return {} if self.dry else bandwidth(self.device)

    def times(self, function: Callable[[], Any], calls: int = 1, samples: int = SAMPLES) -> Times:
        """Seconds of one of the `calls` that `function` makes."""
        if self.dry:
            with torch.inference_mode():
                function()
            return None, None, None
        sample = sampler(function, self.device, calls=calls)
        spread = Spread.of(sample() for _ in range(samples))
        return spread.median, spread.p10, spread.p90


def weight_bytes(weights: Weights) -> int:
    """What a pass reads: every layer and the head; of an embedding that is not the head, a row at most."""
    parts = (weights.qkv, weights.output, weights.up, weights.down, weights.head)
    return sum(part.numel() * part.element_size() for part in parts)


def kv_bytes(model: Model, context: int) -> int:
    """Keys and values of `context` positions in every layer."""
    config, size = model.config, model.dtype.itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * size


def _share(total: int, seconds: float | None, copy: float | None) -> float | None:
    return None if seconds is None or not copy else total / seconds / copy
