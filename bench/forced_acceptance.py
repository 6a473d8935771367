"""Forced acceptance: rounds of any acceptance rate on random weights, for benchmarks of the round itself.

A table on the device decides how many draft tokens a round accepts, so everything but that decision runs as it would:
the tokens generated are those of the draft, and mean nothing. Nothing outside bench/ can turn it on.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.values import Verdict
from ..runtime.engine import Engine
from ..runtime.graphs import Graphs

ENTRIES = 1024


def accepted_counts(rate: float, entries: int = ENTRIES, seed: int = 0) -> Tensor:
    """Draft tokens accepted by rounds of unbounded length at rate α: P(n) = α^n·(1 − α), int64 [entries].

    The quantiles of the law at (i + ½)/entries in random order: their mean is that of the law, not of a small sample.
    """
    order = torch.randperm(entries, generator=torch.Generator().manual_seed(seed))
    quantile = (order.double() + 0.5) / entries
    return (quantile.log() / math.log(rate)).floor().long()


class ForcedVerify:
    """`verify` whose accepted counts come from `table` int64 [N], one entry a sequence and call, in turn."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._next = torch.zeros(1, dtype=torch.int64, device=table.device)

    def restart(self) -> None:
        """Take the table from its beginning again."""
        self._next.zero_()

    def __call__(
        self, target: Tensor, draft: Tensor, count: Tensor, length: Tensor, parent: Tensor | None = None
    ) -> Verdict:
        """As `kernels.reference.verify.verify`, of chains; a count is capped at what was drafted.

        Raises:
            ValueError: the draft is a tree.
        """
        if parent is not None:
            raise ValueError("forced acceptance: expected a chain, got a tree")
        each = torch.arange(len(count), device=count.device)
        accepted = torch.minimum(self._table[(self._next + each) % len(self._table)], count)
        self._next += len(count)
        path = torch.minimum(torch.arange(target.shape[1], device=count.device), accepted[:, None])
        return Verdict(accepted, target.gather(1, accepted[:, None])[:, 0], length + accepted + 1, path)


@contextmanager
def own_graphs(engine: Engine) -> Generator[Graphs | None, None, None]:
    """Round graphs for what an engine is made to do for a time, where it has any; they go with it."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    own = Graphs(model, cache) if engine._open().graphs else None  # pyright: ignore[reportPrivateUsage]
    try:
        yield own
    finally:
        if own:
            own.close()


@contextmanager
def with_graphs(engine: Engine, graphs: Graphs | None) -> Generator[None, None, None]:
    """Requests made meanwhile take these round graphs."""
    usual = engine._open()  # pyright: ignore[reportPrivateUsage]
    engine._shared = replace(usual, graphs=graphs)  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        engine._shared = usual  # pyright: ignore[reportPrivateUsage]


@contextmanager
def forced_acceptance(engine: Engine, rate: float) -> Generator[ForcedVerify, None, None]:
    """Greedy rounds of `engine` accept at `rate`; round graphs captured meanwhile are its own."""
    model, _ = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    honest = model.ops
    verify = ForcedVerify(accepted_counts(rate).to(model.device))
    with own_graphs(engine) as own, with_graphs(engine, own):
        model.ops = replace(honest, verify=verify)
        try:
            yield verify
        finally:
            model.ops = honest
