"""What may follow a text, by what followed its last tokens where they stood before."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

# Between texts that do not follow each other: no token.
GAP = -1
# How much more an occurrence counts for every further token that matches, and for belonging to the text itself.
LONGER, OWN = 4.0, 10.0


class Guess(NamedTuple):
    """Tokens that may follow, as a tree: node j follows row parent[j] ≤ j, row 0 being the text and row j + 1 node j.

    `match` is the length of the longest n-gram found, 0 where there was none.
    """

    match: int
    tokens: list[int]
    parent: list[int]

    def first(self, count: int) -> Guess:
        """The same without what comes after `count` nodes."""
        return Guess(self.match, self.tokens[:count], self.parent[:count])


class Memory:
    """The newest `size` tokens of finished texts, with a `GAP` before each text."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.tokens: Tokens = np.empty(0, dtype=np.int64)

    def add(self, text: list[int]) -> None:
        """Remember a text; the oldest tokens are forgotten for it."""
        if self._size:
            self.tokens = np.concatenate([self.tokens, [GAP], np.asarray(text, dtype=np.int64)])[-self._size :]


def newest(text: Tokens, max_ngram: int, count: int) -> Guess:
    """What followed the most recent earlier occurrence of the longest n-gram that ends the text: `count` tokens.

    Where the text runs out before, it is taken to repeat from the match on. The n-gram has at most `max_ngram` tokens.
    """
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        ends = np.flatnonzero((sliding_window_view(text[:-1], n) == text[-n:]).all(axis=1)) + n
        if len(ends):
            start = int(ends[-1])
            tokens = [int(text[start + i % (len(text) - start)]) for i in range(count)]
            return Guess(n, tokens, list(range(count)))
    return Guess(0, [], [])


def likeliest(text: Tokens, max_ngram: int, count: int, memory: Tokens | None = None, *, tree: bool = False) -> Guess:
    """What followed all earlier occurrences of the last n-gram and of its endings, as a vote: at most `count` nodes.

    An occurrence has a weight of `LONGER` to the number of tokens that match, at most `max_ngram`, and in the text
    itself `OWN` times that in `memory`, texts of other requests with a `GAP` between them. A child's chance is its
    parent's times its share of the weight, of which `OWN` is set aside for what was never seen. A chain goes on with
    the heaviest child; a tree takes the node of the highest chance that is left, wherever it is.
    """
    known = 0 if memory is None else len(memory) + 1
    whole = text if memory is None else np.concatenate([memory, [GAP], text])
    at = np.flatnonzero(whole[:-1] == whole[-1])
    length, same = np.ones(len(at), dtype=np.int64), np.ones(len(at), dtype=bool)
    for back in range(1, min(max_ngram, len(text))):
        same &= (at >= back) & (whole[at - back] == whole[-1 - back])
        length += same
    weight = np.asarray(LONGER ** (length - 1.0) * np.where(at >= known, OWN, 1.0), dtype=np.float64)
    tokens, parent = list[int](), list[int]()
    open_nodes: list[tuple[float, int, int, int, Tokens, NDArray[np.float64]]] = []

    def expand(row: int, chance: float, at: Tokens, weight: NDArray[np.float64]) -> None:
        inside = at + 1 < len(whole)
        at, weight = at[inside] + 1, weight[inside]
        total = weight.sum() + OWN
        next_tokens, which = np.unique(whole[at], return_inverse=True)
        sums = np.bincount(which, weight, len(next_tokens))
        for child in np.argsort(-sums, kind="stable")[: count if tree else 1]:
            token, own = int(next_tokens[child]), which == child
            if token != GAP:
                share = chance * float(sums[child] / total)
                heapq.heappush(open_nodes, (-share, len(tokens), token, row, at[own], weight[own]))

    expand(0, 1.0, at, weight)
    while open_nodes and len(tokens) < count:
        chance, _, token, row, at, weight = heapq.heappop(open_nodes)
        tokens.append(token)
        parent.append(row)
        expand(len(tokens), -chance, at, weight)
    return Guess(int(length.max()) if len(length) else 0, tokens, parent)
