"""Launches of single kernels that must give the same bits, at the shapes of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import launch
from ..kernels.ops import select
from ..kernels.primitives import wait_for_producers
from ..kernels.values import Norm, Slots
from ..loaders.config import ModelConfig
from .gpu_setting import Finding, Setting
from .op_cases import EPS, PAGE, Side

ROWS = (1, 5, 8, 16)
WIDTHS = (1, 2, 5, 8, 9, 13, 16)
SEQUENCES = (1, 2, 8)
CONTEXTS = (60, 600, 3000, 20000)
# Rounds of the long way between two kernels in a graph, and how often it is replayed.
ROUNDS, REPLAYS = 8, 250

Launch = Callable[[Tensor, bool], Mapping[str, Tensor]]


def settled(setting: Setting) -> Iterator[Finding]:
    """Kernels that read before the wait which rows are active, and their weights, against those that do after it."""
    for shape in setting.shapes + setting.large:
        side, config = _side(setting), setting.config(shape)
        different: list[str] = []
        for rows in ROWS[:2] if setting.dry else ROWS:
            masks = {"all": torch.ones(rows), "none": torch.zeros(rows), "some": torch.arange(rows) % 3 == 1}
            for name, run in _launches(side, config, rows).items():
                for label, mask in masks.items():
                    active = mask.to(side.device, torch.bool)
                    early, late = run(active, True), run(active, False)
                    different += [
                        f"{part} of {name}, {rows} rows, {label} active"
                        for part, value in early.items()
                        if not torch.equal(value, late[part])
                    ]
        yield Finding("settled", shape, not different, f"those that differ: {', '.join(different) or 'none'}")


def widths(setting: Setting) -> Iterator[Finding]:
    """A row of a chain attends with the bits it has where every sequence has one row, whatever rows are active."""
    for shape in setting.shapes + setting.large:
        different: list[str] = []
        for context, sequences in product(
            CONTEXTS[:1] if setting.dry else CONTEXTS, SEQUENCES[1:2] if setting.dry else SEQUENCES
        ):
            found = _widths_that_differ(_side(setting), setting.config(shape), context, sequences, setting.dry)
            different += [f"{width} rows of {sequences} after {context}" for width in found]
        yield Finding("widths", shape, not different, f"those that differ: {', '.join(different) or 'none'}")


def order(setting: Setting) -> Iterator[Finding]:
    """What a kernel reads before the wait was written by the one but last before it; with none between, it is not yet.

    The second half is the control: where it does not fail, the first says nothing.
    """
    side, config = _side(setting), setting.config(setting.shapes[0])
    wrong = {between: _misread(side, config, between) for between in (True, False)}
    detail = f"rounds that misread them: {wrong[True]}, without a kernel between {wrong[False]}"
    holds = wrong[True] == 0 and (wrong[False] > 0 or not launch.dependent(launch.architecture()))
    yield Finding("order", "flags written two kernels before", holds, detail)


def _side(setting: Setting) -> Side:
    dtype = setting.dtypes[0]
    return Side(select("triton"), setting.device, dtype, dtype)


def _drawn(side: Side, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=side.device, dtype=side.dtype) * scale


def _launches(side: Side, config: ModelConfig, rows: int) -> dict[str, Launch]:
    """QKV and both products after it as a function of the active rows, and of whether these are settled.

    What they give is that of rows that are active. Another kernel is launched before each.
    """
    heads, kv_heads, head_dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    inner, out = config.intermediate_size, (heads + 2 * kv_heads) * head_dim
    ops, tile = side.ops, side.ops.decode_tile
    x, wide, mixed = (_drawn(side, rows, width) for width in (hidden, inner, heads * head_dim))
    norm, rope = Norm(_drawn(side, hidden), None, EPS), side.rope(rows, head_dim, 7)
    qkv, output, up, down = (
        prepare(_drawn(side, *shape, scale=shape[1] ** -0.5))
        for prepare, shape in (
            (ops.prepare, (out, hidden)),
            (ops.prepare, (hidden, heads * head_dim)),
            (ops.prepare_gated, (2 * inner, hidden)),
            (ops.prepare, (hidden, inner)),
        )
    )
    slot = torch.arange(rows, device=side.device)
    slots = Slots(slot // PAGE, slot % PAGE)

    def project(active: Tensor, known: bool) -> Mapping[str, Tensor]:
        keys, values = (torch.zeros(1, kv_heads, PAGE, head_dim, dtype=side.dtype, device=side.device) for _ in "kv")
        ops.normalise(x, norm)
        q = ops.qkv_rope_append(
            x,
            norm,
            qkv,
            None,
            None,
            None,
            rope,
            keys,
            values,
            slots,
            heads=heads,
            tile=tile,
            active=active,
            write=active,
            settled=known,
        )
        return {"q": q[active], "keys": keys, "values": values}

    def product_of(given: Tensor, weight: Any, residual: bool, **more: Any) -> Launch:
        def run(active: Tensor, known: bool) -> Mapping[str, Tensor]:
            added = x.clone() if residual else None
            ops.normalise(x, norm)
            done = ops.linear(given, weight, tile=tile, residual=added, active=active, settled=known, **more)
            return {"result": done if residual else done[active]}

        return run

    return {
        "qkv": project,
        "output": product_of(mixed, output, True, ahead=up),
        "up": product_of(x, up, False, norm=norm, activation="silu_gate"),
        "down": product_of(wide, down, True, ahead=qkv),
    }


def _widths_that_differ(side: Side, config: ModelConfig, context: int, sequences: int, dry: bool) -> list[int]:
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    pages = -(-(context + max(WIDTHS)) // PAGE)
    table = (torch.randperm(sequences * pages) + 1).view(sequences, pages).to(side.device)
    keys, values = (_drawn(side, 1 + sequences * pages, kv_heads, PAGE, head_dim) for _ in "kv")
    number, norm = torch.arange(sequences, device=side.device), Norm(_drawn(side, head_dim), None, EPS)

    def attend(q: Tensor, first: int, width: int, active: Tensor | None = None) -> Tensor:
        position = (first + torch.arange(width, device=side.device)).repeat(sequences)
        index = side.ops.index(
            number.repeat_interleave(width), position, table, page_size=PAGE, tile=side.ops.decode_tile, width=width
        )
        side.ops.normalise(q[:, 0], norm)  # What attention reads before it waits, the kernel before has not written.
        return side.ops.attend(q, keys, values, index, scale=head_dim**-0.5, active=active)

    found: list[int] = []
    for width in WIDTHS[1::3] if dry else WIDTHS:
        q = _drawn(side, sequences, width, heads, head_dim)
        alone = torch.stack([attend(q[:, i], context + i, 1) for i in range(width)], dim=1).flatten(0, 1)
        active = torch.arange(sequences * width, device=side.device) % 3 != 1
        together, some = attend(q.flatten(0, 1), context, width), attend(q.flatten(0, 1), context, width, active)
        if not (torch.equal(together, alone) and torch.equal(some[active], alone[active])):
            found.append(width)
    return found


@triton.jit
def _flip_kernel(flags_ptr, turns_ptr, COUNT: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr):
    """All flags become the parity of the turn: long after the kernel behind this one has been let in."""
    wait_for_producers(PDL)
    turn = tl.load(turns_ptr)
    waste = turn
    for _ in range(STEPS):
        waste = waste * 1664525 + 1013904223
    # Never so; what took the time must be of use.
    turn += tl.where(waste == turn + 1, 2, 0)
    offs = tl.arange(0, COUNT)
    tl.store(flags_ptr + offs, ((turn + offs * 0) % 2).to(tl.int8))
    tl.store(turns_ptr, turn + 1)


def _misread(side: Side, config: ModelConfig, between: bool) -> int:
    """In how many rounds a settled product did not follow the flags that were written just before, or two kernels."""
    rows, hidden = 8, config.hidden_size
    flags = torch.zeros(rows, dtype=torch.bool, device=side.device)
    turns, wrong = (torch.zeros(1, dtype=torch.int32, device=side.device) for _ in range(2))
    weight, x = side.ops.prepare(_drawn(side, hidden, hidden)), _drawn(side, rows, hidden)
    sums = torch.zeros(rows, hidden, dtype=side.dtype, device=side.device)
    steps = 20000 if side.device.type == "cuda" else 3

    def run() -> None:
        for _ in range(ROUNDS):
            sums.zero_()
            flip = cast("Any", _flip_kernel)[(1,)]
            flip(flags.view(torch.int8), turns, COUNT=rows, STEPS=steps, **launch.options(1, 1))
            if between:
                side.ops.linear(x, weight, tile=side.ops.decode_tile)
            side.ops.linear(x, weight, tile=side.ops.decode_tile, residual=sums, active=flags, settled=True)
            wrong.add_(((sums != 0).any(dim=1) != flags).any().int())

    run()
    if side.device.type != "cuda":
        return int(wrong)
    torch.cuda.synchronize()
    wrong.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(REPLAYS):
        graph.replay()
    return int(wrong)
