"""What the blocks of rows of scores hold, spread over the processors: the first of two launches that draw tokens."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .nucleus import EDGES, limited_by_nucleus, mass_above_edges
from .primitives import wait_for_producers
from .sampling_rule import sampling_rule
from .warping import known, log, uniform


class Partials(NamedTuple):
    """Of rows of scores [R, V]: the highest score of each segment and block of ids, float32 [R, segments], [R, blocks].

    total float32 [R, blocks]: Σ exp((x − peak)/temperature) of a block; race: its highest (x − peak)/temperature +
    Gumbel noise, None where nothing is drawn. edge float32 [R, blocks, EDGES]: `mass_above_edges` of a block, where
    top-p alone limits what its row can give. All three undefined at temperature 0.
    """

    segment: Tensor
    peak: Tensor
    total: Tensor
    edge: Tensor
    race: Tensor | None


@triton.jit(do_not_specialize=["stream"])
def _partials_kernel(
    scores_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    arrivals_ptr,
    segment_ptr,
    peak_ptr,
    total_ptr,
    edge_ptr,
    race_ptr,
    stride_scores,
    stream,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The `Partials` of one block of a row. scores [S·n, V]; arrivals int32 [S·n] or None: zeroed; the rest [S]."""
    pid_s = tl.program_id(0).to(tl.int64)
    pid_block = tl.program_id(2)
    row = pid_s * tl.num_programs(1) + tl.program_id(1)
    block = row * tl.num_programs(2) + pid_block
    row_ptr = scores_ptr + row * stride_scores
    start = pid_block * BLOCK
    offs = tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    x = known(tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf")))
    temperature = tl.load(temperature_ptr + pid_s)
    peak = tl.max(x, axis=0)
    tl.store(peak_ptr + block, peak)
    if arrivals_ptr is not None and pid_block == 0:
        tl.store(arrivals_ptr + row, 0)
    SEGMENTS: tl.constexpr = BLOCK // SEGMENT
    peaks = tl.max(tl.reshape(x, (SEGMENTS, SEGMENT)), axis=1)
    tl.store(segment_ptr + block * SEGMENTS + tl.arange(0, SEGMENTS), peaks)
    if temperature > 0.0:
        value = tl.where(x > float("-inf"), tl.div_rn(x - peak, temperature), float("-inf"))
        weight = tl.exp(value)
        tl.store(total_ptr + block, tl.sum(weight, axis=0))
        top_k = tl.load(top_k_ptr + pid_s)
        if limited_by_nucleus(top_k, tl.load(top_p_ptr + pid_s), tl.load(min_p_ptr + pid_s), V):
            masses = mass_above_edges(x, weight, peak, temperature)
            tl.store(edge_ptr + block * EDGES + tl.arange(0, EDGES), masses)
        if race_ptr is not None:
            seed = tl.load(seed_ptr + pid_s)
            position = tl.load(position_ptr + pid_s)
            noise = -log(-log(uniform(seed, position, start, BLOCK, stream)))
            tl.store(race_ptr + block, tl.max(value + noise, axis=0))


def partials_of(
    scores: Tensor,
    width: int,
    rules: list[Tensor],
    seed: Tensor | None = None,
    position: Tensor | None = None,
    stream: int = 0,
    arrivals: Tensor | None = None,
) -> Partials:
    """Of scores [S·width, V], rows contiguous. rules: temperature, top_k, top_p, min_p; seed and position int64 [S].

    All contiguous. arrivals int32 [S·width]: zeroed, for a kernel after this one.
    """
    rows, size = scores.shape
    rule = sampling_rule(size)
    device, floats = scores.device, torch.float32
    segment = torch.empty((rows, rule.blocks * rule.block // rule.segment), dtype=floats, device=device)
    peak = torch.empty((rows, rule.blocks), dtype=floats, device=device)
    total = torch.empty((rows, rule.blocks), dtype=floats, device=device)
    edge = torch.empty((rows, rule.blocks, EDGES.value), dtype=floats, device=device)
    race = None if seed is None else torch.empty((rows, rule.blocks), dtype=floats, device=device)
    _partials_kernel[(rows // width, width, rule.blocks)](
        scores,
        *rules,
        seed,
        position,
        arrivals,
        segment,
        peak,
        total,
        edge,
        race,
        scores.stride(0),
        stream,
        V=size,
        BLOCK=rule.block,
        SEGMENT=rule.segment,
        **launch.options(max(1, rule.block // 256)),
    )
    return Partials(segment, peak, total, edge, race)


@triton.jit
def block_peaks(peak_ptr, BLOCKS: tl.constexpr):
    """The highest scores of a row's blocks, −∞ up to a power of two."""
    offs = tl.arange(0, triton.next_power_of_2(BLOCKS))
    return tl.load(peak_ptr + offs, mask=offs < BLOCKS, other=float("-inf"))


@triton.jit
def total_of_blocks(total_ptr, peaks, highest, temperature, BLOCKS: tl.constexpr):
    """Σ exp((x − highest)/temperature) of a row from its blocks' totals; peaks as `block_peaks` has them."""
    offs = tl.arange(0, triton.next_power_of_2(BLOCKS))
    totals = tl.load(total_ptr + offs, mask=offs < BLOCKS, other=0.0)
    return tl.sum(tl.where(peaks > float("-inf"), totals * tl.exp((peaks - highest) / temperature), 0.0), axis=0)
