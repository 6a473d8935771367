"""The methods by name, and `name:key=value,…` as the command line and the API take it."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import UnionType
from typing import Any, TypeGuard, cast

from ...loaders.config import ModelConfig
from ..errors import RequestError
from . import (
    adaskip,
    auto,
    autoregressive,
    calm,
    clasp,
    conflayers,
    dmtd,
    dynamic_exit,
    flexidepth,
    kangaroo,
    knapspec,
    laco,
    layerskip,
    lookup,
    mindskip,
    quantized,
    shortgpt,
    skipdecode,
    static,
    swift,
    unified,
)
from .base import Method
from .checked import bounds

_METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        adaskip.AdaSkip,
        auto.Auto,
        autoregressive.Autoregressive,
        calm.Calm,
        clasp.Clasp,
        conflayers.ConfLayers,
        dynamic_exit.DynamicExit,
        dmtd.DirectMultiToken,
        flexidepth.FlexiDepth,
        kangaroo.Kangaroo,
        knapspec.KnapSpec,
        laco.LaCo,
        layerskip.LayerSkip,
        lookup.Lookup,
        mindskip.MindSkip,
        quantized.Quantized,
        shortgpt.ShortGPT,
        skipdecode.SkipDecode,
        static.Static,
        swift.Swift,
        unified.Unified,
    )
}
# The entry points by which a package adds methods of its own: `name = "package.module:Class"`.
GROUP = "skipjack.methods"

_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_EXPECTED: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple[int, ...]: "different integers joined with +",
}


@dataclass(frozen=True)
class MethodSpec:
    """A method's name and its options, hashable."""

    name: str
    options: Any

    @property
    def edits(self) -> bool:
        """Whether an engine must be loaded with it, and serves nothing else then."""
        return find(self.name).edits

    def build(self, config: ModelConfig) -> Method:
        """A fresh instance for a model of this shape.

        Raises:
            RequestError: the options do not fit it, or its checkpoint is made for another method.
        """
        mismatch = _mismatch(self.name, config.model_type)
        if mismatch:
            raise RequestError(mismatch)
        return find(self.name).fit(self.options, config)


@cache
def find(name: str) -> type[Method]:
    """The method of that name: one of this version, or else of an installed package.

    Raises:
        RequestError: there is none, or the package's does not load.
    """
    if name in _METHODS:
        return _METHODS[name]
    others = outside()
    if name not in others:
        known = ", ".join([*_METHODS, *others])
        raise RequestError(f"method: unknown method {name!r}, expected one of {known}")
    place = others[name].value
    try:
        method = others[name].load()
    except Exception as error:
        raise RequestError(f"method {name}: {place} does not load: {error}") from error
    if not _is_method(method, name):
        expected = "a subclass of Method with that name and a dataclass of options"
        raise RequestError(f"method {name}: expected {expected} at {place}, got {method!r}")
    return method


def _is_method(found: Any, name: str) -> TypeGuard[type[Method]]:
    if not isinstance(found, type) or not issubclass(found, Method):
        return False
    return vars(found).get("name") == name and is_dataclass(getattr(found, "options", None))


def outside() -> dict[str, EntryPoint]:
    """The methods that installed packages add, by name; none has the name of one of this version."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in _METHODS}


def names(model_type: str | None = None) -> list[str]:
    """The methods of this version; with `model_type`, those that run checkpoints of it."""
    return [name for name in _METHODS if model_type is None or _mismatch(name, model_type) is None]


def lossless() -> list[str]:
    """The methods of this version whose tokens are those of the full model."""
    return [name for name, method in _METHODS.items() if method.lossless]


def parse(text: str) -> MethodSpec:
    """Read `name` or `name:key=value,…`; lists are joined with +.

    Raises:
        RequestError: an unknown method or option, or a value of the wrong type.
    """
    if not isinstance(cast(object, text), str):
        raise RequestError(f"method: expected a name and options as text, got {text!r}")
    name, _, rest = text.partition(":")
    options = find(name).options
    types = _types(options)
    values: dict[str, object] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in types:
            known = ", ".join(types) or "none"
            raise RequestError(f"method {name}: unknown option {key!r}, known options: {known}")
        if not equals or key in values:
            raise RequestError(f"method {name}: expected {key}=VALUE once, got {item!r}")
        values[key] = _convert(name, key, value, types[key])
    return MethodSpec(name, options(**values))


def expected(options: type) -> dict[str, str]:
    """What each option's value may be, for people."""
    limits = {option: str(allowed) for option, allowed in bounds(options)}
    return {option: limits.get(option) or _told(kind) for option, kind in _types(options).items()}


def _told(kind: Any) -> str:
    return _EXPECTED.get(kind) or kind.__name__


@cache
def _types(options: type) -> dict[str, Any]:
    """The type a value of each option has; None, where it is the default, stands for no value."""
    hints = typing.get_type_hints(options)
    kinds = {field.name: hints[field.name] for field in fields(options)}
    return {key: typing.get_args(kind)[0] if isinstance(kind, UnionType) else kind for key, kind in kinds.items()}


def _mismatch(name: str, model_type: str) -> str | None:
    """Why a method cannot run checkpoints of a `model_type`: they, or it, are made for another; None if it can."""
    own = find(name).checkpoints
    owner = next((other for other, method in _METHODS.items() if model_type in method.checkpoints), None)
    if owner is not None and model_type not in own:
        return f"method: expected {owner}, which a {model_type} checkpoint is made for, got {name}"
    if own and owner is None:
        return f"method {name}: expected model_type {' or '.join(own)}, got {model_type}"
    return None


def _convert(method: str, key: str, value: str, kind: Any) -> object:
    try:
        if kind == tuple[int, ...]:
            numbers = tuple(int(part) for part in value.split("+") if part)
            if len(set(numbers)) < len(numbers):
                raise ValueError
            return numbers
        return _BOOLEANS[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise RequestError(f"method {method}: option {key} expects {_told(kind)}, got {value!r}") from None
