"""What the compile gate asks of a compiled kernel."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .sass import Instruction, MachineCode

# Outside loops: what is put aside before a loop, and taken back after it, costs a program no more than a few cycles.
FEW_SPILLS = 16
# Bytes that a stack is a multiple of.
FRAME = 16
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_OF_CHIP = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_PREFERRED = 99 * 1024
SHARED_OF_BLOCK = 1024
REGISTERS_OF_CHIP = 65536
PREFETCH = "UBLKPF"
# Rows, columns and depth of a matrix instruction that a group of warps shares.
_GROUP = re.compile(r"\b(\d+)x\d+x(\d+)\b")


@dataclass(frozen=True)
class Meaning:
    """What a kernel is meant to be.

    streams: pattern of the source lines whose loads must all be 128 bits wide, None if there are none. mma: products
    of 16-bit operands run on the matrix units. prefetch: constexprs and numbers whose product is how many streamed
    elements a program asks for before it waits for the kernel before it; empty: none may. known: pattern of the source
    lines of what was written earlier than by that kernel, and may be read before the wait too. waits: it is part of the
    chain of dependent launches.
    """

    streams: str | None = None
    mma: bool = False
    prefetch: tuple[str | int, ...] = ()
    known: str | None = None
    waits: bool = True


@dataclass(frozen=True)
class Case:
    """One call of an op.

    group: the same call with any number of rows, masked or not, whose members must round alike. layer: the pass it is
    part of, where it runs in every layer; place: where in the pass. masked: rows may be inactive, and the launch before
    may decide which, so that nothing is read before the wait. floor: bytes of weights, cache or scores that it must
    read.
    """

    op: str
    name: str
    group: str
    layer: str
    place: int
    rows: int
    itemsize: int
    floor: int
    masked: bool
    launch: Callable[[], object]


@dataclass(frozen=True)
class Launch:
    """One launch as it was compiled."""

    constexprs: Mapping[str, Any]
    itemsize: int
    warps: int
    shared: int
    dependent: bool
    arch: int


@dataclass(frozen=True)
class Finding:
    """One compiled kernel of one case: a line of the gate's table. Sizes in bytes."""

    kernel: str
    case: str
    group: str
    layer: str
    place: int
    rows: int
    arch: str
    triton: str
    registers: int = 0
    threads: int = 0
    shared: int = 0
    wide_loads: int = 0
    mma: int = 0
    mma_opcodes: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    floor: int = 0
    grid: tuple[int, ...] = ()
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


def failures(code: MachineCode, meaning: Meaning, launch: Launch) -> list[str]:
    """Every reason why this is not the machine code that was meant; empty if it is."""
    found = [*_memory(code, launch), *_loads(code, meaning), *_products(code, meaning, launch)]
    if launch.arch >= 90 and meaning.waits:
        found += _chain(code, meaning, launch)
    return found


def _memory(code: MachineCode, launch: Launch) -> Iterable[str]:
    spills = code.count(lambda instruction: instruction.is_spill)
    looped = code.in_loops(lambda instruction: instruction.is_spill)
    if looped:
        yield f"{looped} loads and stores of local memory in loops: registers are spilled"
    elif spills > FEW_SPILLS:
        yield f"{spills} loads and stores of local memory: registers are spilled"
    elif code.stack > -(-sum(i.width for i in code.instructions if i.base == "STL") // FRAME) * FRAME:
        yield f"{code.stack} bytes of stack"
    limit = SHARED_LIMIT.get(launch.arch, SHARED_PREFERRED)
    if launch.shared > limit:
        yield f"{launch.shared} bytes of shared memory, the chip has {limit}"


def _loads(code: MachineCode, meaning: Meaning) -> Iterable[str]:
    if meaning.streams is None:
        return
    streamed = [load for load in code.instructions if load.is_load and _streamed(load, meaning)]
    if not streamed:
        yield f"no load from a line with {meaning.streams}"
    if narrow := [load for load in streamed if load.width < 16]:
        yield f"{len(narrow)} of {len(streamed)} streaming loads are narrower than 128 bits: {_some(narrow)}"


def _products(code: MachineCode, meaning: Meaning, launch: Launch) -> Iterable[str]:
    opcodes = mma_opcodes(code)
    if any("TF32" in opcode for opcode in opcodes) or (launch.itemsize == 4 and opcodes):
        yield f"float32 operands are rounded for the matrix units: {', '.join(opcodes)}"
    elif len({opcode.partition(".")[0] for opcode in opcodes}) > 1:
        yield f"matrix instructions of several kinds: {', '.join(opcodes)}"
    elif meaning.mma and launch.itemsize < 4 and not opcodes:
        yield "no matrix instruction"
    if launch.warps > (parts := launch.constexprs.get("PARTS", 1)) > 1:
        yield f"{launch.warps} warps share {parts} parts of a step: some repeat the products of others"


def _chain(code: MachineCode, meaning: Meaning, launch: Launch) -> Iterable[str]:
    """Prefetched weights → ACQBULK → everything else, the start of the dependents included, on every path."""
    if not launch.dependent:
        yield "launched without launch_pdl"
    for opcode in ("PREEXIT", "ACQBULK"):
        if not code.count(lambda instruction, opcode=opcode: instruction.base == opcode):
            yield f"no {opcode}"
            return
    early = code.before("ACQBULK")
    if starts := [i for i in early if i.base == "PREEXIT"]:
        yield f"the dependents are started before the wait: {_some(starts)}"
    # A load may be moved ahead of the start by the assembler; work may not.
    if late := [i for i in code.before("PREEXIT") if (i.is_store or i.is_mma) and i not in early]:
        yield f"the dependents are started late: {_some(late)}"
    if stores := [i for i in early if i.is_store]:
        yield f"stores before the wait: {_some(stores)}"
    if ends := [i for i in early if i.is_end]:
        yield f"the kernel may end before the wait: {_some(ends)}"
    if launch.constexprs.get("ahead_ptr") is not None and not any(i.base == PREFETCH for i in early):
        yield "the L2 cache is asked for nothing before the wait"
    loads = [i for i in early if i.is_load and not (meaning.known and re.search(meaning.known, i.source))]
    if foreign := [i for i in loads if not meaning.prefetch or not _streamed(i, meaning)]:
        yield f"dependent loads before the wait: {_some(foreign)}"
    elif meaning.prefetch:
        a_thread = _a_thread(_product(meaning.prefetch, launch), launch)
        step = launch.constexprs.get("BLOCK_K", 1)
        # Of a step that reaches past the weight, what lies beyond need not be loaded.
        least = a_thread * min(1.0, launch.constexprs.get("K_PADDED", step) / step)
        if not least <= sum(load.width for load in loads) <= a_thread:
            yield f"{len(loads)} loads before the wait ({_some(loads)}), meant were {a_thread} bytes a thread"


def mma_opcodes(code: MachineCode) -> list[str]:
    return sorted({instruction.opcode for instruction in code.instructions if instruction.is_mma})


def disagreements(findings: Sequence[Finding]) -> dict[str, str]:
    """Groups of launches that must round alike and may not, and why."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if not finding.failures:
            groups[f"{finding.kernel} {finding.group}, sm_{finding.arch}, Triton {finding.triton}"].append(finding)
    found: dict[str, str] = {}
    for name, members in groups.items():
        for how in (_instructions, _sums):
            kinds = {(member.rows, member.case): how(member) for member in members}
            if len(set(kinds.values())) > 1:
                found[name] = "; ".join(f"{case}: {', '.join(kind)}" for (_, case), kind in sorted(kinds.items()))
    return found


def _instructions(finding: Finding) -> tuple[str, ...]:
    """Its matrix instructions, however many columns they take: columns of an instruction do not see each other."""
    return tuple(sorted({_GROUP.sub(r"\1xNx\2", opcode) for opcode in finding.mma_opcodes}))


def _sums(finding: Finding) -> tuple[str, ...]:
    return finding.sums


def beside_next(findings: Sequence[Finding], arch: int) -> dict[int, bool]:
    """For each finding (by id) that is followed by another in a layer: whether one SM holds a block of both."""
    layers: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.layer and finding.floor:
            layers[finding.layer, finding.triton].append(finding)
    found: dict[int, bool] = {}
    for members in layers.values():
        members.sort(key=lambda finding: finding.place)
        for one, other in zip(members, members[1:] + members[:1], strict=True):
            shared = one.shared + other.shared + 2 * SHARED_OF_BLOCK
            registers = sum(-(-kernel.registers // 8) * 8 * kernel.threads for kernel in (one, other))
            found[id(one)] = shared <= SHARED_OF_CHIP[arch] and registers <= REGISTERS_OF_CHIP
    return found


def _a_thread(elements: int, launch: Launch) -> int:
    """Bytes of so many elements that a thread loads, 128 bits at a time."""
    weight = launch.constexprs.get("w_ptr")
    itemsize = launch.itemsize if weight is None else weight.itemsize
    return 16 * math.ceil(elements * itemsize / (16 * 32 * launch.warps))


def _product(factors: Sequence[str | int], launch: Launch) -> int:
    return math.prod(launch.constexprs[factor] if isinstance(factor, str) else factor for factor in factors)


def _streamed(instruction: Instruction, meaning: Meaning) -> bool:
    return meaning.streams is not None and re.search(meaning.streams, instruction.source) is not None


def _some(instructions: Sequence[Instruction]) -> str:
    shown = list(dict.fromkeys(f"{i.opcode} at {i.place}" for i in instructions))
    return ", ".join(shown[:4]) + (", …" if len(shown) > 4 else "")
