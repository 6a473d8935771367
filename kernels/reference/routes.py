"""The ops of per-token routing in PyTorch: row maps, FlexiDepth's router, and the cache fill of skipped layers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..elementwise import steady
from ..host import ints
from ..values import Norm, Rope, Route, Router, RowMap, Slots, Stack
from . import dense


def row_map(active: Tensor) -> RowMap:
    """The rows of each layer that are active, gathered; active bool [L, R]."""
    order = torch.argsort((~active).to(torch.uint8), dim=1, stable=True)
    count = active.sum(dim=1)
    mapped = torch.arange(active.shape[1], device=active.device) < count[:, None]
    return RowMap(torch.where(mapped, order, -1).to(torch.int32), count.to(torch.int32))


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
    code = dense.linear(x, router.encoder, tile=tile, norm=norm)
    code = code.to(torch.promote_types(code.dtype, torch.float32))
    inner = Norm(router.norm.to(code.dtype), None, norm.eps)
    readout = router.readout.to(code.dtype)
    tile = tile or len(code)
    score = [
        (steady(torch.tanh, dense.normalise(part, inner)) * readout).sum(dim=-1)
        for part in torch.split(functional.pad(code, (0, 0, 0, -code.shape[0] % tile)), tile)
    ]
    weight = steady(torch.sigmoid, torch.cat(score)[: x.shape[0]])
    run = weight > threshold
    return Route(weight, 1 - weight, run if active is None else run & active, ~run if active is None else ~run & active)


def fill_kv(
    x: Tensor,
    rows: RowMap,
    norm: Norm,
    weight: Stack,
    bias: Tensor | None,
    k_norm: Tensor | None,
    rope: Rope | None,
    rotated: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    *,
    heads: int,
    tile: int | None,
) -> None:
    """k, v of the rows of each layer's map, written to the rows' slots in that layer's cache.

    The same k and v as those of `qkv_rope_append`, bit for bit. x [R, H]; norm.weight, norm.bias [L, H]; weight
    [L, (heads + 2·kv_heads)·D, H], of which the first heads·D rows are not used; bias [L, N]; k_norm [L, D]; `rotated`
    bool [L]: layers that rotate, all where it is None; keys, values [L, pages, kv_heads, P, D].
    """
    fill_layers(
        dense.qkv_rope_append, x, rows, norm, weight, bias, k_norm, rope, rotated, keys, values, slots, heads, tile
    )


def fill_layers(
    qkv_rope_append: Callable[..., Tensor],
    x: Tensor,
    rows: RowMap,
    norm: Norm,
    weight: Stack,
    bias: Tensor | None,
    k_norm: Tensor | None,
    rope: Rope | None,
    rotated: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    heads: int,
    tile: int | None,
) -> None:
    """`fill_kv` by the `qkv_rope_append` of a table."""
    for layer, count in enumerate(ints(rows.count)):
        if count == 0:
            continue
        row = rows.row[layer, :count].long()
        turned = rope is not None and (rotated is None or bool(rotated[layer]))
        head_norm = None if k_norm is None else k_norm[layer]
        qkv_rope_append(
            x[row],
            Norm(norm.weight[layer], None if norm.bias is None else norm.bias[layer], norm.eps),
            weight[layer],
            None if bias is None else bias[layer],
            head_norm,
            head_norm,
            Rope(rope.cos[row], rope.sin[row]) if rope is not None and turned else None,
            keys[layer],
            values[layer],
            Slots(slots.page[row], slots.offset[row]),
            heads=heads,
            tile=tile,
        )
