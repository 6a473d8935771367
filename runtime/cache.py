"""The paged key-value cache: one owner of every page."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Hashable
from contextlib import contextmanager
from itertools import islice, repeat, starmap
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .errors import CapacityError
from .prefixes import Prefixes

# Pages that a cache has beyond the tokens asked for: searches borrow them.
SPARE_PAGES = 4
# Pages that are copied at a time: a copy of all at once would take as much memory again.
COPIED_PAGES = 32


def pages_of(tokens: int, page_size: int) -> int:
    """The pages of a cache that is asked to hold `tokens`."""
    return -(-tokens // page_size) + SPARE_PAGES


def expect_room(tokens: int, pages: int, page_size: int) -> None:
    """Refuse, with a CapacityError, more slots than a cache has."""
    if tokens > pages * page_size:
        raise CapacityError(
            f"the request may grow to {tokens} tokens and the KV cache holds {pages * page_size}: "
            "lower max_tokens or raise cache_tokens (--cache-tokens)"
        )


class KVCache:
    """Keys and values [layers, pages, kv_heads, page_size, head_dim] of every sequence.

    A sequence is a list of page numbers and a count of valid slots that its owner keeps; slots past the count are free
    for a round's draft, so rolling back is not advancing. Page 0 belongs to nobody: padding rows write there. Every
    other page is free or in the list of its one owner. With `prefixes` free pages that a prompt was read into are taken
    last, the longest free first, and until then later prompts copy from them.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, pages + 1, kv_heads, page_size, head_dim)
        try:
            self.keys = torch.empty(shape, dtype=dtype, device=device)
            self.values = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            gib = 2 * math.prod(shape) * dtype.itemsize / 2**30
            raise CapacityError(
                f"a KV cache of {pages * page_size} tokens needs {gib:.1f} GiB, more than there is: set a lower "
                "cache_tokens (--cache-tokens)"
            ) from error
        # Of each layer, kept because a pass of few rows would feel how long it takes to look at a part of a tensor.
        self.by_layer = [(self.keys[i], self.values[i]) for i in range(layers)]
        self._annexes = WeakKeyDictionary[object, tuple[Tensor, Tensor]]()
        self._zero([0])
        self.page_size = page_size
        self.total_pages = pages
        self._free = list(range(pages, 0, -1))
        # Free ones that prompts lie in, the longest free last.
        self._kept = deque[int]()
        self.prefixes: Prefixes | None = None

    @property
    def free_pages(self) -> int:
        return len(self._free) + len(self._kept)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` slots."""
        return -(-tokens // self.page_size)

    def annex(self, owner: object, layers: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each of an owner's own `layers`, in the slots of the same pages for as long as it lives.

        Raises:
            CapacityError: there is no memory for them.
        """
        if owner not in self._annexes:
            shape = (layers, *self.keys.shape[1:])
            try:
                with torch.inference_mode(False):
                    keys, values = (self.keys.new_zeros(shape) for _ in range(2))
            except RuntimeError as error:
                gib = 2 * math.prod(shape) * self.keys.dtype.itemsize / 2**30
                raise CapacityError(
                    f"{layers} more layers in a KV cache of {self.total_pages * self.page_size} tokens need {gib:.1f} "
                    "GiB, more than there is: set a lower cache_tokens (--cache-tokens)"
                ) from error
            self._annexes[owner] = keys, values
        return list(zip(*self._annexes[owner], strict=True))

    @property
    def _parts(self) -> list[Tensor]:
        """All that has slots in the pages: [layers, pages, kv_heads, page_size, head_dim] each."""
        return [self.keys, self.values, *(part for annex in self._annexes.values() for part in annex)]

    def reserve(self, tokens: int, into: list[int] | None = None) -> list[int]:
        """Take zeroed pages for `tokens` slots; `into` is the list that is to hold them.

        An interrupt leaves every page free or in `into`, so whoever gives back that list in the end loses none.

        Raises:
            CapacityError: not enough pages are free; nothing is taken.
        """
        needed, pages = self.pages_for(tokens), [] if into is None else into
        if needed > self.free_pages:
            raise CapacityError(
                f"the KV cache has {self.free_pages} of {self.total_pages} pages free and {tokens} tokens need "
                f"{needed} of {self.page_size} slots each: shorten the request or raise cache_tokens"
            )
        blank = min(needed, len(self._free))
        taken = [*self._free[len(self._free) - blank :], *islice(reversed(self._kept), needed - blank)]
        if self.prefixes is not None:
            self.prefixes.forget(taken)
        # It takes a while, and they are nobody's yet.
        self._zero(taken)
        _move(blank, self._free, pages)
        _move(needed - blank, self._kept, pages)
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back."""
        known = 0 if self.prefixes is None else self.prefixes.known(pages)
        _move(len(pages) - known, pages, self._free)
        self._kept.extendleft(starmap(pages.pop, repeat((), len(pages))))

    def remember(self, kind: Hashable, prompt: list[int], pages: list[int]) -> None:
        """A prompt has been read into `pages`, as all of its `kind` are: later ones may begin like it."""
        if self.prefixes is not None:
            self.prefixes.add(kind, prompt, pages)

    def recall(self, kind: Hashable, prompt: list[int], pages: list[int]) -> int:
        """Copy into `pages` what a prompt has in common with one that lies somewhere, and return how many tokens.

        Never all, for the last is what the first token is chosen after.
        """
        source, tokens = ([], 0) if self.prefixes is None else self.prefixes.longest(kind, prompt)
        self.copy(source, pages, tokens)
        return tokens

    @contextmanager
    def lent(self, tokens: int) -> Generator[list[int]]:
        """Zeroed pages for `tokens` slots, given back at the end; raises as `reserve`."""
        pages: list[int] = []
        try:
            yield self.reserve(tokens, pages)
        finally:
            self.release(pages)

    @contextmanager
    def forked(self, pages: list[int], length: int, tokens: int) -> Generator[list[int]]:
        """Pages of another sequence of up to `tokens` slots that starts as the first `length` slots of `pages`.

        Full pages are those of `pages`, the partial one is copied, the rest is new; what is new is given back at the
        end. Raises as `reserve`.
        """
        full = length // self.page_size
        with self.lent(tokens - full * self.page_size) as own:
            if length % self.page_size:
                for part in self._parts:
                    part[:, own[0]].copy_(part[:, pages[full]])
            yield pages[:full] + own

    def copy(self, source: list[int], target: list[int], tokens: int) -> None:
        """Copy the first `tokens` slots of `source` to those of `target`, whose others stay zero."""
        count, part_of_last = self.pages_for(tokens), tokens % self.page_size
        for first in range(0, count, COPIED_PAGES):
            pages = [one[first : min(count, first + COPIED_PAGES)] for one in (source, target)]
            places = torch.tensor(pages, device=self.keys.device)
            for cached in self._parts:
                cached.index_copy_(1, places[1], cached.index_select(1, places[0]))
        if part_of_last:
            for cached in self._parts:
                cached[:, target[count - 1], :, part_of_last:] = 0.0

    def _zero(self, pages: list[int]) -> None:
        """Whatever an earlier holder left, NaN included, must not reach a masked sum."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        for part in self._parts:
            part.index_fill_(1, index, 0.0)


def _move(count: int, source: list[int] | deque[int], target: list[int]) -> None:
    """Move the last `count` in one step of the interpreter, before or after which a signal's handler may raise."""
    target.extend(starmap(source.pop, repeat((), count)))
