"""What goes into the ops and comes out of them, the same for every backend.

Notation: R rows, S sequences, L layers, H hidden size, D head dimension, P slots per page, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns] in the layout the products of its op table read.

    `gated`: in panels, those of the first half of its rows, gates, in turn with those of the second. With `scale`
    float32 [rows] it is scale·data, of eight bits an element (`Ops.quantise`).
    """

    data: Tensor
    rows: int
    columns: int
    packed: bool
    gated: bool = False
    scale: Tensor | None = None

    @property
    def in_panels(self) -> bool:
        """Whether it lies as `panels.pack` lays it, and not as oneDNN does."""
        return self.packed and not self.data.is_mkldnn


@dataclass(frozen=True)
class Split:
    """A weight in two by its rows, so that a product with one part costs nothing of the other."""

    upper: Matrix
    lower: Matrix

    @property
    def rows(self) -> int:
        return self.upper.rows + self.lower.rows

    @property
    def columns(self) -> int:
        return self.upper.columns


@dataclass(frozen=True)
class Stack:
    """One weight of every layer; `data` [L, rows, columns] where a backend needs the layers to lie in one tensor."""

    layers: tuple[Matrix, ...]
    data: Tensor | None

    def __getitem__(self, layer: int) -> Matrix:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def part(self, first: int, end: int) -> Stack:
        """The layers from `first` to `end` - 1; nothing is copied."""
        return Stack(self.layers[first:end], None if self.data is None else self.data[first:end])


class Heads(NamedTuple):
    """The attention of a model: query heads, key heads, and the dimension of each."""

    query: int
    key: int
    dim: int


class Norm(NamedTuple):
    """RMSNorm; LayerNorm when `bias` is given. weight, bias: [H], or [L, H] where an op takes a stack of layers."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class Layer(NamedTuple):
    """One layer's parameters in the layout of its op table; what the architecture lacks is None."""

    attention_norm: Norm
    qkv: Matrix | Split
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Matrix
    output_bias: Tensor | None
    mlp_norm: Norm
    up: Matrix
    up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None


class Rope(NamedTuple):
    """Rotation of each row: cos and sin float32 [R, 1, D], the first half of sin negated."""

    cos: Tensor
    sin: Tensor


class Slots(NamedTuple):
    """Where rows write their keys and values: page and offset in it, int64 [R]."""

    page: Tensor
    offset: Tensor


class Tree(NamedTuple):
    """Rows that are nodes of a draft tree: where the keys of a row's own path lie.

    length int64 [R]: the positions below it lie in the slots of the same number. slot int64 [R, depth]: position
    length + j of the row's path lies in slot `slot[r, j]`; entries past the row's own position are not read.
    """

    length: Tensor
    slot: Tensor


class Entry(NamedTuple):
    """The rows a pass starts with: token, position and sequence int64 [R] and the slots they write.

    real bool [R]: rows of a sequence. x [R, H]: their embeddings; rope: their rotations, None without any. tree: where
    the keys of their paths lie, None where they are consecutive tokens. arrivals int32 [R·kv_heads]: zeros that
    programs of attention and of routers count each other in, where their kernels do.
    """

    token: Tensor
    position: Tensor
    sequence: Tensor
    slots: Slots
    real: Tensor
    x: Tensor
    rope: Rope | None
    tree: Tree | None
    arrivals: Tensor | None = None


class Progress(NamedTuple):
    """How far S sequences have come, [S] each, in the rounds that a device runs alone.

    last int64: the newest token, not yet in the cache; length int64: the tokens before it; left int64: how many may
    still be appended. What follows from that: room int64, left − 1 draft tokens can still be of use; alive bool, left
    > 0; drafting bool, room > 0. commits int64: how often `commit` was called.
    """

    last: Tensor
    length: Tensor
    left: Tensor
    room: Tensor
    alive: Tensor
    drafting: Tensor
    commits: Tensor

    @staticmethod
    def of(last: Tensor, length: Tensor, left: Tensor) -> Progress:
        """Sequences that stand there and have had no round."""
        return Progress(last, length, left, left - 1, left > 0, left > 1, torch.zeros_like(left))


class Drafted(NamedTuple):
    """Drafts so far: how many tokens each has, int64 [S], and whether it goes on, bool [S]."""

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    going: Tensor


class Grown(NamedTuple):
    """Draft trees of S sequences while they grow, changed in place: of each up to k nodes, n deep at most.

    token, parent int64 [S, k]: node j follows row parent[j] ≤ j, row 0 being the sequence's newest token and row j + 1
    node j. depth int64 [S, k + 1] of the rows; path int64 [S, k + 1, n + 1], the rows from row 0 down to each, those
    past its own depth repeating it. count int64 [S] nodes so far; spine int64 [S], the row the next ones follow; going
    bool [S]: trees that still grow.
    """

    token: Tensor
    parent: Tensor
    depth: Tensor
    path: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    spine: Tensor
    going: Tensor

    @staticmethod
    def bare(room: Tensor, nodes: int, depth: int) -> Grown:
        """Trees without a node; those with `room` int64 [S] for one grow."""
        s, rows = room.shape[0], nodes + 1
        shapes = (s, nodes), (s, nodes), (s, rows), (s, rows, depth + 1), (s,), (s,)
        sizes = [math.prod(shape) for shape in shapes]
        parts = torch.split(torch.zeros(sum(sizes), dtype=torch.int64, device=room.device), sizes)
        shaped = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        token, parent, depths, path, count, spine = shaped
        return Grown(token, parent, depths, path, count, spine, room > 0)


class Prediction(NamedTuple):
    """The most likely token of each row, its logit, and the log-sum-exp of the row's logits: [R] each.

    With `top_k` given, token and value are [R, top_k], most likely first.
    """

    token: Tensor
    value: Tensor
    log_sum_exp: Tensor


class Reshaping(NamedTuple):
    """How the logits of S sequences are changed before a token is chosen, and what of each sequence that depends on.

    repetition, presence, frequency float32 [S]: penalties. bias float32 [S, V]. forbidden bool [S, V]: tokens that a
    sequence of fewer than least int64 [S] may not have next. prompt bool [S, V]: tokens of its prompt; times int32
    [S, V]: how often each stands in its answer.
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    bias: Tensor
    forbidden: Tensor
    least: Tensor
    prompt: Tensor
    times: Tensor


class Logprobs(NamedTuple):
    """Natural-log probabilities of R rows.

    values float32 [R, 1 + top]: that of the row's token, and those of the `top` most likely ids int32 [R, top].
    """

    values: Tensor
    ids: Tensor


class Verdict(NamedTuple):
    """What a verify pass decided; int64.

    accepted [S]: draft tokens taken. token [S]: the token after them. length [S]: the cached tokens now. path
    [S, k + 1]: the rows of the accepted path in order, row 0 first; entries past `accepted` repeat the last.
    """

    accepted: Tensor
    token: Tensor
    length: Tensor
    path: Tensor


class Found(NamedTuple):
    """Draft tokens int64 [S, k], of which the first drafted int64 [S] of each sequence are real.

    They are a chain, or with the rest a tree, of which `Grown` says the parent of every node and the depth and path of
    every row: int64 [S, k], [S, k + 1], [S, k + 1, k + 1].
    """

    tokens: Tensor
    drafted: Tensor
    parent: Tensor | None = None
    depth: Tensor | None = None
    path: Tensor | None = None


class RowMap(NamedTuple):
    """For each of L layers the active rows, gathered: row int32 [L, R], ascending, -1 after the first count [L]."""

    row: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


class Router(NamedTuple):
    """FlexiDepth's router of one layer with its last two matrices multiplied into one vector.

    encoder [r, H]; norm [r]; readout float32 [r] = router_head · router_dec.
    """

    encoder: Matrix
    norm: Tensor
    readout: Tensor


class Route(NamedTuple):
    """A router's decision for each row: it runs or is skipped, or neither where it is not active; bool [R].

    weight float32 [R] in (0, 1) and rest = 1 − weight: what scales the MLP of one and the adapter of the other.
    """

    weight: Tensor
    rest: Tensor
    run: Tensor
    skip: Tensor
