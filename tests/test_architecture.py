"""Imports point one way, rooms stay small, and every op table has the same signatures."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from skipjack.kernels import ops

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "skipjack": {"runtime"},
    "runtime": {"kernels", "loaders"},
    "kernels": set(),
    "loaders": set(),
    "bench": {"skipjack", "runtime", "kernels", "loaders"},
}
FILES = [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]


def modules(path: Path) -> list[list[str]]:
    """The modules a file imports from, each as its names."""
    found: list[str] = []
    parts = path.relative_to(ROOT).parts
    package = ["skipjack", *parts[:-1]] if parts[0] != "skipjack" else list(parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append(".".join([*base, *([node.module] if node.module else [])]))
    return [name.split(".") for name in found]


def imports(path: Path) -> list[str]:
    """The rooms a file imports from, its own included."""
    names = [name for name in modules(path) if name[0] == "skipjack"]
    return [name[1] if len(name) > 1 and name[1] in ALLOWED else "skipjack" for name in names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert set(imports(path)) <= ALLOWED[room] | {room}


COMMANDS, SERVER = ["skipjack", "runtime", "commands"], ["skipjack", "runtime", "server"]
LIBRARY = [path for path in FILES if path.parent.name != "commands" and path.relative_to(ROOT).parts[0] != "bench"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_knows_neither_the_command_line_nor_the_server(path: Path) -> None:
    known = [name[:3] for name in modules(path)]
    assert COMMANDS not in known
    assert SERVER not in known or path.parent.name == "server"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_small_and_relative(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    if path.relative_to(ROOT).parts[0] in ("runtime", "kernels", "loaders"):
        assert "from skipjack" not in text
        assert "import skipjack" not in text


def test_every_folder_is_packaged() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for folder in {path.parent.relative_to(ROOT).as_posix() for path in FILES}:
        assert f'"{folder}"' in setup
        name = folder if folder == "skipjack" else f"skipjack.{folder.replace('/', '.')}"
        assert f'        "{name}",\n' in setup, f"{name} is not among the packages"


def test_op_signatures_are_those_of_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    names = [field.name for field in dataclasses.fields(ops.Ops) if callable(getattr(ops.TORCH, field.name))]
    assert len(names) >= 15
    for name in set(names) - {"describe"}:
        mine, reference = (getattr(table, name) for table in (ops.select("triton"), ops.TORCH))
        assert inspect.signature(mine) == inspect.signature(reference), name
