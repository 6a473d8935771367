"""The order of a kernel's floating-point sums, as far as the compiler's intermediate code fixes it.

Two launches of one product round alike only if every sum over the columns is taken in the same order. A sum's order
follows from how the summed axis is dealt to registers, lanes and warps, and from the columns of a matrix instruction:
from how many of them a step has, and how many a thread holds side by side, its operands' kWidth.
"""

from __future__ import annotations

import re

_ALIAS = re.compile(r"^(?P<name>#\w+) = (?P<layout>#ttg?n?g?\.\w+<.*>)$", re.MULTILINE)
_SUM = re.compile(
    r'"tt\.(?P<op>reduce|scan)"\([^)]*\) <\{axis = (?P<axis>\d+) : i32[^>]*\}> \(\{(?P<body>.*?)\}\) : '
    r"\((?P<types>tensor<.*?)\) ->",
    re.DOTALL,
)
_DOT = re.compile(r"(?P<op>tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b(?P<operands>.*)")
_WIDTH = re.compile(r"kWidth = (\d+)")
_OPERAND = re.compile(r"tensor<(?P<shape>(?:\d+x)+)(?P<dtype>\w+), (?P<layout>#.*?)>(?=, tensor<|$)")
_SLICE = re.compile(r"^#ttg\.slice<\{dim = (?P<dim>\d+), parent = (?P<parent>#.*)\}>$")
_FIELD = re.compile(r"(?P<name>\w+) = (?P<values>\[(?:\[[^\]]*\]|[^\[\]])*\])")


def sums(ttgir: str) -> list[str]:
    """One line for each kind of floating-point sum: its length and how its terms are dealt out; sorted.

    Sums of two terms have one order and are left out.
    """
    aliases = {found["name"]: found["layout"] for found in _ALIAS.finditer(ttgir)}
    found = {_product(match["op"], match["operands"]) for match in _DOT.finditer(ttgir)}
    for match in _SUM.finditer(ttgir):
        operand = _OPERAND.search(match["types"])
        if operand is None or not re.search(r"arith\.(addf|mulf)", match["body"]):
            continue
        axis = int(match["axis"])
        extent = int(operand["shape"].split("x")[axis])
        if extent <= 2:
            continue
        dealt = _along(_resolved(operand["layout"], aliases), axis)
        found.add(f"{match['op']} of {extent} {operand['dtype']}: {dealt}")
    return sorted(found)


def _product(op: str, operands: str) -> str:
    """A product and, where a thread of a warp holds its operands, how many columns it holds side by side."""
    widths = _WIDTH.findall(operands) if op == "tt.dot" else []
    return f"{op} kWidth {'×'.join(widths)}" if widths else op


def _resolved(layout: str, aliases: dict[str, str]) -> str:
    return re.sub(r"#\w+(?![\w.])", lambda name: aliases.get(name[0], name[0]), layout)


def _along(layout: str, axis: int) -> str:
    """The part of a layout that concerns one axis."""
    while sliced := _SLICE.match(layout):
        axis += axis >= int(sliced["dim"])
        layout = sliced["parent"]
    kind = layout.partition("<")[0]
    parts: list[str] = []
    for field in _FIELD.finditer(layout):
        if field["name"] == "order":
            continue
        rows = re.findall(r"\[([\d, ]+)\]", field["values"])
        values = [[int(value) for value in row.split(",")] for row in rows]
        if field["values"].startswith("[["):
            kept = [value[axis] for value in values if value[axis]]
        else:
            kept = [values[0][axis]] if values and axis < len(values[0]) else []
        parts.append(f"{field['name']} {kept}")
    return f"{kind} {', '.join(parts)}"
