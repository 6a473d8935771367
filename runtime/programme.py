"""The dynamic programme that finds what to draft without (CLaSp, arXiv 2505.24196; KnapSpec, arXiv 2602.20217)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.host import ints
from ..kernels.values import Tree
from .batch import Round
from .cache import KVCache
from .laid import Pass
from .model import Model
from .rows import Rows

# States that run at a time; their keys and values need as many slots.
MAX_ROWS = 256


class Token(NamedTuple):
    """A token of the full model's: the pages of its sequence, its place there, and its residual streams [2L + 1, H].

    `pages` is the sequence's own list: it is empty once they were given back.
    """

    pages: list[int]
    position: int
    streams: Tensor


class Unit(NamedTuple):
    """Consecutive sub-layers that are skipped together, for `weight` of the budget; fixed ones never are."""

    sublayers: tuple[int, ...]
    weight: int
    fixed: bool


class State(NamedTuple):
    """The best way found to skip `weight`: the sub-layers, and the cosine to the full model summed over the tokens."""

    weight: int
    skipped: tuple[int, ...]
    score: float


class Programme:
    """Skip sets of every weight up to `budget` whose residual streams stay closest to the full model's.

    With x_i the full model's stream before unit i, g(i, 0) = x_i, and g(i, j) is whichever of unit i - 1 run on
    g(i - 1, j) and g(i - 1, j - its weight) has the larger cosine to x_i, summed over the tokens; a tie skips. A state
    whose mean cosine falls below `floor` is dropped. Every state is a row at its token's position, which sees the full
    model's keys and values before it and its own. `states` and `hidden` [n, T, H] are those after `done` units, the
    lightest first.
    """

    def __init__(self, units: list[Unit], budget: int, tokens: list[Token], floor: float = -1.0) -> None:
        self.units = units
        self.done = 0
        self.states = [State(0, (), float(len(tokens)))]
        self._budget = budget
        self._floor = floor
        owners = {id(token.pages): token.pages for token in tokens}
        tokens = [token for owner in owners for token in tokens if id(token.pages) == owner]
        self._pages = list(owners.values())
        device = tokens[0].streams.device
        self._owner = torch.tensor([list(owners).index(id(token.pages)) for token in tokens], device=device)
        self._position = torch.tensor([token.position for token in tokens], device=device)
        self.streams = torch.stack([token.streams for token in tokens], dim=1)
        self.hidden = self.streams[:1]

    @property
    def finished(self) -> bool:
        return self.done == len(self.units)

    def advance(self, model: Model, cache: KVCache) -> None:
        """One unit further.

        Raises:
            CapacityError: no page is free; nothing has changed.
        """
        unit = self.units[self.done]
        exact = self.streams[unit.sublayers[-1] + 1]
        run = torch.cat([exact[None], self._run(model, cache, unit)])
        room = self._budget - unit.weight
        light = [] if unit.fixed else [i for i, state in enumerate(self.states) if state.weight <= room]
        options = torch.cat([run, self.hidden[light]])
        cosine = functional.cosine_similarity(options.float(), exact.float(), dim=-1).sum(dim=1).cpu()
        best: dict[int, tuple[State, int]] = {}
        for option, i in enumerate(light, len(self.states)):
            weight, skipped, _ = self.states[i]
            state = State(weight + unit.weight, skipped + unit.sublayers, float(cosine[option]))
            best[state.weight] = state, option
        for option, state in enumerate(self.states):
            score = float(cosine[option])
            if state.weight not in best or score > best[state.weight][0].score:
                best[state.weight] = state._replace(score=score), option
        least = self._floor * len(self._position)
        kept = [best[weight] for weight in sorted(best) if weight == 0 or best[weight][0].score >= least]
        self.states = [state for state, _ in kept]
        self.hidden = options[[option for _, option in kept]]
        self.done += 1

    def _run(self, model: Model, cache: KVCache, unit: Unit) -> Tensor:
        """The streams [n - 1, T, H] of all states but the first after `unit`."""
        states = len(self.states) - 1
        # Rows come sorted by sequence.
        order = torch.argsort(self._owner.repeat(states), stable=True)
        owner, position = self._owner.repeat(states)[order], self._position.repeat(states)[order]
        before = self.hidden[1:].flatten(0, 1)
        after = torch.empty_like(before)
        size = min(MAX_ROWS, max(1, cache.free_pages) * cache.page_size)
        for at in range(0, len(order), size):
            part = slice(at, at + size)
            with lay_states(model, cache, self._pages, owner[part], position[part]) as laid:
                count = len(order[part])
                x = functional.pad(before[order[part]], (0, 0, 0, len(laid.rows) - count))
                for sublayer in unit.sublayers:
                    model.step(laid, cache, sublayer, x)
                after[order[part]] = x[:count]
        return after.view(states, *self.hidden.shape[1:])


@contextmanager
def lay_states(
    model: Model, cache: KVCache, pages: list[list[int]], owner: Tensor, position: Tensor
) -> Generator[Pass, None, None]:
    """A pass over rows int64 [R] that are each alone at their `position` of the sequence in pages[owner].

    Their keys and values go to pages of their own, which are given back at the end.

    Raises:
        CapacityError: there are not enough of them.
    """
    count, width = len(owner), max(map(len, pages))
    with cache.lent(count) as scratch:
        table = torch.tensor([own + [0] * (width - len(own)) + scratch for own in pages], device=owner.device)
        slot = width * cache.page_size + torch.arange(count, device=owner.device)
        tile = model.ops.tile_of(count)
        tree = Tree(position, slot[:, None])
        yield model.lay(Rows(torch.zeros_like(owner), position, owner, table, tile, slot, tree), cache)


def rehearse(model: Model, cache: KVCache) -> list[Tensor]:
    """Passes over 1, 2, 4, … states, as many as run at a time: their residual streams [R, H]."""
    left = list[Tensor]()
    with cache.lent(1) as pages:
        for power in range(min(MAX_ROWS, cache.free_pages * cache.page_size).bit_length()):
            owner = torch.zeros(1 << power, dtype=torch.int64, device=model.device)
            with lay_states(model, cache, [pages], owner, owner) as laid:
                x = model.embed(laid)
                model.run(laid, cache, model.full, x)
                left.append(x[: len(owner)])
    return left


def accepted_tokens(done: Round) -> list[list[Token]]:
    """For each sequence of a recorded round of chains, the tokens of it the cache has kept, oldest first."""
    if done.streams is None:
        return []
    sequences, rows = done.path.shape
    streams = torch.stack([stream.view(sequences, rows, -1) for stream in done.streams], dim=2)
    last, first = ints(done.verdict.accepted), ints(done.batch.length)
    return [
        [Token(sequence.pages, first[s] + row, streams[s, row]) for row in range(last[s] + 1)]
        for s, sequence in enumerate(done.batch.sequences)
    ]
