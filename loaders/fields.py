"""Strictly typed, range-checked reads of the fields of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .errors import ConfigError
from .json_files import as_list, as_object, shown


class _Required:
    pass


REQUIRED: Final = _Required()


class Fields:
    """A JSON object whose reads name the file and the field when they refuse.

    A field with a default may be absent; null counts as absent only in the `optional_*` reads.
    """

    def __init__(self, values: Mapping[str, object], source: str, prefix: str = "") -> None:
        self.values = values
        self.source = source
        self.prefix = prefix

    def refuse(self, name: str, expected: str, found: object) -> ConfigError:
        return ConfigError(f"{self.source}: {self.prefix}{name}: expected {expected}, found {shown(found)}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def _value(self, name: str, default: object, expected: str) -> object:
        if name in self.values:
            return self.values[name]
        if isinstance(default, _Required):
            raise ConfigError(f"{self.source}: {self.prefix}{name}: expected {expected}, found no such field")
        return default

    def integer(self, name: str, low: int, high: int, default: int | _Required = REQUIRED) -> int:
        expected = f"an integer from {low} to {high}"
        value = self._value(name, default, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, expected, value)
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return self.integer(name, low, high) if self.has(name) else None

    def number(self, name: str, low: float, high: float, default: float | _Required = REQUIRED) -> float:
        expected = f"a number from {low:g} to {high:g}"
        value = self._value(name, default, expected)
        # Compared before the conversion: an integer beyond the range of floats overflows in it.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.refuse(name, expected, value)
        return float(value)

    def boolean(self, name: str, default: bool | _Required = REQUIRED) -> bool:
        value = self._value(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false", value)
        return value

    def text(self, name: str, default: str | _Required = REQUIRED) -> str:
        value = self._value(name, default, "a string")
        if not isinstance(value, str):
            raise self.refuse(name, "a string", value)
        return value

    def optional_list(self, name: str, longest: int) -> list[object] | None:
        if not self.has(name):
            return None
        entries = as_list(self.values[name])
        if entries is None or len(entries) > longest:
            raise self.refuse(name, f"a list of at most {longest} entries", self.values[name])
        return entries

    def optional_object(self, name: str) -> Fields | None:
        if not self.has(name):
            return None
        values = as_object(self.values[name])
        if values is None:
            raise self.refuse(name, "an object", self.values[name])
        return Fields(values, self.source, f"{self.prefix}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; null or absent is none."""
        value = self.values.get(name)
        if value is None:
            return ()
        entries = as_list(value)
        ids: list[int] = []
        for entry in [value] if entries is None else entries:
            if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry < 2**31 or len(ids) >= 256:
                raise self.refuse(name, "a token id or a list of at most 256 token ids", value)
            ids.append(entry)
        return tuple(dict.fromkeys(ids))
