"""The sequences that share a round, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels.host import ints
from ..kernels.values import Verdict
from .rows import Chains, Lineage
from .sequence import Sequence

if TYPE_CHECKING:
    from .adapter import Adapter
    from .recipe import Recipe


class Exit(NamedTuple):
    """The residual streams after the first `layer` layers of the rows drafted from, [S, k, H] (LayerSkip §4.3).

    With an `adapter` that drafted after them, it has keys and values of these rows.
    """

    layer: int
    hidden: Tensor
    adapter: Adapter | None = None


class Draft(NamedTuple):
    """Draft tokens int64 [S, k] and how many of them each sequence drafted, int64 [S].

    They are a chain, or with `parent` int64 [S, k] a tree: draft token j follows row parent[j] ≤ j, row 0 being the
    sequence's newest token and row j + 1 draft token j. `scores` [S, n, V]: what the tokens of each depth were drawn
    with, for rejection sampling. With `exit` given, the cache holds the rows' keys and values of the layers before
    it, and verification goes on from there. `record` asks for the streams of the verification in `Round`. `rows` int64
    [S]: how many rows were drafted with, where that is not one for every token of the draft's depth.
    """

    tokens: Tensor
    length: Tensor
    exit: Exit | None = None
    parent: Tensor | None = None
    scores: Tensor | None = None
    record: bool = False
    rows: Tensor | None = None

    def within(self, room: Tensor) -> Draft:
        """Without the tokens past `room` int64 [S], for which a sequence has no place."""
        return self._replace(length=torch.minimum(self.length, room.clamp(min=0)))


class Tally(NamedTuple):
    """What a round came to for each of S sequences: draft tokens, those accepted, tokens emitted; seconds.

    `depth`: how many of the draft tokens could be accepted together: of a chain all, of a tree its longest path.
    `recipe` is that of a round the device ran alone, which is `changed` if the one before was of another.
    """

    sequences: list[Sequence]
    drafted: list[int]
    depth: list[int]
    accepted: list[int]
    emitted: list[int]
    draft_s: float
    verify_s: float
    recipe: Recipe | None = None
    changed: bool = False


class Round(NamedTuple):
    """A finished round, for the method to learn from: S sequences, K rows each.

    path int64 [S, K] are the rows' tokens, target int64 [S, K] the full model's choices after them; for each sequence
    the draft was `depth` deep, and `emitted` tokens came of the round. Times are seconds. `streams` has, if the draft
    asked for it, the residual stream [S·K, H] before every sub-layer and after the last.
    """

    batch: Batch
    draft: Draft
    path: Tensor
    target: Tensor
    verdict: Verdict
    depth: list[int]
    emitted: list[int]
    draft_s: float
    verify_s: float
    streams: list[Tensor] | None

    @property
    def tally(self) -> Tally:
        drafted, accepted = ints(self.draft.length), ints(self.verdict.accepted)
        return Tally(self.batch.sequences, drafted, self.depth, accepted, self.emitted, self.draft_s, self.verify_s)


class Sampling(NamedTuple):
    """Sampling parameters of each row, [R], as `sample` and `verify_rejection` take them.

    top_k and seed are int64, the others float32.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


@dataclass(frozen=True)
class Batch:
    """S sequences at the start of a round; built anew for every round.

    `last` int64 [S] is each sequence's newest token, not yet in the cache; `length` int64 [S] the tokens before it,
    all cached; `room` int64 [S] the draft tokens that can still be of use; `prompt` int64 [S] the length of its prompt.
    `alive` bool [S]: sequences that have rows in a pass, all of them without it. A batch of a device's own round knows
    no `sequences`.
    """

    sequences: list[Sequence]
    last: Tensor
    length: Tensor
    room: Tensor
    prompt: Tensor
    block_table: Tensor
    tile: int | None
    alive: Tensor | None = None

    @staticmethod
    def of(sequences: list[Sequence], tile: int | None, device: torch.device) -> Batch:
        width = max(len(s.pages) for s in sequences)
        table = torch.tensor([s.pages + [0] * (width - len(s.pages)) for s in sequences], device=device)
        state = torch.tensor([(s.tokens[-1], s.cached, s.room, len(s.prompt)) for s in sequences], device=device)
        # Each on memory of its own: kernels are specialised on where it starts.
        last, length, room, prompt = (column.clone(memory_format=torch.contiguous_format) for column in state.T)
        return Batch(sequences, last, length, room, prompt, table, tile)

    @property
    def device(self) -> torch.device:
        return self.last.device

    @property
    def alone(self) -> bool:
        """Whether the device runs this round without the host, which knows how it stands then."""
        return self.alive is not None

    def sampling(self) -> Sampling:
        """One entry per sequence."""
        params, device = [s.params for s in self.sequences], self.device
        return Sampling(
            torch.tensor([float(p.temperature) for p in params], device=device),
            torch.tensor([p.top_k for p in params], device=device),
            torch.tensor([float(p.top_p) for p in params], device=device),
            torch.tensor([float(p.min_p) for p in params], device=device),
            torch.tensor([s.seed if s.seed < 2**63 else s.seed - 2**64 for s in self.sequences], device=device),
        )

    def __len__(self) -> int:
        return self.last.shape[0]

    def rows(self, tokens: Tensor, first: Tensor, count: Tensor | None) -> Chains:
        """Rows for `tokens` int64 [S, K] from positions `first` [S], of which the first `count` [S] are real."""
        return Chains(tokens, first, count, self.alive, self.block_table, self.tile)

    def newest(self) -> Chains:
        """One row a sequence: its newest token."""
        return self.rows(self.last[:, None], self.length, None)

    def drafted(self, token: Tensor, ahead: int, going: Tensor, *, gated: bool, mask: Tensor | None) -> Chains:
        """One row for each sequence whose draft is `going` bool [S]: the token `ahead` places after its newest."""
        return Chains(token[:, None], self.length, None, going, self.block_table, self.tile, ahead, gated, mask)

    def drafts(self, draft: Draft, lineage: Lineage | None) -> Chains:
        """Rows for each sequence's newest token and its draft, a chain or a tree of that `lineage`.

        Where they are `sparse`, those that are not real run no sub-layer.
        """
        if draft.tokens.shape[1] == 0:
            return self.newest()
        rows = self.rows(self.last[:, None], self.length, draft.length)
        return replace(rows, draft=draft.tokens, lineage=lineage, gated=self.sparse(draft, lineage))

    def sparse(self, draft: Draft, lineage: Lineage | None) -> bool:
        """Whether a device's own round has more rows than a tile for the largest tree there may be."""
        rows = len(self) * (1 + draft.tokens.shape[1])
        return lineage is not None and self.alone and rows > (self.tile or 0)
