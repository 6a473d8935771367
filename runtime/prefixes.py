"""The prefix cache: prompts whose keys and values lie in pages that nobody has taken since they were read."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import numpy.typing as npt

# Prompts that are known at most, and the tokens in common that are worth a copy.
MOST, LEAST = 128, 16


@dataclass(eq=False)
class _Prompt:
    """A prompt, the pages it was read into, and how many of its first tokens still lie there."""

    kind: Hashable
    tokens: npt.NDArray[np.int64]
    pages: list[int]
    whole: int = field(init=False)

    def __post_init__(self) -> None:
        self.whole = len(self.tokens)


class Prefixes:
    """Which prompt lies in which pages of a cache; those of requests under way and of requests that have ended.

    The pages have their owners, or are free, as ever: what is known of one ends when it is taken anew. Prompts of one
    `kind` were read alike. What a prompt has in common with another is the same, bit for bit, wherever it was read.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._prompts = deque[_Prompt](maxlen=MOST)
        self._places: dict[int, tuple[_Prompt, int]] = {}

    def add(self, kind: Hashable, tokens: list[int], pages: list[int]) -> None:
        """A prompt has been read into the first of these pages."""
        prompt = _Prompt(kind, np.array(tokens), pages[: -(-len(tokens) // self._page_size)])
        self._places |= {page: (prompt, number) for number, page in enumerate(prompt.pages)}
        # Last, for an interrupt before this must not leave one that is found and never forgotten.
        self._prompts.append(prompt)

    def longest(self, kind: Hashable, tokens: list[int]) -> tuple[list[int], int]:
        """Pages that begin with as many of the tokens as any known prompt does, but never with all, and how many."""
        wanted, found = np.array(tokens[:-1]), (list[int](), 0)
        for prompt in reversed(self._prompts):
            most = min(prompt.whole, len(wanted))
            if prompt.kind == kind and most > found[1]:
                differ = np.flatnonzero(prompt.tokens[:most] != wanted[:most])
                alike = int(differ[0]) if len(differ) else most
                if alike > found[1]:
                    found = prompt.pages, alike
        return found if found[1] >= LEAST else ([], 0)

    def known(self, pages: Iterable[int]) -> int:
        """How many of the first of these pages a prompt lies in."""
        return sum(1 for _ in takewhile(self._places.__contains__, pages))

    def forget(self, pages: Iterable[int]) -> None:
        """These pages are taken anew: of the prompts in them only what lies before is left."""
        for page in pages:
            if (place := self._places.get(page)) is not None:
                # First, for after an interrupt the page may be taken again, and must be found again.
                prompt, number = place
                prompt.whole = min(prompt.whole, number * self._page_size)
                del self._places[page]
