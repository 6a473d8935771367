"""What a compiled kernel does, read from its machine code with the disassembler that comes with Triton."""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LABEL = re.compile(r"^(?P<label>[.$\w]+):$")
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
_RESOURCES = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")

_LOADS = {"LDG", "LDGSTS", "LD", "UBLKCP", "UTMALDG"}
_BULK_LOADS = {"UBLKCP", "UTMALDG"}
_STORES = {"STG", "ST", "RED", "REDG", "ATOM", "ATOMG", "UBLKRED", "UTMASTG", "UTMAREDG"}
_SPILLS = {"LDL", "STL"}
Barriers = frozenset[tuple[str, int]]
_MMA = re.compile(r"(?:[HIDQO]|[HIQB]G|UTC[A-Z]*)MMA\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction and the source line it was compiled from."""

    opcode: str
    operands: str
    predicate: str | None
    file: str
    line: int

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found["label"] if found else None

    @property
    def source(self) -> str:
        return linecache.getline(self.file, self.line).strip()

    @property
    def place(self) -> str:
        return f"{Path(self.file).name}:{self.line}"

    @property
    def is_load(self) -> bool:
        """Whether it reads global memory."""
        return self.base in _LOADS

    @property
    def is_store(self) -> bool:
        """Whether it writes global memory."""
        return self.base in _STORES

    @property
    def is_spill(self) -> bool:
        return self.base in _SPILLS

    @property
    def is_mma(self) -> bool:
        return _MMA.match(self.opcode) is not None

    @property
    def is_end(self) -> bool:
        return self.base == "EXIT"

    @property
    def width(self) -> int:
        """Bytes a thread reads or writes; bulk copies count as 16."""
        if self.base in _BULK_LOADS:
            return 16
        sizes = {"8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in self.opcode.split(".") if part in sizes), 4)


@dataclass(frozen=True)
class MachineCode:
    """A kernel's instructions in the order of their addresses, labels as indices into them, and its resources."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: int
    stack: int

    def count(self, test: Callable[[Instruction], bool]) -> int:
        return sum(map(test, self.instructions))

    def in_loops(self, test: Callable[[Instruction], bool]) -> int:
        """How many of the instructions between a label and a branch back to it."""
        found: set[int] = set()
        for index, instruction in enumerate(self.instructions):
            first = self.labels.get(instruction.target or "", index)
            found |= {i for i in range(first, index) if test(self.instructions[i])}
        return len(found)

    def before(self, opcode: str) -> list[Instruction]:
        """Every instruction that some path from the kernel's start reaches without having executed `opcode`."""
        # With where the threads that wait at each convergence barrier go on: names of barriers are used again. Where
        # one is put aside and taken back, it may be that of any of them.
        kept = any(instruction.base == "BMOV" for instruction in self.instructions)
        seen: set[tuple[int, Barriers]] = set()
        waiting: list[tuple[int, Barriers]] = [(0, frozenset())]
        while waiting:
            index, barriers = here = waiting.pop()
            if here in seen or index >= len(self.instructions):
                continue
            seen.add(here)
            instruction = self.instructions[index]
            if instruction.base == "BSSY" and instruction.target in self.labels:
                barrier = instruction.operands.partition(",")[0].strip()
                others = {one for one in barriers if kept or one[0] != barrier}
                barriers = frozenset({*others, (barrier, self.labels[instruction.target])})
            if instruction.base != opcode or instruction.predicate is not None:
                waiting += [(following, barriers) for following in self._successors(index, barriers)]
        return [self.instructions[index] for index in sorted({index for index, _ in seen})]

    def _successors(self, index: int, barriers: Barriers) -> list[int]:
        instruction = self.instructions[index]
        following = [index + 1]
        if instruction.base in ("EXIT", "RET"):
            # What a subroutine returns to follows its call.
            return following if instruction.predicate else []
        if instruction.base in ("BRX", "JMX", "BRXU"):
            return following + list(self.labels.values())
        if instruction.base == "BSSY":
            return following
        if instruction.base == "BSYNC":
            return following + [place for barrier, place in barriers if barrier == instruction.operands.strip()]
        if instruction.target is None:
            return following
        target = [self.labels[instruction.target]]
        always = instruction.base == "BRA" and instruction.predicate is None and instruction.operands.startswith("`")
        return target if always else following + target


def tools(package: Path) -> tuple[Path, Path]:
    """cuobjdump and nvdisasm of the Triton at `package`."""
    for folder in (package / "backends" / "nvidia" / "bin", package / "third_party" / "cuda" / "bin"):
        paths = folder / "cuobjdump", folder / "nvdisasm"
        if all(path.is_file() for path in paths):
            return paths
    raise FileNotFoundError(f"{package}: expected cuobjdump and nvdisasm in backends/nvidia/bin")


def disassemble(cubin: bytes, package: Path) -> MachineCode:
    """The code of the one kernel in `cubin`, by the tools of the Triton at `package`."""
    cuobjdump, nvdisasm = tools(package)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(cuobjdump, "-res-usage", file.name)
        listing = _output(nvdisasm, "-c", "-g", file.name)
    found = _RESOURCES.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: expected REG and STACK, got {usage[:200]!r}")
    instructions, labels = parse(listing)
    return MachineCode(instructions, labels, int(found["registers"]), int(found["stack"]) + int(found["local"]))


def parse(listing: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """Instructions and labels of `nvdisasm -c -g`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    file, line = "", 0
    for text in listing.splitlines():
        if found := _LINE.search(text):
            file, line = found["file"], int(found["line"])
        elif found := _LABEL.match(text.strip()):
            labels[found["label"]] = len(instructions)
        elif found := _INSTRUCTION.search(text):
            instructions.append(Instruction(found["opcode"], found["operands"].strip(), found["predicate"], file, line))
    if not instructions:
        raise ValueError("nvdisasm: expected instructions, found none")
    return tuple(instructions), labels


def _output(tool: Path, *arguments: str) -> str:
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool.name} {' '.join(arguments)}: {done.stderr.strip()[:500]}")
    return done.stdout
