"""`skipjack methods`: which methods there are, and the options of each."""

from __future__ import annotations

import inspect
import sys
import typing
from dataclasses import MISSING, fields
from typing import Any

from ..methods import registry
from ..methods.base import Method


def describe(name: str) -> dict[str, Any]:
    """What a method is and takes, as JSON has it; its options by name, with the default as `--method` takes it.

    Raises:
        RequestError: there is no such method.
    """
    method = registry.find(name)
    return {
        "name": name,
        "lossless": method.lossless,
        "checkpoints": list(method.checkpoints),
        "about": _about(method),
        "options_about": [
            " ".join(part.split()) for part in inspect.cleandoc(method.options.__doc__ or "").split("\n\n")
        ],
        "options": _options(method.options),
    }


def every() -> list[dict[str, Any]]:
    """All of them, those of this version first."""
    return [describe(name) for name in (*registry.names(), *sorted(registry.outside()))]


def show(found: list[dict[str, Any]]) -> None:
    """A table of methods, or of the options of one, on standard output."""
    from rich.table import Table

    from .terminal import answers

    console = answers()
    if len(found) > 1:
        table = Table("method", "text", "what it does", box=None, pad_edge=False)
        for one in found:
            table.add_row(one["name"], "lossless" if one["lossless"] else "lossy", one["about"])
        console.print(table, markup=False)
        return
    (one,) = found
    kinds = ", ".join(one["checkpoints"])
    console.print(f"{one['name']} ({'lossless' if one['lossless'] else 'lossy'}). {one['about']}", markup=False)
    if kinds:
        console.print(f"For checkpoints of model_type {kinds}.", markup=False)
    if one["options"]:
        for part in one["options_about"]:
            console.print(f"\n{part}", markup=False)
        console.print()
        table = Table("option", "default", "expects", box=None, pad_edge=False)
        for key, option in one["options"].items():
            table.add_row(key, option["default"], option["expects"])
        console.print(table, markup=False)
        first = next(iter(one["options"]))
        console.print(f"\n--method {one['name']}:{first}=VALUE,…", markup=False)
    else:
        console.print("It has no options.", markup=False)


def _about(method: type[Method]) -> str:
    """The first line of its module, in which every method says what it is."""
    return (sys.modules[method.__module__].__doc__ or method.__doc__ or "").strip().partition("\n")[0]


def _options(options: type) -> dict[str, dict[str, str]]:
    expected = registry.expected(options)
    return {
        field.name: {
            "default": "" if field.default is MISSING else _written(field.default),
            "expects": expected[field.name],
        }
        for field in fields(options)
    }


def _written(value: object) -> str:
    """A value as `--method` takes it."""
    if isinstance(value, tuple):
        return "+".join(map(str, typing.cast("tuple[int, ...]", value)))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
