"""The op table: the same names and signatures for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from . import environment
from .attention_index import AttentionIndex, Index
from .reference import dense, packed, tiles
from .reference import logits as reference_logits
from .reference import lookup as reference_lookup
from .reference import rounds as reference_rounds
from .reference import routes as reference_routes
from .reference import verify as reference_verify
from .values import (
    Drafted,
    Entry,
    Found,
    Heads,
    Logprobs,
    Matrix,
    Prediction,
    Rope,
    Route,
    RowMap,
    Slots,
    Split,
    Stack,
    Verdict,
)


class Joined(Protocol):
    """Sub-layers of a model in one call: what `qkv_rope_append`, `attend` and `linear` would do one after the other."""

    def __call__(
        self,
        sublayers: tuple[int, ...],
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Slots,
        index: Index,
        rope: Rope | None,
        streams: list[Tensor] | None,
    ) -> None:
        """Add to x [R, H] in place; sub-layer 2i is the attention block of layer i, 2i + 1 its MLP block.

        keys, values: the cache of all layers [L, pages, heads, P, D]. `streams` receives x before every sub-layer and
        after the last.
        """
        ...


@dataclass(frozen=True)
class Ops:
    """The operations of one backend and the sizes that fix its rounding.

    With `numerics` "exact" a row's bits do not depend on the rows beside it: `decode_tile` and `prefill_tile` are the
    rows every product of a decode or prefill pass is padded to; a decode pass may be padded to one of `other_tiles`
    where `rounds_alike` finds that rows come out of it the same. Kernels that compute each row by itself need no
    padding: `pads` says of a dtype whether passes do. With "fast" there are no tiles, and the order of a sum may follow
    the number of rows and the context. `page_size` is the number of slots in a cache page, one block of the
    attention's reduction.
    """

    name: str
    numerics: str
    describe: Callable[[torch.dtype], str]
    decode_tile: int | None
    other_tiles: tuple[int, ...]
    prefill_tile: int | None
    pads: Callable[[torch.dtype], bool]
    page_size: int
    prepare: Callable[[Tensor], Matrix]
    prepare_gated: Callable[[Tensor], Matrix]
    prepare_stack: Callable[[Tensor], Stack]
    rounds_alike: Callable[[list[Matrix], Heads, torch.dtype, int], bool]
    take_rows: Callable[[Matrix, Tensor], Matrix]
    prepare_split: Callable[[Tensor, int], Matrix | Split]
    quantise: Callable[[Matrix], Matrix]
    join: Callable[..., Joined | None]
    index: Callable[..., Index]
    enter: Callable[..., Entry]
    normalise: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    qkv_rope_append: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    fill_kv: Callable[..., None]
    row_map: Callable[[Tensor], RowMap]
    route: Callable[..., Route]
    logits: Callable[..., Tensor]
    head: Callable[..., Prediction]
    reshape_logits: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    logprobs: Callable[..., Logprobs]
    verify: Callable[..., Verdict]
    verify_rejection: Callable[..., Verdict]
    compact: Callable[..., None]
    lookup: Callable[..., Found]
    extend: Callable[..., Drafted]
    branch: Callable[..., None]
    commit: Callable[..., None]

    def description(self, dtype: torch.dtype, tiles: tuple[int, ...] = ()) -> str:
        """The backend and the path its products take, for people; `tiles`: those it takes, where there are several."""
        *some, last = map(str, tiles or (0,))
        several = f", tiles of {', '.join(some)} and {last} rows" if some else ""
        return f"{self.name} ({self.describe(dtype)}{several})"

    @property
    def tiles(self) -> tuple[int, ...]:
        """Every tile a decode pass may have, ascending; none with fast numerics."""
        return () if self.decode_tile is None else tuple(sorted((self.decode_tile, *self.other_tiles)))

    def filled(self, rows: int, tile: int | None, dtype: torch.dtype) -> int:
        """The rows of a pass over `rows` rows in tiles of `tile`, those that only fill the last tile included."""
        return rows if tile is None or not self.pads(dtype) else -(-rows // tile) * tile

    def tile_of(self, rows: int) -> int | None:
        """The tile for so many rows where either would do: that of prompts if they fill one."""
        return self.decode_tile if self.prefill_tile is None or rows < self.prefill_tile else self.prefill_tile


def products(dtype: torch.dtype) -> str:
    """The path the products of the CPU take, for people."""
    return f"{'oneDNN packed' if packed.available(dtype) else 'plain'} products"


TORCH = Ops(
    name="torch",
    numerics="exact",
    describe=lambda dtype: f"{products(dtype)}, plain small operations",
    decode_tile=tiles.FULL,
    other_tiles=tiles.OTHERS,
    prefill_tile=64,
    pads=lambda dtype: True,
    page_size=tiles.PAGE,
    prepare=dense.prepare,
    prepare_gated=dense.prepare,
    prepare_stack=dense.prepare_stack,
    rounds_alike=tiles.rounds_alike,
    take_rows=packed.take_rows,
    prepare_split=dense.prepare_split,
    quantise=packed.quantise,
    join=lambda *_: None,
    index=AttentionIndex,
    enter=reference_rounds.enter,
    normalise=dense.normalise,
    linear=dense.linear,
    qkv_rope_append=dense.qkv_rope_append,
    attend=dense.attend,
    fill_kv=reference_routes.fill_kv,
    row_map=reference_routes.row_map,
    route=reference_routes.route,
    logits=dense.logits,
    head=dense.head,
    reshape_logits=reference_logits.reshape_logits,
    sample=reference_verify.sample,
    logprobs=reference_logits.logprobs,
    verify=reference_verify.verify,
    verify_rejection=reference_verify.verify_rejection,
    compact=reference_verify.compact,
    lookup=reference_lookup.lookup,
    extend=reference_rounds.extend,
    branch=reference_rounds.branch,
    commit=reference_rounds.commit,
)


def obstacle(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`; None if it can."""
    if backend == "torch":
        return None if device.type == "cpu" else "the torch table runs on the CPU only"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return None
    from .launch import INTERPRETED

    return None if INTERPRETED else "Triton needs a CUDA device, or its interpreter (TRITON_INTERPRET=1, for tests)"


def plain_because() -> str | None:
    """Why the small operations of the CPU are PyTorch's and not compiled; None if they are."""
    if environment.cpu_kernels() == "torch":
        return "SKIPJACK_CPU_KERNELS is torch"
    if find_spec("numba") is None:
        return "numba is not installed"
    try:
        import_module("numba")
    except (ImportError, OSError) as error:  # The second of its libraries.
        return f"numba cannot be imported: {error}"
    return None


def select(backend: str, numerics: str = "exact") -> Ops:
    """The table "torch" or "triton", "exact" or "fast"; `obstacle` says whether it can run.

    The first has its small operations compiled, unless something stands against it (`plain_because`).
    """
    if backend == "torch" and plain_because() is None:
        from .cpu.compiled import COMPILED

        table = COMPILED
    elif backend == "torch":
        table = TORCH
    else:
        from .triton_ops import TRITON

        table = TRITON
    return table if numerics == "exact" else replace(table, numerics="fast", decode_tile=None, prefill_tile=None)
