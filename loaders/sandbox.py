"""A Jinja environment in which a hostile chat template ends: time, output and every intermediate value are bounded.

Jinja's sandbox keeps a template away from Python; it does not keep it from looping or allocating. Here every
statement, loop turn, call, filter, test, comparison and slice passes a checkpoint, and every operation that can
multiply sizes is measured before it runs.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .template_checkpoints import Checkpoints
from .template_limits import (
    MAX_VALUE,
    TemplateLimitError,
    check_arguments,
    check_filter,
    check_format,
    check_text_method,
    settled,
    weight,
)

MAX_SECONDS: Final = 0.5
# What a template may make of a chat, which is tokenized after it: so many characters more, or times as many.
MAX_ADDED: Final = 250_000
MAX_GROWTH: Final = 16
_MAX_INTEGER_BITS: Final = 4096
_UNBOUNDED_METHODS: Final = frozenset({"expandtabs", "translate", "maketrans", "encode", "format_map"})
_FILTERS: Final = """
    abs attr batch capitalize count d default dictsort e escape first float format groupby indent int items join last
    length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string
    title trim truncate unique upper wordcount
"""


class TemplateNamespace(Namespace):
    """`namespace()` whose text does not grow with what it holds, and that keeps no underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError("namespace: names must not begin with an underscore")


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's tokens for training; here its body is all that matters."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, with limits. Not for concurrent use: one render at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            optimized=False,  # constant folding would evaluate before the clock runs
            finalize=_finalize,
        )
        self._deadline = self._worked = 0.0
        self._characters = self._room = 0
        self.globals = {
            "range": self.globals["range"],
            "namespace": TemplateNamespace,
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        filters: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS.split()}
        filters |= {"tojson": _tojson, "sum": _sum}
        self.filters = {name: self._guarded_filter(name, function) for name, function in filters.items()}
        self.tests = {name: self._guarded_test(function) for name, function in self.tests.items()}

    def compiled(self, source: str) -> jinja2.Template:
        """Compile a template. Raises jinja2.TemplateError, RecursionError and what Python's compiler raises."""
        self.start()
        tree = self.parse(source)
        Checkpoints().visit(tree)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def start(self, characters: int = 0) -> None:
        """Begin the time and the output of one render, of a chat of so many characters."""
        self._deadline, self._worked = time.monotonic() + MAX_SECONDS, time.thread_time() + MAX_SECONDS
        self._characters, self._room = 0, MAX_ADDED + MAX_GROWTH * characters

    def checkpoint(self, characters: int = 0) -> None:
        self._characters += characters
        if self._characters > self._room:
            raise TemplateLimitError(f"more than {self._room} characters of output")
        # What other threads and processes took meanwhile is not the template's. The clock of a thread is slow to ask.
        if time.monotonic() > self._deadline and time.thread_time() > self._worked:
            raise TemplateLimitError(f"more than {MAX_SECONDS:g} s")

    def passing(self, value: object) -> object:
        self.checkpoint()
        if not isinstance(value, str):
            weight(value)
        return value

    def joined(self, values: list[object]) -> str:
        self.checkpoint()
        weight(values)
        return "".join(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)  # Jinja adds keywords about the loop it stands in
        __self.checkpoint()
        check_arguments(args, kwargs)
        args = tuple(settled(value, __self.checkpoint) for value in args)
        receiver = getattr(__obj, "__self__", None)
        if isinstance(receiver, str):
            check_text_method(receiver, getattr(__obj, "__name__", ""), args)
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.passing(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.checkpoint()
        if operator == "%" and isinstance(left, str):
            check_format(left)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
            if bits > _MAX_INTEGER_BITS:
                raise TemplateLimitError(f"an integer of more than {_MAX_INTEGER_BITS} bits")
        elif operator == "*":
            sequence, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(count, int) and weight(sequence) * max(count, 1) > MAX_VALUE:
                raise TemplateLimitError(f"a value of more than {MAX_VALUE} characters or entries")
        elif operator == "+" and not isinstance(left, (int, float)):
            weight((left, right))
        return self.passing(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.checkpoint()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.checkpoint()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _UNBOUNDED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            check_format(value.__self__)
        return wrapped

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        shift = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.checkpoint()
            check_arguments(args, kwargs)
            args = tuple(settled(value, self.checkpoint) for value in args)
            value, *rest = args[shift:] or (None,)
            check_filter(name, value, rest, kwargs)
            return self.passing(function(*args, **kwargs))

        return guarded

    def _guarded_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.checkpoint()
            return function(*args, **kwargs)

        return guarded


@jinja2.pass_context
def _finalize(context: Context, value: object) -> str:
    environment = cast(BoundedEnvironment, context.environment)
    environment.checkpoint(weight(value))
    return str(value)


def _sum(values: Iterable[Any], attribute: str | None = None, start: Any = 0) -> Any:
    if attribute is not None or not isinstance(start, (int, float)):
        raise TemplateLimitError("sum of anything but numbers")
    return sum(values, start)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message)[:500])


def _strftime_now(pattern: str) -> str:
    check_format(pattern)
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    weight(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
