"""A bounded collection that forgets what was not used for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, MutableMapping
from typing import TypeVar, cast
from weakref import WeakValueDictionary

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(MutableMapping[K, V]):
    """The `limit` values used last, the one of `pinned`, and those that somebody still holds."""

    def __init__(self, limit: int, pinned: K) -> None:
        self._limit, self._pinned = limit, pinned
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._held: WeakValueDictionary[K, V] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[K]:
        return iter(self._kept)

    def __contains__(self, key: object) -> bool:
        """Whether it is there; it counts as used, and is there when it is asked for next."""
        known = cast("K", key)
        value = self._kept.get(known) or self._held.get(known)
        if value is not None:
            self[known] = value
        return value is not None

    def __getitem__(self, key: K) -> V:
        return self._kept[key]

    def __setitem__(self, key: K, value: V) -> None:
        self._kept[key] = self._held[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > self._limit:
            del self._kept[next(old for old in self._kept if old != self._pinned)]

    def __delitem__(self, key: K) -> None:
        del self._kept[key]
        self._held.pop(key, None)

    def clear(self) -> None:
        self._kept.clear()
        self._held.clear()
