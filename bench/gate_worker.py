"""One process of the compile gate: compiles cases with the Triton it finds, for one chip, without a GPU.

Reads a JSON object from stdin (triton, arch, names of cases); writes one JSON object per compiled kernel to stdout.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..kernels import launch
from .gate_checks import Case, Finding, Launch, Meaning, failures, mma_opcodes
from .order import sums
from .sass import MachineCode, disassemble

UNKNOWN = Meaning()


class NoDriver:
    """A driver of a chip that is not there: kernels compile for it and are not launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Compiled:
    """A kernel that a launcher would have launched."""

    kernel: Any
    arguments: Mapping[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.metadata.name


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)


def record(arch: str) -> list[Compiled]:
    """From here on launches compile for `arch` and are appended to the list returned."""
    jit, backend, drivers = (cast(Any, part) for part in (JITFunction, CUDABackend, driver))
    drivers.set_active(NoDriver(target_of(arch)))
    if arch.startswith("gfx"):
        # The launch rules know NVIDIA's chips only.
        cast(Any, launch).architecture = lambda: 80
    launched: list[Compiled] = []
    run, make_ptx = jit.run, backend.make_ptx

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        size = cast("tuple[int, ...]", grid(named) if callable(grid) else grid)
        launched.append(Compiled(kernel, named, tuple(size)))
        return kernel

    def make_true_ptx(*arguments: Any) -> str:
        return _with_true_lines(make_ptx(*arguments))

    jit.run, backend.make_ptx = compile_only, make_true_ptx
    return launched


def findings(case: Case, arch: str, launched: list[Compiled], meanings: Mapping[str, Meaning]) -> list[Finding]:
    """A finding for each kernel the case launches."""
    start = time.perf_counter()
    launched.clear()
    common = Finding(
        kernel=case.op,
        case=case.name,
        group=case.group,
        layer=case.layer,
        place=0,
        rows=case.rows,
        arch=arch,
        triton=triton.__version__,
    )
    try:
        with redirect_stdout(sys.stderr):
            case.launch()
        seconds = time.perf_counter() - start
        return [
            replace(
                _measured(case, compiled, meanings.get(compiled.name), common),
                place=100 * case.place + number,
                seconds=seconds / len(launched),
            )
            for number, compiled in enumerate(launched)
        ] or [replace(common, failures=("no kernel was launched",))]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()
        return [replace(common, failures=("does not compile: " + " ".join(reason)[:400],))]


def _measured(case: Case, compiled: Compiled, meaning: Meaning | None, common: Finding) -> Finding:
    asm, metadata = compiled.kernel.asm, compiled.kernel.metadata
    common = replace(
        common,
        kernel=compiled.name,
        shared=metadata.shared,
        threads=metadata.num_warps * metadata.warp_size,
        grid=compiled.grid,
    )
    if "cubin" not in asm:
        return common
    code = _code(asm["cubin"])
    launched = Launch(
        constexprs=compiled.arguments,
        itemsize=case.itemsize,
        warps=metadata.num_warps,
        shared=metadata.shared,
        dependent=bool(getattr(metadata, "launch_pdl", False)),
        arch=int(common.arch),
    )
    meant = meaning or UNKNOWN
    reasons = failures(code, replace(meant, prefetch=()) if case.masked else meant, launched)
    if meaning is None:
        reasons.append("not among KERNELS in bench/gate_kernels.py")
    return replace(
        common,
        registers=code.registers,
        wide_loads=code.count(lambda instruction: instruction.is_load and instruction.width >= 16),
        mma=code.count(lambda instruction: instruction.is_mma),
        mma_opcodes=tuple(mma_opcodes(code)),
        sums=tuple(sums(asm["ttgir"])),
        floor=case.floor if meant.streams else 0,
        failures=tuple(reasons),
    )


def _with_true_lines(ptx: str) -> str:
    """Inline assembly attributed to the line it comes from: Triton 3.9 counts on with each of its instructions."""

    def first_line_only(block: re.Match[str]) -> str:
        head, mark, rest = block[0].partition("\t.loc")
        return head + mark + re.sub(r"(?m)^\t\.loc\t.*\n", "", rest)

    return re.sub(r"(?s)// begin inline asm\n.*?// end inline asm", first_line_only, ptx)


@cache
def _code(cubin: bytes) -> MachineCode:
    return disassemble(cubin, Path(triton.__file__).parent)


def main() -> None:
    from .gate_cases import cases
    from .gate_kernels import KERNELS

    order: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(1)
    if triton.__version__ != order["triton"]:
        sys.exit(f"expected Triton {order['triton']}, got {triton.__version__} from {triton.__file__}")
    wanted = set(order["cases"])
    launched = record(order["arch"])
    for case in cases():
        if case.name in wanted:
            for finding in findings(case, order["arch"], launched, KERNELS):
                print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
