"""What the compile gate compiles: the launches of passes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import launch
from ..kernels.triton_ops import TRITON
from ..kernels.values import Matrix, Progress, Rope, Router, RowMap, Tree
from .gate_checks import Case
from .gate_inputs import CONTEXT, DRAFTED, LONG_CONTEXT, NODES, Inputs, Shape, size

SHAPES = (
    Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152),
    Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256),
    Shape("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256),
    Shape("Qwen3-4B", 2560, 9728, 32, 8, 128, 151936, qk_norm=True),
    Shape("Qwen2.5-7B", 3584, 18944, 28, 4, 128, 152064),
    Shape("BLOOM-1b7", 2048, 4096, 16, 16, 128, 250880, layer_norm=True),
)
PASSES = (
    *((rows, TRITON.decode_tile) for rows in (1, 8, 16, 32, 64)),
    *((rows, TRITON.prefill_tile) for rows in (64, 512)),
)
# Passes of more have their products and their attention looked at.
FEW_ROWS = 16
FAST_PASSES = ((16, None), (64, None), (512, None))
# The first shapes of each: float16 has rules of its own where a norm takes several steps.
DTYPES = {torch.bfloat16: len(SHAPES), torch.float16: 2, torch.float32: 1}

LAYER = ("qkv", "attention", "output", "gate and up", "down")
LAYERS = 4
# As many siblings as SWIFT has by the probability of the first one.
SIBLINGS, WIDTHS = 10, ((0.95, 1), (0.8, 3), (0.5, 5))


class Step(NamedTuple):
    """What one op does in a pass. `alike`: the label of the step it must round like, its own without one."""

    op: str
    label: str
    floor: int
    launch: Callable[[], object]
    masked: bool = False
    alike: str | None = None


def cases() -> list[Case]:
    """Every case: all shapes in bfloat16, the first ones also in float16 and float32."""
    return [
        case
        for dtype, count in DTYPES.items()
        for shape in SHAPES[:count]
        for rows, tile in (*PASSES, *(FAST_PASSES if dtype != torch.float32 else ()))
        for case in Pass(shape, rows, dtype, tile).cases()
    ]


@dataclass(frozen=True)
class Pass(Inputs):
    """A pass of `rows` rows in tiles of `tile`: one sequence, or sequences of eight rows each.

    Without a tile it is one of fast numerics, whose rules differ for unmasked products and attention.
    """

    tile: int | None

    @property
    def prefill(self) -> bool:
        return launch.tile_of(self.rows, self.tile) == TRITON.prefill_tile

    @property
    def sequences(self) -> int:
        return 1 if self.prefill else max(1, self.rows // 8)

    def cases(self) -> Iterator[Case]:
        kind = f"{self.shape.name} {str(self.dtype).removeprefix('torch.')}{' prefill' if self.prefill else ''}"
        if self.tile is None:
            # Rows of other numbers may round otherwise: each is a group of its own.
            kind += f" fast {self.rows}"
        steps = [*self._layer(), *self._masked(), *self._head()]
        if not self.prefill and self.tile is not None:
            steps += self._light()
        if not self.prefill and self.tile is not None and self.rows <= FEW_ROWS:
            steps += [*self._routing(), *self._choosing()]
        for place, step in enumerate(steps):
            alike = step.label if self.tile is None else step.alike or step.label
            yield Case(
                op=step.op,
                name=f"{kind} {step.label}, {self.rows} {'row' if self.rows == 1 else 'rows'}",
                group=f"{kind} {alike}",
                layer=f"{kind}, {self.rows}" if step.label in LAYER else "",
                place=place,
                rows=self.rows,
                itemsize=self.dtype.itemsize,
                floor=step.floor,
                masked=step.masked,
                launch=step.launch,
            )

    def _layer(self) -> Iterator[Step]:
        s = self.shape
        norm = self.norm()
        x, attended, gated = (self.tensor(self.rows, n) for n in (s.hidden, s.heads * s.head_dim, s.inner))
        yield self._qkv("qkv")
        output, gate_up = self.matrix(s.hidden, s.heads * s.head_dim), self.matrix(2 * s.inner, s.hidden)
        yield self._attend("attention", chains=not self.prefill, ahead=output)
        yield self._linear("output", attended, output, residual=x, ahead=gate_up)
        yield self._linear("gate and up", x, gate_up, norm=norm, activation="silu_gate")
        yield self._linear("down", gated, self.matrix(s.hidden, s.inner), residual=x)

    def _masked(self) -> Iterator[Step]:
        """The same with rows that may be inactive, and attention of a draft tree."""
        s = self.shape
        active = self.tensor(self.rows, dtype=torch.bool)
        x, gated = self.tensor(self.rows, s.hidden), self.tensor(self.rows, s.inner)
        yield self._qkv("qkv, masked", active=active, write=active)._replace(alike="qkv")
        known = {"active": active, "settled": True}
        yield self._qkv("qkv, masked and settled", write=active, **known)._replace(alike="qkv")
        attention = self._attend("attention, masked", active=active, chains=not self.prefill)
        yield attention._replace(alike="attention")
        scale = self.tensor(self.rows, dtype=torch.float32)
        down = self.matrix(s.hidden, s.inner)
        masked = self._linear("down, masked", gated, down, residual=x, scale=scale, active=active)
        yield masked._replace(alike="down")
        for label, ahead in (("down, masked and settled", None), ("down, masked, settled, with more ahead", down)):
            settled = self._linear(label, gated, down, residual=x, ahead=ahead, **known)
            yield settled._replace(alike="down")
        if not self.prefill:
            tree = Tree(self.ids(self.rows), self.ids(self.rows, DRAFTED + 1))
            yield self._attend("attention, tree", tree=tree)._replace(alike="attention")
            for label, given in (("attention, wide tree", None), ("attention, masked wide tree", active)):
                wide = self._attend(label, tree=tree, active=given, chains=True, ahead=down)
                yield wide._replace(alike="attention")
            yield self._attend("attention, rows")._replace(alike="attention")

    def _head(self) -> Iterator[Step]:
        s = self.shape
        x, norm = self.tensor(self.rows, s.hidden), self.norm()
        weight, tile = self.matrix(s.vocab, s.hidden), self.tile
        yield Step("normalise", "norm", 0, lambda: TRITON.normalise(x, norm))
        if self.prefill:
            return
        reduced, ids = self.matrix(s.vocab // 4, s.hidden), self.ids(s.vocab // 4)
        yield Step("logits", "logits", size(weight), lambda: TRITON.logits(x, norm, weight, tile=tile))
        yield Step("head", "head", size(weight), lambda: TRITON.head(x, norm, weight, tile=tile))
        active = self.tensor(self.rows, dtype=torch.bool)
        for name, op in (("logits", TRITON.logits), ("head", TRITON.head)):
            masked = partial(op, x, norm, weight, tile=tile, active=active)
            yield Step(name, f"{name}, masked", size(weight), masked, masked=True, alike=name)
        yield Step(
            "head", "head of 8", size(reduced), lambda: TRITON.head(x, norm, reduced, tile=tile, top_k=8, ids=ids)
        )

    def _light(self) -> Iterator[Step]:
        """What drafts run with weights of eight bits."""
        s, tile = self.shape, self.tile
        x, gated, norm = self.tensor(self.rows, s.hidden), self.tensor(self.rows, s.inner), self.norm()
        active = self.tensor(self.rows, dtype=torch.bool)
        gate_up, down = self.light(2 * s.inner, s.hidden), self.light(s.hidden, s.inner)
        known = {"active": active, "settled": True}
        yield self._qkv("qkv in eight bits", True)
        masked = self._qkv("qkv in eight bits, masked and settled", True, write=active, **known)
        yield masked._replace(alike="qkv in eight bits")
        yield self._linear("gate and up in eight bits", x, gate_up, norm=norm, activation="silu_gate")
        label = "down in eight bits"
        yield self._linear(label, gated, down, residual=x, ahead=gate_up)
        for more, options in ((", masked", {"active": active}), (", masked and settled", {"ahead": gate_up, **known})):
            yield self._linear(label + more, gated, down, residual=x, **options)._replace(alike=label)
        head, reduced, ids = self.light(s.vocab, s.hidden), self.light(s.vocab // 4, s.hidden), self.ids(s.vocab // 4)
        label, of_head = "head in eight bits", partial(TRITON.head, x, norm, head, tile=tile)
        yield Step("logits", "logits in eight bits", size(head), partial(TRITON.logits, x, norm, head, tile=tile))
        yield Step("head", label, size(head), of_head)
        yield Step("head", f"{label}, masked", size(head), partial(of_head, active=active), masked=True, alike=label)
        few = partial(TRITON.head, x, norm, reduced, tile=tile, top_k=8, ids=ids)
        yield Step("head", "head of 8 in eight bits", size(reduced), few)

    def _routing(self) -> Iterator[Step]:
        s, tile = self.shape, self.tile
        x, norm = self.tensor(self.rows, s.hidden), self.norm()
        narrow = s.hidden // 16
        encoder = self.matrix(narrow, s.hidden)
        router = Router(encoder, self.tensor(narrow), self.tensor(narrow, dtype=torch.float32))
        active, real = self.tensor(LAYERS, self.rows, dtype=torch.bool), self.tensor(self.rows, dtype=torch.bool)
        yield Step("route", "route", size(encoder), lambda: TRITON.route(x, norm, router, tile=tile, active=real))
        yield Step("row_map", "row map", 0, lambda: TRITON.row_map(active))

        width = s.heads + 2 * s.kv_heads
        stack = TRITON.prepare_stack(self.tensor(LAYERS, width * s.head_dim, s.hidden))
        norms = self.norm(LAYERS)
        k_norm = self.tensor(LAYERS, s.head_dim) if s.qk_norm else None
        rows = RowMap(self.tensor(LAYERS, self.rows, dtype=torch.int32), self.tensor(LAYERS, dtype=torch.int32))
        rotated = self.tensor(LAYERS, dtype=torch.bool)
        keys, values, slots, rope = self.cache(LAYERS), self.cache(LAYERS), self.slots(), self.rope()
        yield Step(
            "fill_kv",
            "fill",
            sum(map(size, stack.layers)) * 2 * s.kv_heads // width,
            lambda: TRITON.fill_kv(
                x, rows, norms, stack, None, k_norm, rope, rotated, keys, values, slots, heads=s.heads, tile=tile
            ),
        )

    def _choosing(self) -> Iterator[Step]:
        s, count = self.shape, self.sequences
        scores = self.tensor(self.rows, s.vocab)
        warping = [self.tensor(self.rows, dtype=dtype) for dtype in _WARPING]
        seed, position = self.ids(self.rows), self.ids(self.rows)
        drawn = (scores, *warping, seed, position)
        yield Step("sample", "sample", size(scores), lambda: TRITON.sample(*drawn))
        yield Step("sample", "sample of 4", size(scores), lambda: TRITON.sample(*drawn, stream=DRAFTED, count=4))
        token, active = self.ids(self.rows), self.tensor(self.rows, dtype=torch.bool)
        yield Step("logprobs", "logprobs", size(scores), lambda: TRITON.logprobs(scores, token, active, top=8))
        how, lengths = self.reshaping(count), self.ids(count)
        before = self.ids(count, self.rows // count, DRAFTED)
        dense = count * s.vocab * sum(t.itemsize for t in how if t.dim() == 2)
        yield Step(
            "reshape_logits",
            "penalties and bias",
            size(scores) + dense,
            lambda: TRITON.reshape_logits(scores, how, lengths, before),
        )
        if self.rows == 16:
            return
        target, draft, parent = self.ids(count, DRAFTED + 1), self.ids(count, DRAFTED), self.ids(count, DRAFTED)
        drafted, length = self.ids(count), self.ids(count)
        yield from self._round(count)
        yield Step("verify", "verify", 0, lambda: TRITON.verify(target, draft, drafted, length))
        yield Step("verify", "verify, tree", 0, lambda: TRITON.verify(target, draft, drafted, length, parent))
        p, q = self.tensor(count, DRAFTED + 1, s.vocab), self.tensor(count, DRAFTED, s.vocab)
        rule = [self.tensor(count, dtype=dtype) for dtype in (*_WARPING, torch.int64)]
        yield Step(
            "verify_rejection",
            "rejection",
            size(p),
            lambda: TRITON.verify_rejection(p, draft, q, drafted, length, *rule),
        )
        yield Step(
            "verify_rejection",
            "rejection, tree, certain",
            size(p),
            lambda: TRITON.verify_rejection(p, draft, None, drafted, length, *rule, parent=parent),
        )
        nodes, parents, depths = self.ids(count, NODES), self.ids(count, NODES), self.ids(count, NODES + 1)
        wide = self.tensor(count, NODES + 1, s.vocab)
        yield Step(
            "verify_rejection",
            "rejection, tree",
            size(wide),
            lambda: TRITON.verify_rejection(wide, nodes, q, drafted, length, *rule, parent=parents, drawn=depths),
        )
        keys, values, table = self.cache(LAYERS), self.cache(LAYERS), self.ids(count, CONTEXT // TRITON.page_size)
        path, accepted = self.ids(count, DRAFTED + 1), self.ids(count)
        yield Step("compact", "compact", 0, lambda: TRITON.compact(keys, values, table, path, accepted, length))

    def _round(self, count: int) -> Iterator[Step]:
        """The start of a pass, a step of a draft and the end of a round."""
        s, ids, flags = self.shape, [self.ids(count) for _ in range(6)], self.tensor(count, dtype=torch.bool)
        table, embedding = self.ids(count, CONTEXT // TRITON.page_size), self.tensor(s.vocab, s.hidden)
        token, draft = self.ids(count, self.rows // count), self.ids(count, DRAFTED)
        report, progress = self.ids(3, count, DRAFTED + 4), Progress.of(*ids[3:6])
        turns = Rope(*(self.tensor(CONTEXT, 1, s.head_dim, dtype=torch.float32) for _ in range(2)))
        paging = {"rows": self.rows, "ahead": 0, "page_size": TRITON.page_size, "kv_heads": s.kv_heads}
        value, total, threshold = (self.tensor(*size, dtype=torch.float32) for size in ((count,), (count,), ()))
        extended, first = (ids[0], flags, *ids[1:3]), (None, flags, *ids[1:3])
        yield Step("enter", "enter", 0, lambda: TRITON.enter(token, *ids[:2], flags, table, embedding, turns, **paging))
        yield Step("extend", "extend", 0, lambda: TRITON.extend(*extended, value, total, threshold, draft[:, 0]))
        yield Step("extend", "extend, first", 0, lambda: TRITON.extend(*first, None, None, None, draft[:, 0]))
        yield Step("commit", "commit", 0, lambda: TRITON.commit(*ids[:3], draft, progress, report))
        token_only = None, ids[1], None, None, progress, self.ids(3, count, 4)
        yield Step("commit", "commit, no draft", 0, lambda: TRITON.commit(*token_only))
        grown, siblings = self.grown(count), self.ids(count, SIBLINGS)
        where = {"depth": self.ids(count, self.rows // count), "path": self.ids(count, self.rows // count, DRAFTED + 1)}
        laid = (token, *ids[:2], flags, table, embedding, turns)
        yield Step("enter", "enter, tree", 0, lambda: TRITON.enter(*laid, **paging, **where))
        after = (token[:, :1], *laid[1:])
        yield Step("enter", "enter, draft", 0, lambda: TRITON.enter(*after, draft=draft, **paging))
        yield Step(
            "branch",
            "branch",
            0,
            lambda: TRITON.branch(grown, ids[0], siblings, value, total, threshold, widths=WIDTHS),
        )
        yield Step(
            "commit",
            "commit, tree",
            0,
            lambda: TRITON.commit(*ids[:3], grown.token, progress, report, self.ids(count, NODES + 1), grown.depth),
        )
        times = self.reshaping(count).times
        yield Step(
            "commit", "commit, counted", 0, lambda: TRITON.commit(*ids[:3], draft, progress, report, times=times)
        )
        text, drafts = (
            self.tensor(count, LONG_CONTEXT, dtype=torch.int32),
            {"max_ngram": 3, "num_draft_tokens": DRAFTED},
        )
        yield Step("commit", "commit, text", 0, lambda: TRITON.commit(*ids[:3], draft, progress, report, text=text))
        look_up, memory = partial(TRITON.lookup, text, *ids[:2], **drafts), self.tensor(16384, dtype=torch.int32)
        yield Step("lookup", "lookup, newest", 0, partial(look_up, votes=None))
        yield Step("lookup", "lookup, votes", 0, partial(look_up, votes=128))
        yield Step("lookup", "lookup, memory", 0, partial(look_up, votes=128, memory=memory))
        yield Step("lookup", "lookup, tree", 0, partial(look_up, votes=128, memory=memory, tree=True))

    def _linear(self, label: str, x: Tensor, weight: Matrix, **options: object) -> Step:
        return Step(
            "linear",
            label,
            size(weight),
            lambda: TRITON.linear(x, weight, tile=self.tile, **options),
            masked="active" in options and "settled" not in options,
        )

    def _qkv(self, label: str, light: bool = False, /, **options: object) -> Step:
        s = self.shape
        x, norm = self.tensor(self.rows, s.hidden), self.norm()
        weight = (self.light if light else self.matrix)((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden)
        head_norm = self.tensor(s.head_dim) if s.qk_norm else None
        inputs = (x, norm, weight, None, head_norm, head_norm, self.rope(), *self.cache_pair(), self.slots())
        return Step(
            "qkv_rope_append",
            label,
            size(weight),
            lambda: TRITON.qkv_rope_append(*inputs, heads=s.heads, tile=self.tile, **options),
            masked=bool(options) and "settled" not in options,
        )

    def _attend(
        self,
        label: str,
        tree: Tree | None = None,
        active: Tensor | None = None,
        *,
        chains: bool = False,
        ahead: Matrix | None = None,
    ) -> Step:
        s = self.shape
        q = self.tensor(self.rows, s.heads, s.head_dim)
        keys, values = self.cache_pair()
        table = self.ids(self.sequences, CONTEXT // TRITON.page_size)
        width = self.rows // self.sequences if chains else None
        index = TRITON.index(
            self.ids(self.rows),
            self.ids(self.rows),
            table,
            page_size=TRITON.page_size,
            tile=self.tile,
            tree=tree,
            width=width,
        )
        read = 2 * self.sequences * CONTEXT * s.kv_heads * s.head_dim * self.dtype.itemsize
        options = {"scale": s.head_dim**-0.5, "active": active, "ahead": ahead}
        return Step("attend", label, read, lambda: TRITON.attend(q, keys, values, index, **options))


_WARPING = (torch.float32, torch.int64, torch.float32, torch.float32)
