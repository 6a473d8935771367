"""What may follow a text, by what followed its last tokens where they stood before."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush, nlargest
from itertools import islice
from typing import NamedTuple

import torch
from torch.nn import functional

from ..kernels.host import ints
from ..kernels.reference.lookup import GAP, LONGER, OWN

# Occurrences that vote: some tokens stand everywhere.
MOST = 128


class Text:
    """Tokens, and the places where each of them stands, in order."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._places: dict[int, list[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._places.setdefault(token, []).append(len(self.tokens))
            self.tokens.append(token)

    def ends(self, text: Text, max_ngram: int, most: int) -> list[tuple[int, int]]:
        """Where the last token of `text` stands before the end of this text, or anywhere in another one.

        Each place after the number of tokens up to it that match, at most `max_ngram`: the `most` longest matches, of
        equally long ones the newest, in this order.
        """
        found, whole = list[tuple[int, int]](), 0
        places = self._places.get(text.tokens[-1], [])
        for place in islice(reversed(places), 1 if self is text else 0, None):
            length = self._match(place, text.tokens, max_ngram)
            found.append((length, place))
            whole += length == max_ngram
            if whole == most:
                break
        return nlargest(most, found)

    def _match(self, place: int, tokens: list[int], most: int) -> int:
        length, most = 1, min(most, len(tokens), place + 1)
        while length < most and self.tokens[place - length] == tokens[-1 - length]:
            length += 1
        return length


class Memory:
    """The newest `size` tokens of finished texts, with a `GAP` before each text.

    `tokens` int32 [size] has them and a `GAP` for each that is missing: a new tensor whenever a text is added.
    """

    def __init__(self, size: int) -> None:
        self._count = 0
        self._text: Text | None = None
        self.tokens = torch.full((size,), GAP, dtype=torch.int32)

    @property
    def text(self) -> Text:
        """The same with its places, which only the host looks for."""
        if self._text is None:
            self._text = Text(ints(self.tokens[: self._count]))
        return self._text

    def add(self, text: list[int]) -> None:
        """Remember a text; the oldest tokens are forgotten for it."""
        size = len(self.tokens)
        new = torch.tensor([GAP, *text], dtype=torch.int32)
        fits = self._count + len(new) <= size
        kept = torch.cat([self.tokens[: self._count], new])[-size:] if size else self.tokens
        self._count = len(kept)
        self.tokens = functional.pad(kept, (0, size - self._count), value=GAP)
        if self._text is not None and fits:
            self._text.extend([GAP, *text])
        else:
            self._text = None


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


def newest(text: Text, max_ngram: int, count: int) -> Guess:
    """What followed the most recent earlier occurrence of the longest n-gram that ends the text: `count` tokens.

    Where the text runs out before, it is taken to repeat from the match on. The n-gram has at most `max_ngram` tokens.
    """
    found = text.ends(text, max_ngram, 1)
    if not found:
        return Guess(0, [], [])
    length, place = found[0]
    follows = text.tokens[place + 1 :]
    return Guess(length, [follows[i % len(follows)] for i in range(count)], list(range(count)))


# Occurrences that a draft has followed so far: the text, the place of the last token, and the weight.
_Votes = list[tuple[Text, int, int]]


def likeliest(text: Text, max_ngram: int, count: int, memory: Text | None = None, *, tree: bool = False) -> Guess:
    """What followed earlier occurrences of the last n-gram and of its endings, as a vote: at most `count` nodes.

    The `MOST` longest matches vote, of equally long ones the newest, and as many in `memory`, texts of other requests
    with a `GAP` between them. One has a weight of `LONGER` to the number of tokens that match, at most `max_ngram`, and
    in the text itself `OWN` times that in `memory`. A child's chance is its parent's times its share of the weight, of
    which `OWN` is set aside for what was never seen. A chain goes on with the heaviest child, and ends where that is
    the end of a text; a tree takes the node of the highest chance that is left, wherever it is.
    """
    longest, votes = 0, _Votes()
    for source, worth in ((memory, 1), (text, OWN)):
        for length, place in source.ends(text, max_ngram, MOST) if source is not None else ():
            longest = max(longest, length)
            votes.append((source or text, place, worth * LONGER ** (length - 1)))
    tokens, parent = list[int](), list[int]()
    open_nodes: list[tuple[float, int, int, int, _Votes]] = []

    def expand(row: int, chance: float, votes: _Votes) -> None:
        sums, below = dict[int, int](), dict[int, _Votes]()
        for source, place, weight in votes:
            inside = place + 1 < len(source.tokens)
            if inside or source is not text:
                token = source.tokens[place + 1] if inside else GAP
                sums[token] = sums.get(token, 0) + weight
                below.setdefault(token, []).append((source, place + 1, weight))
        total = sum(sums.values()) + OWN
        ranked = sorted(sums, key=lambda token: (-sums[token], token))
        for token in [token for token in ranked if token != GAP][:count] if tree else ranked[:1]:
            if token != GAP:
                share = chance * (sums[token] / total)
                heappush(open_nodes, (-share, len(tokens), token, row, below[token]))

    expand(0, 1.0, votes)
    while open_nodes and len(tokens) < count:
        chance, _, token, row, votes = heappop(open_nodes)
        tokens.append(token)
        parent.append(row)
        expand(len(tokens), -chance, votes)
    return Guess(longest, tokens, parent)
