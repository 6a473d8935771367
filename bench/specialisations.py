"""Which kernel specialisations a workload reaches, found without a GPU.

In a process without the interpreter launchers run for a chip that is not there. Triton itself works out what each
launch is specialised on, looks for it among what it has compiled, and calls its hooks; what it would compile is noted
and not compiled, nothing is launched, and the torch table computes the results.
"""

from __future__ import annotations

from dataclasses import fields, replace
from inspect import signature
from typing import Any, cast

import torch
import triton.compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..kernels import launch, triton_ops
from ..kernels.attention_index import AttentionIndex, TritonIndex
from ..kernels.ops import TORCH, Ops
from ..kernels.values import Matrix, Router
from .gate_worker import NoDriver

# How weights lie is the kernels' own.
LAYOUT = ("describe", "prepare", "prepare_stack", "prepare_split", "rounds_alike", "take_rows")


class BothIndexes:
    """The rows of a pass as either table's `attend` takes them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.triton, self.torch = TritonIndex(*args, **options), AttentionIndex(*args, **options)
        self.tile, self.width = self.triton.tile, self.triton.width


class Specialisations:
    """Those that the kernels have been launched with, for a chip of this architecture, in the order they came.

    Made once a process, which launches nothing from then on. `compiled` are the names of the kernels that Triton would
    have compiled; `forget` lets it start anew.
    """

    def __init__(self, arch: int) -> None:
        self.compiled: list[str] = []
        self._kernels: dict[int, Any] = {}
        run, drivers, jit = cast("Any", JITFunction).run, cast("Any", driver), cast("Any", JITFunction)

        def launch_nothing(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            self._kernels[id(kernel)] = kernel
            return run(kernel, *arguments, grid=grid, warmup=True, **options)

        jit.run = launch_nothing
        cast("Any", triton.compiler).compile = self._compile
        drivers.set_active(NoDriver(GPUTarget("cuda", arch, 32)))
        # The engine takes the Triton table without a GPU only where the interpreter runs it.
        cast("Any", launch).INTERPRETED = True
        cast("Any", launch).architecture = lambda: arch
        cast("Any", launch)._nvidia = lambda: True
        # What is asked ahead of matrices of 4096 columns is asked ahead of those of 64.
        cast("Any", launch).AHEAD_PIECE, cast("Any", launch).AHEAD_OF = 1 << 10, 16 << 10
        cast("Any", triton_ops).TRITON = _computed_by_torch(triton_ops.TRITON)

    def forget(self) -> None:
        """Nothing has been compiled yet."""
        for kernel in self._kernels.values():
            kernel.device_caches.clear()
        self.compiled.clear()

    def _compile(self, source: Any, **_: Any) -> object:
        self.compiled.append(source.name)
        return object()


def _computed_by_torch(table: Ops) -> Ops:
    names = [field.name for field in fields(Ops) if callable(getattr(table, field.name))]
    ops = {name: _both(getattr(table, name), getattr(TORCH, name)) for name in names if name not in LAYOUT}
    return replace(table, **ops | {"index": BothIndexes})


def _both(mine: Any, theirs: Any) -> Any:
    takes = signature(mine)

    def op(*args: Any, **options: Any) -> Any:
        given = takes.bind(*args, **options)
        index = given.arguments.get("index")
        if isinstance(index, BothIndexes):
            given.arguments["index"] = index.triton
        result = mine(*given.args, **given.kwargs)
        if isinstance(index, BothIndexes):
            given.arguments["index"] = index.torch
        with torch.inference_mode():
            given.arguments |= {name: _unpadded(value) for name, value in given.arguments.items()}
            _fill(result, theirs(*given.args, **given.kwargs))
        return result

    return op


def _unpadded(value: Any) -> Any:
    """The weights in an argument with the columns they have, for products that know no others."""
    if isinstance(value, Matrix):
        return replace(value, data=value.data[:, : value.columns])
    return value._replace(encoder=_unpadded(value.encoder)) if isinstance(value, Router) else value


def _fill(empty: Any, computed: Any) -> None:
    """The values of `computed` into the tensors of `empty`, which may be views of what a launcher has allocated."""
    if isinstance(empty, Tensor):
        # What only kernels need another table does not have: attention's counts of arrivals.
        empty.copy_(computed) if computed is not None else empty.zero_()
    elif isinstance(empty, tuple):
        for mine, theirs in zip(cast("tuple[Any, ...]", empty), computed, strict=True):
            _fill(mine, theirs)
