"""How large the values of a chat template may grow, measured before the operation that would make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any, Final, cast

import jinja2

MAX_VALUE: Final = 4_000_000
_ENTRY_WEIGHT: Final = 16
_MAX_ARGUMENT: Final = 1_000_000
_MAX_INDENT: Final = 64
_WIDE_FORMAT: Final = re.compile(r"\d{4}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


class TemplateLimitError(jinja2.TemplateError):
    """A template used more time, output or memory than it may."""


def weight(value: object) -> int:
    """How much memory and time printing a value could take: its characters, and sixteen for each other entry;
    shared ones count each time."""
    total = 0
    pending: list[Iterable[object]] = [(value,)]
    while pending:
        for item in pending.pop():
            total += len(item) if isinstance(item, str) else _ENTRY_WEIGHT
            if isinstance(item, dict):
                pending += [cast("dict[object, object]", item).keys(), cast("dict[object, object]", item).values()]
            elif isinstance(item, (list, tuple, set, frozenset)):
                pending.append(cast("list[object]", item))
            if total > MAX_VALUE:
                raise TemplateLimitError(f"a value of more than {MAX_VALUE} characters or entries")
    return total


def settled(value: Any, checkpoint: Callable[[], None]) -> Any:
    """The value itself, or the list of what a generator yields, weighed while it grows."""
    if not isinstance(value, GeneratorType):
        return value
    items: list[object] = []
    total = 0
    for item in cast("Iterable[object]", value):
        checkpoint()
        total += weight(item)
        if total > MAX_VALUE:
            raise TemplateLimitError(f"a value of more than {MAX_VALUE} characters or entries")
        items.append(item)
    return items


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_ARGUMENT:
            raise TemplateLimitError(f"an argument beyond {_MAX_ARGUMENT}")


def check_text_method(text: str, method: str, args: tuple[Any, ...]) -> None:
    if method == "replace" and len(args) >= 2:
        _check_replace(text, args[0], args[1])
    elif method == "join" and args:
        _check_join(text, args[0])


def check_filter(name: str, value: Any, rest: list[Any], kwargs: dict[str, Any]) -> None:
    if name == "replace" and len(rest) >= 2:
        _check_replace(str(value), str(rest[0]), str(rest[1]))
    elif name == "join":
        _check_join(str(rest[0] if rest else kwargs.get("d", "")), value)
    elif name == "format":
        check_format(str(value))
    elif name in ("int", "float") and isinstance(value, str) and len(value) > 4000:
        raise TemplateLimitError("a number of more than 4000 characters")
    elif name in ("indent", "tojson"):
        widths = [width for width in (*rest, *kwargs.values()) if isinstance(width, (int, str))]
        if any((width if isinstance(width, int) else len(width)) > _MAX_INDENT for width in widths):
            raise TemplateLimitError(f"an indent of more than {_MAX_INDENT}")


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str) and len(text) + text.count(old) * len(new) > MAX_VALUE:
        raise TemplateLimitError(f"a value of more than {MAX_VALUE} characters")


def _check_join(separator: str, values: Any) -> None:
    if hasattr(values, "__len__") and len(separator) * len(values) + weight(values) > MAX_VALUE:
        raise TemplateLimitError(f"a value of more than {MAX_VALUE} characters")


def check_format(pattern: str) -> None:
    if _WIDE_FORMAT.search(pattern) or len(pattern) > 4000:
        raise TemplateLimitError("a format of more than 4000 characters, or with a width of four digits or an argument")
