"""FlexiDepth's routing on the device: which rows a layer runs for, and the map of those rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, product_rules
from .primitives import is_last, sigmoid, tanh, wait_for_producers
from .products import row_product, statistics_first, weight_tile
from .values import Norm, Route, Router, RowMap


@triton.jit(do_not_specialize=["stride_layer", "stride_row", "rows"], do_not_specialize_on_alignment=["active_ptr"])
def _row_map_kernel(
    active_ptr,
    row_ptr,
    count_ptr,
    stride_layer,
    stride_row,
    rows,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """row [L, rows] = positions of active [L, rows], ascending, then −1; count [L]."""
    layer = tl.program_id(0).to(tl.int64)
    active_ptr += layer * stride_layer
    row_ptr += layer * rows
    count = 0
    wait_for_producers(PDL)
    start = 0
    while start < rows:
        offs_r = start + tl.arange(0, BLOCK)
        active = tl.load(active_ptr + offs_r.to(tl.int64) * stride_row, mask=offs_r < rows, other=0) != 0
        place = count + tl.cumsum(active.to(tl.int32), axis=0)
        tl.store(row_ptr + place - 1, offs_r, mask=active)
        count += tl.sum(active.to(tl.int32), axis=0)
        start += BLOCK
    start = 0
    while start < rows:
        offs_r = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + offs_r, -1, mask=(offs_r >= count) & (offs_r < rows))
        start += BLOCK
    tl.store(count_ptr + layer, count)


def row_map(active: Tensor) -> RowMap:
    """The rows of each layer that are active, gathered; active bool [L, R]."""
    layers, rows = active.shape
    row = torch.empty((layers, rows), dtype=torch.int32, device=active.device)
    count = torch.empty((layers,), dtype=torch.int32, device=active.device)
    _row_map_kernel[(layers,)](
        active,
        row,
        count,
        active.stride(0),
        active.stride(1),
        rows,
        BLOCK=launch.ROW_MAP_BLOCK,
        **launch.options(warps=4),
    )
    return RowMap(row, count)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["active_ptr"])
def _route_kernel(
    x_ptr,
    norm_ptr,
    norm_bias_ptr,
    w_ptr,
    inner_norm_ptr,
    readout_ptr,
    code_ptr,
    arrivals_ptr,
    active_ptr,
    weight_ptr,
    rest_ptr,
    run_ptr,
    skip_ptr,
    stride_x,
    rows,
    eps,
    threshold,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_CODE: tl.constexpr,
    PDL: tl.constexpr,
):
    """weight [rows] = sigmoid(readout · tanh(RMSNorm(W·norm(x)))); rest = 1 − weight; run, skip of active rows.

    x [rows, K]; W [N, K_PADDED]; code float32 [tiles, ROWS, N] and arrivals [tiles], zeros, are scratch: the last
    program of a tile of rows finds the whole code there.
    """
    pid_r = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_w = offs_n.to(tl.int64) * K_PADDED
    offs_r = pid_r * ROWS + tl.arange(0, ROWS)
    first = weight_tile(w_ptr, offs_w, mask_n, K_PADDED, BLOCK_K, PARTS, BLOCK_K)
    wait_for_producers(PDL)
    code = row_product(
        x_ptr,
        offs_r * stride_x,
        offs_r < rows,
        w_ptr,
        offs_w,
        mask_n,
        first,
        None,
        norm_ptr,
        norm_bias_ptr,
        None,
        eps,
        K,
        K_PADDED,
        BLOCK_N,
        BLOCK_K,
        PARTS,
        BLOCK_K,
        ROWS,
    )
    tl.store(code_ptr + offs_r[None, :] * N + offs_n[:, None], code, mask=mask_n[:, None], cache_modifier=".cg")
    if not is_last(arrivals_ptr + pid_r, tl.num_programs(1)):
        return
    tl.store(arrivals_ptr + pid_r, 0)
    offs_c = tl.arange(0, BLOCK_CODE)
    mask_c = offs_c < N
    inner_norm = tl.load(inner_norm_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    readout = tl.load(readout_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    for start in range(0, ROWS, BLOCK_R):
        offs = pid_r * ROWS + start + tl.arange(0, BLOCK_R)
        mask = (offs < rows)[:, None] & mask_c[None, :]
        whole = tl.load(code_ptr + offs[:, None] * N + offs_c[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        scale = tl.rsqrt(tl.sum(whole * whole, axis=1) / N + eps)
        inner = tanh(whole * scale[:, None] * inner_norm[None, :])
        weight = sigmoid(tl.sum(inner * readout[None, :], axis=1))
        tl.store(weight_ptr + offs, weight, mask=offs < rows)
        active = offs < rows
        if active_ptr is not None:
            active = active & (tl.load(active_ptr + offs, mask=offs < rows, other=0) != 0)
        tl.store(rest_ptr + offs, 1.0 - weight, mask=offs < rows)
        run = weight > threshold
        tl.store(run_ptr + offs, active & run, mask=offs < rows)
        tl.store(skip_ptr + offs, active & (run == 0), mask=offs < rows)


def route(
    x: Tensor,
    norm: Norm,
    router: Router,
    *,
    tile: int | None,
    threshold: float = 0.5,
    active: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Route:
    """weight = sigmoid(readout · tanh(RMSNorm_r(encoder · norm(x)))), run = weight > threshold (FlexiDepth).

    x [R, H]; RMSNorm_r takes its eps from `norm`. Rows that are not `active` bool [R] neither run nor are skipped.
    `arrivals`: those of `Entry`, where kernels count each other; they are zeros again afterwards.
    """
    rows, columns = x.shape
    width = router.encoder.rows
    arch = launch.architecture()
    short = statistics_first(norm, x.dtype)
    rule = product_rules.route_rule(width, columns, rows, tile, x.element_size(), arch, short=short)
    tiles = triton.cdiv(rows, rule.rows)
    code = torch.empty((tiles, rule.rows, width), dtype=torch.float32, device=x.device)
    if arrivals is None:
        arrivals = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    weight, rest = (torch.empty((rows,), dtype=torch.float32, device=x.device) for _ in range(2))
    run, skip = (torch.empty((rows,), dtype=torch.bool, device=x.device) for _ in range(2))
    _route_kernel[(tiles, triton.cdiv(width, rule.block_n))](
        x,
        norm.weight,
        norm.bias,
        router.encoder.data,
        router.norm,
        router.readout,
        code,
        arrivals,
        None if active is None else active.contiguous(),
        weight,
        rest,
        run,
        skip,
        x.stride(0),
        rows,
        norm.eps,
        threshold,
        N=width,
        K=columns,
        K_PADDED=launch.padded(columns),
        BLOCK_N=rule.block_n,
        BLOCK_K=rule.block_k,
        PARTS=rule.parts,
        ROWS=rule.rows,
        BLOCK_R=min(4, rule.rows),
        BLOCK_CODE=triton.next_power_of_2(width),
        **launch.options(rule.warps, rule.stages, rule.registers),
    )
    return Route(weight, rest, run, skip)
