"""The rows of a pass as its sub-layers see them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..kernels.attention_index import Index
from ..kernels.values import Rope, Slots
from .routes import Routes
from .rows import Rows


class Gate(NamedTuple):
    """The rows that run a sub-layer, bool [R], all without it, and whether a kernel was launched since they are known.

    What lies two kernels back may be read by one that has not waited for the last.
    """

    active: Tensor | None
    settled: bool


class Pass(NamedTuple):
    """Rows filled up to whole tiles, and what every sub-layer of a pass over them shares.

    real bool [R]: the rows that are not padding. routes: what routed layers decided so far, padding included.
    kept int64 [routed layers, S]: the keys each sequence has in each of them where skipped tokens leave none.
    embedded [R, H]: the rows' embeddings where they came with the rest. masked: a row may run some sub-layers and not
    others. arrivals: those of `Entry`.
    """

    rows: Rows
    slots: Slots
    index: Index  # pyright: ignore[reportIncompatibleMethodOverride]
    rope: Rope | None
    real: Tensor
    routes: Routes
    kept: Tensor | None
    embedded: Tensor | None = None
    masked: bool = False
    arrivals: Tensor | None = None
