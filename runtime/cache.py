"""The paged key-value cache: one owner of every page."""

from __future__ import annotations

import math

import torch

from .errors import CapacityError


class KVCache:
    """Keys and values [layers, pages, kv_heads, page_size, head_dim] of every sequence.

    A sequence is a list of page numbers and a count of valid slots that its owner keeps; slots past the count are free
    for a round's draft, so rolling back is not advancing. Page 0 belongs to nobody: padding rows write there. Pages
    are shared by `fork` and return when their last holder releases them.
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
        self._zero([0])
        self.page_size = page_size
        self._holders = [0] * (pages + 1)
        self._free = list(range(pages, 0, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def total_pages(self) -> int:
        return len(self._holders) - 1

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` slots."""
        return -(-tokens // self.page_size)

    def reserve(self, tokens: int) -> list[int]:
        """Take zeroed pages for `tokens` slots.

        Raises:
            CapacityError: not enough pages are free; nothing is taken.
        """
        needed = self.pages_for(tokens)
        if needed > len(self._free):
            raise CapacityError(
                f"the KV cache has {len(self._free)} of {self.total_pages} pages free and {tokens} tokens need "
                f"{needed} of {self.page_size} slots each: shorten the request or raise cache_tokens"
            )
        pages = [self._free.pop() for _ in range(needed)]
        for page in pages:
            self._holders[page] = 1
        self._zero(pages)
        return pages

    def fork(self, pages: list[int], length: int, tokens: int) -> list[int]:
        """Pages of a new sequence of up to `tokens` slots that starts as the first `length` slots of `pages`.

        Full pages are shared, the partial one is copied, the rest is new.
        """
        full = length // self.page_size
        own = self.reserve(tokens - full * self.page_size)
        if length % self.page_size:
            self.keys[:, own[0]].copy_(self.keys[:, pages[full]])
            self.values[:, own[0]].copy_(self.values[:, pages[full]])
        for page in pages[:full]:
            self._holders[page] += 1
        return pages[:full] + own

    def release(self, pages: list[int]) -> None:
        """Give pages back; each returns to the pool with its last holder."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
        pages.clear()

    def _zero(self, pages: list[int]) -> None:
        """Whatever an earlier holder left, NaN included, must not reach a masked sum."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        self.keys.index_fill_(1, index, 0.0)
        self.values.index_fill_(1, index, 0.0)
