"""The methods by name, and `name:key=value,…` as the command line and the API take it."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from functools import cache
from types import UnionType
from typing import Any, cast

from ...loaders.config import ModelConfig
from ..errors import RequestError
from . import (
    auto,
    autoregressive,
    clasp,
    conflayers,
    dmtd,
    dynamic_exit,
    flexidepth,
    knapspec,
    laco,
    layerskip,
    lookup,
    mindskip,
    shortgpt,
    static,
    swift,
    unified,
)
from .base import Method

_METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "auto": (auto.Auto, auto.Options),
    "autoregressive": (autoregressive.Autoregressive, autoregressive.Options),
    "clasp": (clasp.Clasp, clasp.Options),
    "conflayers": (conflayers.ConfLayers, conflayers.Options),
    "del": (dynamic_exit.DynamicExit, dynamic_exit.Options),
    "dmtd": (dmtd.DirectMultiToken, dmtd.Options),
    "flexidepth": (flexidepth.FlexiDepth, flexidepth.Options),
    "knapspec": (knapspec.KnapSpec, knapspec.Options),
    "laco": (laco.LaCo, laco.Options),
    "layerskip": (layerskip.LayerSkip, layerskip.Options),
    "lookup": (lookup.Lookup, lookup.Options),
    "mindskip": (mindskip.MindSkip, mindskip.Options),
    "shortgpt": (shortgpt.ShortGPT, shortgpt.Options),
    "static": (static.Static, static.Options),
    "swift": (swift.Swift, swift.Options),
    "unified": (unified.Unified, unified.Options),
}


_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_EXPECTED: dict[Any, str] = {bool: "true or false", tuple[int, ...]: "different integers joined with +"}


@dataclass(frozen=True)
class MethodSpec:
    """A method's name and its options, hashable."""

    name: str
    options: Any

    @property
    def edits(self) -> bool:
        """Whether an engine must be loaded with it, and serves nothing else then."""
        return _METHODS[self.name][0].edits

    def build(self, config: ModelConfig) -> Method:
        """A fresh instance for a model of this shape.

        Raises:
            RequestError: the options do not fit it, or its checkpoint is made for another method.
        """
        mismatch = _mismatch(self.name, config.model_type)
        if mismatch:
            raise RequestError(mismatch)
        return _METHODS[self.name][0].fit(self.options, config)


def names(model_type: str | None = None) -> list[str]:
    """The methods of this version; with `model_type`, those that run checkpoints of it."""
    return [name for name in _METHODS if model_type is None or _mismatch(name, model_type) is None]


def lossless() -> list[str]:
    """The methods whose tokens are those of the full model."""
    return [name for name, (method, _) in _METHODS.items() if method.lossless]


def parse(text: str) -> MethodSpec:
    """Read `name` or `name:key=value,…`; lists are joined with +.

    Raises:
        RequestError: an unknown method or option, or a value of the wrong type.
    """
    if not isinstance(cast(object, text), str):
        raise RequestError(f"method: expected a name and options as text, got {text!r}")
    name, _, rest = text.partition(":")
    if name not in _METHODS:
        raise RequestError(f"method: unknown method {name!r}, expected one of {', '.join(_METHODS)}")
    options = _METHODS[name][1]
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


@cache
def _types(options: type) -> dict[str, Any]:
    """The type a value of each option has; None, where it is the default, stands for no value."""
    hints = typing.get_type_hints(options)
    kinds = {field.name: hints[field.name] for field in fields(options)}
    return {key: typing.get_args(kind)[0] if isinstance(kind, UnionType) else kind for key, kind in kinds.items()}


def _mismatch(name: str, model_type: str) -> str | None:
    """Why a method cannot run checkpoints of a `model_type`: they, or it, are made for another; None if it can."""
    own = _METHODS[name][0].checkpoints
    owner = next((other for other, (method, _) in _METHODS.items() if model_type in method.checkpoints), None)
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
        expected = _EXPECTED.get(kind, kind.__name__)
        raise RequestError(f"method {method}: option {key} expects {expected}, got {value!r}") from None
