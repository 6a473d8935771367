"""Every op on inputs of a model's shape, the same for two op tables: what a table gives is compared with the other's.

A case draws its inputs from a seed through a `Side`, which says in which table, on which device and in which precision
they arrive; the values are those of the dtype under test on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.ops import Ops
from ..kernels.values import Grown, Norm, Progress, Reshaping, Rope, Router, Slots, Tree
from ..loaders.config import ModelConfig

PAGE = 64
EPS = 1e-5


@dataclass(frozen=True)
class Side:
    """One op table; inputs drawn as `dtype`, then held as `held` on `device`."""

    ops: Ops
    device: torch.device
    dtype: torch.dtype
    held: torch.dtype

    def randn(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        """Normal values of the dtype under test."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
        return values.to(self.dtype).to(self.device, self.held)

    def put(self, values: Tensor) -> Tensor:
        """Index or float32 values, as they are."""
        return values.to(self.device)

    def norm(self, size: int, seed: int, *, layers: int | None = None, bias: bool = False) -> Norm:
        shape = (size,) if layers is None else (layers, size)
        return Norm(self.randn(*shape, seed=seed), self.randn(*shape, seed=seed + 1) if bias else None, EPS)

    def rope(self, rows: int, head_dim: int, seed: int) -> Rope:
        angle = torch.randn(rows, 1, head_dim // 2, generator=torch.Generator().manual_seed(seed))
        cos, sin = angle.cos(), angle.sin()
        return Rope(self.put(torch.cat([cos, cos], -1)), self.put(torch.cat([-sin, sin], -1)))


Outputs = Mapping[str, Tensor]
Case = Callable[[Side, ModelConfig, int, int | None], Outputs]


def norm(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    x = side.randn(rows, config.hidden_size, seed=1)
    return {
        "rms": side.ops.normalise(x, side.norm(config.hidden_size, 2)),
        "layer": side.ops.normalise(x, side.norm(config.hidden_size, 2, bias=True)),
    }


def mlp(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    hidden, inner = config.hidden_size, config.intermediate_size
    x = side.randn(rows, hidden, seed=1)
    up = side.ops.prepare_gated(side.randn(2 * inner, hidden, seed=2, scale=hidden**-0.5))
    down = side.ops.prepare(side.randn(hidden, inner, seed=3, scale=inner**-0.5))
    gated = side.ops.linear(x, up, tile=tile, norm=side.norm(hidden, 4), activation="silu_gate")
    narrow = side.ops.prepare(side.randn(hidden, hidden, seed=8, scale=hidden**-0.5))
    bloom = side.ops.linear(
        x,
        narrow,
        tile=tile,
        norm=side.norm(hidden, 4, bias=True),
        bias=side.randn(hidden, seed=6),
        activation="gelu_tanh",
    )
    wide = side.randn(rows, inner, seed=7)
    added = side.ops.linear(wide, down, tile=tile, residual=x.clone())
    weight = side.put(torch.rand(rows, generator=torch.Generator().manual_seed(9)))
    active = side.put(torch.arange(rows) % 3 != 1)
    masked = side.ops.linear(wide, down, tile=tile, residual=x.clone(), scale=weight, active=active)
    up, down = side.ops.quantise(up), side.ops.quantise(down)
    light = side.ops.linear(x, up, tile=tile, norm=side.norm(hidden, 4), activation="silu_gate")
    mixed = side.ops.linear(wide, down, tile=tile, residual=x.clone(), scale=weight, active=active)
    whole = {"silu_gate": gated, "gelu": bloom, "residual": added, "masked": masked}
    return whole | {"eight bits silu_gate": light, "eight bits masked": mixed}


def qkv(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    heads, kv_heads, head_dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    out = (heads + 2 * kv_heads) * head_dim
    weight = side.ops.prepare(side.randn(out, hidden, seed=2, scale=hidden**-0.5))
    pages = 2 + rows // PAGE
    slot = torch.randperm(pages * PAGE, generator=torch.Generator().manual_seed(3))[:rows]
    results: dict[str, Tensor] = {}
    light, scale = side.ops.quantise(weight), side.randn(head_dim, seed=4)
    for label, stored, q_norm in (("plain", weight, None), ("qk_norm", weight, scale), ("eight bits", light, scale)):
        keys, values = (torch.zeros(pages, kv_heads, PAGE, head_dim, dtype=side.held, device=side.device) for _ in "kv")
        q = side.ops.qkv_rope_append(
            side.randn(rows, hidden, seed=1),
            side.norm(hidden, 5),
            stored,
            side.randn(out, seed=6),
            q_norm,
            q_norm,
            side.rope(rows, head_dim, 7),
            keys,
            values,
            Slots(side.put(slot // PAGE), side.put(slot % PAGE)),
            heads=heads,
            tile=tile,
        )
        results |= {f"{label} q": q, f"{label} keys": keys, f"{label} values": values}
    return results


def attention(side: Side, config: ModelConfig, rows: int, tile: int | None, context: int = 1000) -> Outputs:
    """One sequence whose last rows attend to `context` positions; plain, as a chain, windowed, ALiBi, as a tree."""
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    last = context + rows
    pages = math.ceil(last / PAGE)
    keys, values = (side.randn(pages + 1, kv_heads, PAGE, head_dim, seed=seed) for seed in (1, 2))
    q = side.randn(rows, heads, head_dim, seed=3)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(4))[None] + 1
    sequence, position = torch.zeros(rows, dtype=torch.int64), torch.arange(context, last)

    def attend(
        at: Tensor, tree: Tree | None = None, window: int | None = None, alibi: bool = False, width: int | None = None
    ) -> Tensor:
        laid = side.put(sequence), side.put(at), side.put(table)
        index = side.ops.index(*laid, page_size=PAGE, tile=tile, tree=tree, width=width)
        slopes = side.put(2.0 ** -torch.arange(1, heads + 1).float()) if alibi else None
        return side.ops.attend(q, keys, values, index, scale=head_dim**-0.5, window=window, slopes=slopes)

    # Node r follows node 0, which follows the cached positions: two levels, every node in a slot of its own.
    slot = torch.stack([torch.full((rows,), context), position], dim=1)
    tree = Tree(side.put(torch.full((rows,), context)), side.put(slot))
    return {
        "causal": attend(position),
        "chain": attend(position, width=rows),
        "window": attend(position, window=300),
        "alibi": attend(position, alibi=True),
        "tree": attend(context + (torch.arange(rows) > 0).long(), tree),
    }


def head(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    hidden = config.hidden_size
    weight = side.ops.prepare(side.randn(config.vocab_size, hidden, seed=2, scale=hidden**-0.5))
    x, scale = side.randn(rows, hidden, seed=1), side.norm(hidden, 3)
    prediction = side.ops.head(x, scale, weight, tile=tile)
    top = side.ops.head(x, scale, weight, tile=tile, top_k=5)
    written = side.ops.logits(x, scale, weight, tile=tile)
    light = side.ops.head(x, scale, side.ops.quantise(weight), tile=tile)
    return {
        "eight bits values": light.value,
        "eight bits log_sum_exp": light.log_sum_exp,
        "logits": written,
        "value": prediction.value,
        "log_sum_exp": prediction.log_sum_exp,
        "top_k values": top.value,
        "value of the token": written.gather(1, prediction.token[:, None])[:, 0] - prediction.value + 1,
    }


def fill(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    heads, kv_heads, head_dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    layers, out = 3, (heads + 2 * kv_heads) * head_dim
    weight = side.ops.prepare_stack(side.randn(layers, out, hidden, seed=2, scale=hidden**-0.5))
    active = torch.rand(layers, rows, generator=torch.Generator().manual_seed(3)) < 0.5
    active[1] = False
    pages = 2 + rows // PAGE
    keys, values = (
        torch.zeros(layers, pages, kv_heads, PAGE, head_dim, dtype=side.held, device=side.device) for _ in "kv"
    )
    slot = torch.randperm(pages * PAGE, generator=torch.Generator().manual_seed(4))[:rows]
    rows_of = side.ops.row_map(side.put(active))
    side.ops.fill_kv(
        side.randn(rows, hidden, seed=1),
        rows_of,
        side.norm(hidden, 5, layers=layers),
        weight,
        None,
        None,
        side.rope(rows, head_dim, 7),
        None,
        keys,
        values,
        Slots(side.put(slot // PAGE), side.put(slot % PAGE)),
        heads=heads,
        tile=tile,
    )
    return {"keys": keys, "values": values, "count": rows_of.count + 1}


def routing(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    hidden, reduced = config.hidden_size, max(16, config.hidden_size // 16)
    router = Router(
        side.ops.prepare(side.randn(reduced, hidden, seed=2, scale=hidden**-0.5)),
        side.randn(reduced, seed=3),
        side.put(torch.randn(reduced, generator=torch.Generator().manual_seed(4)) / reduced**0.5),
    )
    routed = side.ops.route(side.randn(rows, hidden, seed=1), side.norm(hidden, 5), router, tile=tile)
    return {"weight": routed.weight, "rest": routed.rest}


def sampling(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    """Integer results: they must be equal."""
    generator = torch.Generator().manual_seed(1)
    vocab, k = config.vocab_size, 4
    scores = side.put(torch.randn(rows, vocab, generator=generator) * 3)
    each = torch.arange(rows)
    drawn = (
        scores,
        side.put((each % 3).float() * 0.7),
        side.put(each % 4 * 20),
        side.put(1 - (each % 5).float() * 0.1),
        side.put((each % 2).float() * 0.01),
        side.put(each * 2**40 - 7),
        side.put(each + 3),
    )
    token = side.ops.sample(*drawn)
    siblings = side.ops.sample(*drawn, stream=3, count=4)
    target = torch.randint(0, 3, (rows, k + 1), generator=generator)
    draft = torch.randint(0, 3, (rows, k), generator=generator)
    count = torch.randint(0, k + 1, (rows,), generator=generator)
    verdict = side.ops.verify(side.put(target), side.put(draft), side.put(count), side.put(each * 10))
    sequences = min(rows, 4)
    logits = side.put(torch.randn(sequences, k + 1, vocab, generator=generator) * 3)
    drafted = side.put(torch.randn(sequences, k, vocab, generator=generator) * 3)
    one = torch.ones(sequences)
    rejected = side.ops.verify_rejection(
        logits,
        side.put(logits.cpu()[:, :k].argmax(-1)),
        drafted,
        side.put(torch.full((sequences,), k)),
        side.put(each[:sequences] * 10),
        side.put(one),
        side.put((one * 50).long()),
        side.put(one * 0.9),
        side.put(one * 0),
        side.put(each[:sequences] + 11),
    )
    return {
        "sample": token,
        "sample of 4": siblings,
        **{f"verify {name}": value for name, value in verdict._asdict().items()},
        **{f"rejection {name}": value for name, value in rejected._asdict().items()},
    }


def bookkeeping(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    """What a round does besides its passes' products; every result is copied or counted, and so must be equal."""
    generator = torch.Generator().manual_seed(1)
    k, width = 4, 3
    sequences = -(-rows // width)
    token, draft = (side.put(torch.randint(0, 9, (sequences, n), generator=generator)) for n in (width, k))
    some = [side.put(torch.randint(0, k, (sequences,), generator=generator)) for _ in range(6)]
    table = side.put(torch.randint(0, 50, (sequences, 2), generator=generator))
    embedding, rope = side.randn(9, config.hidden_size, seed=1), side.rope(2 * PAGE, config.head_dim, 2)
    alive = some[0] > 0
    paging = {"rows": rows, "ahead": 2, "page_size": PAGE, "kv_heads": config.num_kv_heads}
    entry = side.ops.enter(token, some[1], some[2], alive, table, embedding, rope, **paging)
    value, total = (side.put(torch.randn(sequences, generator=generator)) for _ in range(2))
    turned = entry.rope or rope
    text = side.put(torch.zeros(sequences, 3 * k, dtype=torch.int32))
    # The rows of a draft after the newest token, which a later pass takes from where the draft left them.
    after = side.ops.enter(token[:, :1], some[1], some[2], alive, table, embedding, rope, draft=token[:, 1:], **paging)
    out = side.put(torch.zeros(sequences, 2, dtype=torch.int64))
    further = side.ops.extend(some[0], alive, some[1], some[2], value, total, side.put(torch.tensor(0.5)), out[:, 1])
    progress = Progress.of(*(value.clone() for value in some[3:]))
    # The device writes where the host reads.
    report = torch.zeros(3, sequences, k + 4, dtype=torch.int64, pin_memory=side.device.type == "cuda")
    side.ops.commit(some[0], some[1], some[2], draft, progress, report, text=text)
    if side.device.type == "cuda":
        torch.cuda.synchronize()
    names = ("token", "position", "sequence", "real", "x")
    return {
        **{f"enter {name}": getattr(entry, name) for name in names},
        **{f"enter {name}": value for name, value in zip(("page", "offset"), entry.slots, strict=True)},
        "enter cos": turned.cos,
        "enter sin": turned.sin,
        **{f"enter a draft {name}": getattr(after, name) for name in ("token", "position", "sequence", "x")},
        **{f"extend {name}": value for name, value in further._asdict().items()},
        "extend token": out,
        **{f"commit {name}": value for name, value in progress._asdict().items()},
        "commit report": report,
        "commit text": text,
    }


def trees(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    """Two depths of a draft tree, its rows in a pass and in a report: every result must be equal."""
    generator = torch.Generator().manual_seed(1)
    sequences, nodes = -(-rows // 4), 9
    room, first = (side.put(torch.randint(0, 12, (sequences,), generator=generator)) for _ in range(2))
    token = side.put(torch.arange(3) + torch.arange(sequences)[:, None])
    tree, limit = Grown.bare(room, nodes, 2), side.put(torch.tensor(0.2))
    for _ in range(2):
        p = side.put(torch.rand(sequences, generator=generator))
        side.ops.branch(tree, room, token, p.log() + 1, torch.ones_like(p), limit, widths=((0.9, 1), (0.5, 2)))
    table = side.put(torch.randint(0, 50, (sequences, 2), generator=generator))
    embedding = side.randn(sequences + 3, config.hidden_size, seed=1)
    laid = (tree.token, first, tree.count, room > 2, table, embedding, None)
    where = {"depth": tree.depth[:, :nodes], "path": tree.path[:, :nodes]}
    paging = {"ahead": 2, "page_size": PAGE, "kv_heads": config.num_kv_heads}
    entry = side.ops.enter(*laid, rows=nodes * sequences, **paging, **where)
    assert entry.tree is not None
    progress = Progress.of(*(room.clone() for _ in range(3)))
    report = side.put(torch.zeros(1, sequences, 6, dtype=torch.int64))
    path = tree.path[torch.arange(sequences, device=side.device), tree.count]
    path = torch.nn.functional.pad(path, (0, nodes - 2))
    side.ops.commit(tree.count, first, tree.count, tree.token, progress, report, path, tree.depth)
    return {
        **{f"branch {name}": value for name, value in tree._asdict().items()},
        **{f"enter {name}": getattr(entry, name) for name in ("position", "sequence")},
        **{f"enter {name}": value for name, value in entry.slots._asdict().items()},
        **{f"enter {name}": value for name, value in entry.tree._asdict().items()},
        "commit report": report,
    }


def moving(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    """Keys and values of accepted nodes of trees of so many rows, to where a chain has them, over the end of a page."""
    generator, sequences, depth = torch.Generator().manual_seed(1), 3, min(6, rows - 1)
    pages = 2 + rows // PAGE
    shape = (2, 1 + sequences * pages, config.num_kv_heads, PAGE, config.head_dim)
    keys, values = (side.randn(*shape, seed=seed) for seed in (2, 3))
    table = side.put(1 + torch.randperm(sequences * pages, generator=generator).view(sequences, pages))
    nodes = torch.stack([1 + torch.randperm(rows - 1, generator=generator)[:depth] for _ in range(sequences)])
    path = side.put(torch.nn.functional.pad(nodes.sort().values, (1, 0)))
    accepted, length = torch.tensor([0, depth // 2, depth]), torch.tensor([5, PAGE - 1, PAGE - 3])
    side.ops.compact(keys, values, table, path, side.put(accepted), side.put(length))
    return {"keys": keys, "values": values}


def shaping(side: Side, config: ModelConfig, rows: int, tile: int | None) -> Outputs:
    """Penalties, bias and minimum length of sequences of `width` rows with drafts, and log-probabilities."""
    generator = torch.Generator().manual_seed(1)
    vocab, width, depth = config.vocab_size, 1 if rows % 2 else 2, 3
    sequences = rows // width
    logits = side.randn(rows, vocab, seed=2, scale=4.0)
    repetition, presence, frequency = (side.put(1 + torch.rand(sequences, generator=generator)) for _ in range(3))
    bias = side.put(torch.randn(sequences, vocab, generator=generator))
    counts = torch.randint(0, 6, (3, sequences, vocab), generator=generator)
    forbidden, prompt, times = (side.put(own) for own in (counts[0] == 5, counts[1] == 5, (counts[2] - 3).clamp(min=0)))
    least = side.put(torch.arange(sequences) % 2 * 1000)
    how = Reshaping(repetition, presence, frequency, bias, forbidden, least, prompt, times.int())
    draft = side.put(torch.randint(-1, vocab, (sequences, width, depth), generator=generator))
    length = side.put(torch.full((sequences,), 10))
    scores = side.ops.reshape_logits(logits, how, length, draft)
    token, active = side.put(torch.arange(rows)), side.put(torch.ones(rows, dtype=torch.bool))
    told = side.ops.logprobs(logits, token, active, top=8)
    none = scores == -torch.inf
    return {"scores": scores.masked_fill(none, 0), "forbidden": none, "logprobs": told.values, "likely": told.ids}


def looking_up(side: Side, config: ModelConfig, rows: int, tile: int | None, context: int = 5000) -> Outputs:
    """Texts of few letters and of many, so that matches are frequent or rare; every result must be equal."""
    generator = torch.Generator().manual_seed(1)
    letters = 2 + torch.arange(rows)[:, None] % 7 * 50
    text = side.put((torch.rand(rows, context, generator=generator) * letters).int())
    length = side.put(torch.randint(0, context, (rows,), generator=generator))
    room = side.put(torch.arange(rows) % 11 - 1)
    memory = side.put(torch.randint(-1, 60, (context,), generator=generator).int())
    found = {
        label: side.ops.lookup(text, length, room, max_ngram=4, num_draft_tokens=7, **how)
        for label, how in (
            ("newest", {"votes": None}),
            ("likeliest", {"votes": 128}),
            ("memory", {"votes": 128, "memory": memory}),
            ("tree", {"votes": 128, "memory": memory, "tree": True}),
        )
    }
    return {
        f"{label} {name}": value
        for label, one in found.items()
        for name, value in one._asdict().items()
        if value is not None
    }


CASES: dict[str, Case] = {
    "normalise": norm,
    "linear": mlp,
    "qkv_rope_append": qkv,
    "attend": attention,
    "head": head,
    "fill_kv": fill,
    "route": routing,
    "sample, verify": sampling,
    "reshape_logits, logprobs": shaping,
    "lookup": looking_up,
    "enter, extend, commit": bookkeeping,
    "branch": trees,
    "compact": moving,
}
