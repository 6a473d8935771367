"""Sub-layers of a pass in one call, for a CPU: in Python a pass of few rows spends a quarter of its time between them.

What is computed, and in which order, is what `compiled` does operation by operation, and so are the bits.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..attention_index import AttentionIndex, Index
from ..ops import Joined
from ..values import Heads, Layer, Matrix, Norm, Rope, Slots
from . import attention, attention_tiles, matrix_unit, openmp, panel_kernels
from .attention import attend_as, keep, lay_out
from .attention_sums import listed
from .lanes import WIDTH, copy, kernel, part, put_whole, whole
from .panel_kernels import NONE, SILU_GATE, product
from .panels import ACTIVATIONS
from .small_ops import rope_append
from .team import assembled, dealt, dismissed, help_out, joined_first, worker

# Of a layer: the addresses of its parameters, 0 for what it lacks, whether it rotates, and whether it has the window.
_FIELDS, _SIZES = 20, 8
# What a pass is told, at the end eps and scale, the address of `go`, its crew, and whether it came to its end.
_ARGUMENTS, _THREADS, _NUMBERS, _GO, _CREW, _WHOLE = 33, 25, 28, 30, 31, 32
# A pass of more rows is two sub-layers a call: Python between them costs it nothing, and an interrupt waits no longer.
_FEW = 64


@part
def _pass(arguments, team):
    (
        layers, shape, sublayers, count, x, rows, copies, keys, values, room, slots, page, offset, cos, sin, sequence,
        position, table, pages, length, slot, depth, half, unit, tiles, threads, share, some, _, _, _, _, _,
    ) = listed(_ARGUMENTS, arguments.ctypes.data)  # fmt: skip
    half, unit, tiles = half != 0, unit != 0, tiles != 0
    eps, scale = arguments[_NUMBERS:].view(np.float64)[0], arguments[_NUMBERS:].view(np.float64)[1]
    hidden, heads, kv_heads, width, inner, activation, window, slopes = listed(_SIZES, shape)
    size, up_rows = 2 if half else 4, 2 * inner if activation == SILU_GATE else inner
    projected, queries = rows * (heads + 2 * kv_heads) * width * size, rows * heads * width * size
    memory = np.empty(projected + 2 * queries + rows * inner * size, np.uint8)
    qkv = memory.ctypes.data
    q, mixed, gated = qkv + projected, qkv + projected + queries, qkv + projected + 2 * queries
    everything = lay_out(
        sequence, position, table, pages, length, slot, depth,
        rows, heads, kv_heads, width, slots, 0, half, tiles, threads,
    )  # fmt: skip
    nearby = everything if window == 0 else lay_out(
        sequence, position, table, pages, length, slot, depth,
        rows, heads, kv_heads, width, slots, window, half, tiles, threads,
    )  # fmt: skip
    for i in range(count):
        number = whole(sublayers + 8 * i)
        if copies:
            copy(x, copies + i * rows * hidden * size, rows * hidden * size)
        (
            norm, shift, qkv_weight, qkv_scale, qkv_bias, q_norm, k_norm, output, output_scale, output_bias,
            mlp_norm, mlp_shift, up, up_scale, up_bias, down, down_scale, down_bias, rotates, windowed,
        ) = listed(_FIELDS, layers + 8 * _FIELDS * (number // 2))  # fmt: skip
        if number % 2 == 0:
            own = room * (number // 2)
            product(
                x, norm, shift, eps, qkv_weight, qkv_scale, False, qkv_bias, NONE, 0, qkv, rows,
                (heads + 2 * kv_heads) * width, hidden, half, unit, threads, team, share,
            )  # fmt: skip
            rope_append(
                qkv, q_norm, k_norm, eps, cos if rotates else 0, sin if rotates else 0, page, offset,
                q, keys + own, values + own, rows, heads, kv_heads, width, slots, half,
            )  # fmt: skip
            attend_as(
                nearby if windowed else everything, q, keys + own, values + own, mixed, sequence, slopes,
                rows, heads, kv_heads, width, slots, length != 0, scale, half, threads, team, some,
            )  # fmt: skip
            product(
                mixed, 0, 0, eps, output, output_scale, False, output_bias, NONE, x, x, rows, hidden,
                heads * width, half, unit, threads, team, share,
            )  # fmt: skip
        else:
            product(
                x, mlp_norm, mlp_shift, eps, up, up_scale, up_rows != inner, up_bias, activation, 0, gated, rows,
                up_rows, hidden, half, unit, threads, team, share,
            )  # fmt: skip
            product(
                gated, 0, 0, eps, down, down_scale, False, down_bias, NONE, x, x, rows, hidden,
                inner, half, unit, threads, team, share,
            )  # fmt: skip
    if copies:
        copy(x, copies + count * rows * hidden * size, rows * hidden * size)
    keep((memory,))


@worker
def go(block):
    """What each thread of a pass does: the first goes through the layers, others help with what it deals out."""
    crew = block[_CREW]
    if crew and not joined_first(crew):
        help_out(crew)
        return
    try:
        _pass(carray(block, _ARGUMENTS), crew)
        block[_WHOLE] = 1
    except Exception:  # For want of memory, numba knows no narrower: the others must not wait; `through` says so.
        block[_WHOLE] = 0
    if crew:
        dismissed(crew)


@kernel("void(int64, int64)")
def through(arguments, team):
    """Add sub-layers to x [rows, hidden] in place on `threads` of a team, which stay together for it.

    arguments int64 [`_ARGUMENTS`]: layers [layers, `_FIELDS`]; shape: hidden, heads, kv_heads, head_dim, the columns of
    the down product, activation, window, slopes; `count` sublayers; x and its rows; copies, if not 0: x before each
    sub-layer and after the last. The keys of a layer take `room` bytes, as the values do, in pages of `slots` slots.
    `unit`: products by the matrix unit; `share`, `some` and `go`: the addresses of `panel_kernels.share`, `attend_some`
    and `go`; eps and scale are float64; the places of the crew and of the end are filled here. The rest: `rope_append`,
    `attend`. Raises MemoryError.
    """
    threads, crew = whole(arguments + 8 * _THREADS), np.empty(0, np.int64)
    if team and threads > 1:
        crew = assembled(team)
    put_whole(arguments + 8 * _CREW, crew.ctypes.data if len(crew) else 0)
    put_whole(arguments + 8 * _WHOLE, 0)
    dealt(team, whole(arguments + 8 * _GO), arguments, threads)
    keep((crew,))
    if whole(arguments + 8 * _WHOLE) == 0:
        raise MemoryError


def join(
    layers: Sequence[Layer],
    heads: Heads,
    activation: str,
    rotates: Sequence[bool],
    windows: Sequence[int | None],
    slopes: Tensor | None,
) -> Joined | None:
    """The layers of a model as one function, which keeps them; None where an operation of theirs is not compiled."""
    wide = {window for window in windows if window}
    if len(wide) > 1 or not all(_compiled(layer, heads, activation) for layer in layers):
        return None
    return _Layers(layers, heads, activation, rotates, windows, slopes)


class _Layers:
    def __init__(
        self,
        layers: Sequence[Layer],
        heads: Heads,
        activation: str,
        rotates: Sequence[bool],
        windows: Sequence[int | None],
        slopes: Tensor | None,
    ) -> None:
        norm, hidden = layers[0].attention_norm, layers[0].down.rows
        self._kept = layers, slopes
        self._eps, self._scale, self._half = norm.eps, heads.dim**-0.5, norm.weight.dtype == torch.bfloat16
        self._tiles = self._half and heads.dim % attention.BLOCK == 0
        rows = [
            [*_addresses(layer), int(rotated), int(window is not None)]
            for layer, rotated, window in zip(layers, rotates, windows, strict=True)
        ]
        self._layers = np.array(rows, np.int64)
        window = max(window or 0 for window in windows)
        sizes = hidden, heads.query, heads.key, heads.dim, layers[0].down.columns, ACTIVATIONS[activation]
        self._shape = np.array([*sizes, window, _address(slopes)], np.int64)

    def __call__(
        self,
        sublayers: tuple[int, ...],
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Slots,
        index: Index,
        rope: Rope | None,
        streams: list[Tensor] | None,
    ) -> None:
        assert isinstance(index, AttentionIndex)
        order, given, tree = _numbers(sublayers), x.contiguous(), index.tree
        page, offset = slots.page.contiguous(), slots.offset.contiguous()
        cos, sin = (None, None) if rope is None else (rope.cos.contiguous(), rope.sin.contiguous())
        copies = None if streams is None else x.new_empty((len(sublayers) + 1, *x.shape))
        unit = matrix_unit.permitted()
        tiles = unit and self._tiles
        each = max(len(order), 1) if x.shape[0] <= _FEW else 2
        arguments = np.array(
            [
                self._layers.ctypes.data,
                self._shape.ctypes.data,
                *(0, 0, given.data_ptr(), x.shape[0], 0),
                keys.data_ptr(),
                values.data_ptr(),
                keys.stride(0) * keys.itemsize,
                keys.shape[3],
                page.data_ptr(),
                offset.data_ptr(),
                _address(cos),
                _address(sin),
                index.sequence.data_ptr(),
                index.position.data_ptr(),
                index.block_table.data_ptr(),
                index.block_table.shape[1],
                0 if tree is None else tree.length.data_ptr(),
                0 if tree is None else tree.slot.data_ptr(),
                0 if tree is None else tree.slot.shape[1],
                self._half,
                unit,
                tiles,
                torch.get_num_threads(),
                panel_kernels.share.address,
                (attention_tiles if tiles else attention).attend_some.address,
                *(0, 0, go.address, 0, 0),
            ],
            np.int64,
        )
        arguments[_NUMBERS : _NUMBERS + 2].view(np.float64)[:] = self._eps, self._scale
        for start in range(0, max(len(order), 1), each):
            arguments[2], arguments[3] = order[start:].ctypes.data, min(each, len(order) - start)
            arguments[6] = 0 if copies is None else copies[start].data_ptr()
            through(arguments.ctypes.data, openmp.team())
        if given is not x:
            x.copy_(given)
        if streams is not None and copies is not None:
            streams += copies


def _compiled(layer: Layer, heads: Heads, activation: str) -> bool:
    """Whether every operation of a layer is one that `compiled` has a kernel for, products in panels."""
    weights = [layer.qkv, layer.output, layer.up, layer.down]
    if not all(isinstance(weight, Matrix) and weight.in_panels for weight in weights):
        return False
    dtype, hidden = layer.attention_norm.weight.dtype, layer.down.rows
    alike = layer.mlp_norm.weight.dtype == dtype
    alike = alike and all(weight.scale is not None or weight.data.dtype == dtype for weight in weights)
    fused = layer.up.gated == (activation == "silu_gate") and hidden % WIDTH == 0
    return alike and fused and heads.dim % WIDTH == 0 and heads.dim >= 2 * WIDTH


def _addresses(layer: Layer) -> list[int]:
    def of(norm: Norm) -> list[int]:
        return [_address(norm.weight), _address(norm.bias)]

    def weight(matrix: Matrix) -> list[int]:
        return [matrix.data.data_ptr(), _address(matrix.scale)]

    assert isinstance(layer.qkv, Matrix)
    return [
        *of(layer.attention_norm),
        *weight(layer.qkv),
        *map(_address, (layer.qkv_bias, layer.q_norm, layer.k_norm)),
        *weight(layer.output),
        _address(layer.output_bias),
        *of(layer.mlp_norm),
        *weight(layer.up),
        _address(layer.up_bias),
        *weight(layer.down),
        _address(layer.down_bias),
    ]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=256)
def _numbers(sublayers: tuple[int, ...]) -> np.ndarray:
    return np.array(sublayers, np.int64)
