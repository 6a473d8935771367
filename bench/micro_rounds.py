"""The ops that start a pass, grow a draft, shape a choice or end a round, each alone: a part of `bench.micro`.

What they are held against is the PyTorch of the reference. A row is a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.reference import logits as reference_logits
from ..kernels.reference import lookup as reference_lookup
from ..kernels.reference import rounds as reference
from ..kernels.values import Grown, Progress, Reshaping
from ..runtime.methods.drafting import WIDEST, WIDTHS
from .point import Launch, Outputs, Point, size

DRAFT, NODES, TOP, LEFT = 4, 32, 5, 1 << 40


def enter(p: Point) -> Launch:
    """A token of every sequence."""
    embedding = p.randn(p.config.vocab_size, p.config.hidden_size)
    rope = p.rope(p.context + p.rows)
    token, first = p.arange(p.rows)[:, None] * 7 % p.config.vocab_size, torch.full_like(p.arange(p.rows), p.context)
    table = p.arange(p.rows * p.pages).view(p.rows, -1)

    def call(function: Callable[..., reference.Entry]) -> Outputs:
        entry = function(
            token,
            first,
            None,
            None,
            table,
            embedding,
            rope,
            rows=p.rows,
            ahead=0,
            page_size=p.ops.page_size,
            kv_heads=p.config.num_kv_heads,
        )
        return entry.x, entry.token, entry.position, *entry.slots

    return Launch(lambda: call(p.ops.enter), lambda: call(reference.enter), p.rows * size(embedding[0]))


def extend(p: Point) -> Launch:
    """A token of every draft, in the middle of it."""
    each, out = p.arange(p.rows), torch.zeros(2, p.rows, dtype=torch.int64, device=p.device)
    going, threshold = each >= 0, torch.full((), 0.5, device=p.device)
    value, total = p.randn(p.rows, dtype=torch.float32), p.randn(p.rows, dtype=torch.float32) + 1
    inputs = (each % DRAFT, going, 0 * each + DRAFT, each, value, total, threshold)
    return Launch(
        lambda: (*p.ops.extend(*inputs, out[0]), out[0]),
        lambda: (*reference.extend(*inputs, out[1]), out[1]),
        size(*inputs),
    )


def branch(p: Point) -> Launch:
    """The first depth of every tree, which each launch sets back first."""
    room, threshold = torch.full_like(p.arange(p.rows), NODES), torch.full((), 0.1, device=p.device)
    token = p.arange(p.rows)[:, None] + p.arange(WIDEST)
    value = p.randn(p.rows, dtype=torch.float32)
    total = value + 0.2 + p.randn(p.rows, dtype=torch.float32).abs()
    mine, other = (Grown.bare(room, NODES, DRAFT) for _ in range(2))

    def call(function: Callable[..., None], tree: Grown) -> Outputs:
        tree.count.zero_()
        tree.spine.zero_()
        tree.going.fill_(True)
        function(tree, room, token, value, total, threshold, widths=WIDTHS)
        return tuple(tree)

    return Launch(
        lambda: call(p.ops.branch, mine),
        lambda: call(reference.branch, other),
        size(room, token, value, total),
        syncs=True,
    )


def commit(p: Point) -> Launch:
    """A round of chains of which nothing is accepted; sequences that never end."""
    each = p.arange(p.rows)
    draft = each[:, None] + p.arange(DRAFT)
    inputs = (0 * each, each + 5, 0 * each + DRAFT, draft)

    def made() -> tuple[Progress, Tensor]:
        report = torch.zeros(2, p.rows, DRAFT + 4, dtype=torch.int64, pin_memory=p.device.type == "cuda")
        return Progress.of(each.clone(), each + p.context, 0 * each + LEFT), report

    (mine, report), (other, told) = made(), made()

    def call(function: Callable[..., None], progress: Progress, report: Tensor) -> Outputs:
        function(*inputs, progress, report)
        return progress.last, progress.length, progress.left

    return Launch(
        lambda: call(p.ops.commit, mine, report),
        lambda: call(reference.commit, other, told),
        size(*inputs, mine.length, mine.left),
        syncs=True,
    )


def lookup(p: Point) -> Launch:
    """A vote in texts of `context` tokens of sixty kinds."""
    text = (p.randn(p.rows, p.context, dtype=torch.float32).abs() * 20).int() % 60
    length = torch.full_like(p.arange(p.rows), p.context - 1)
    inputs = (text, length, 0 * length + DRAFT)

    def call(function: Callable[..., reference_lookup.Found]) -> Outputs:
        found = function(*inputs, max_ngram=3, num_draft_tokens=DRAFT, votes=128)
        return found.tokens, found.drafted

    return Launch(lambda: call(p.ops.lookup), lambda: call(reference_lookup.lookup), size(text), syncs=True)


def reshape_logits(p: Point) -> Launch:
    """Every penalty at once, of a row a sequence."""
    logits, vocab = p.randn(p.rows, p.config.vocab_size), p.config.vocab_size
    each, one = p.arange(p.rows), torch.ones(p.rows, device=p.device)
    prompt = p.randn(p.rows, vocab, dtype=torch.float32) > 2
    bias = p.randn(p.rows, vocab, dtype=torch.float32)
    how = Reshaping(1.1 * one, 0.1 * one, 0.2 * one, bias, prompt.flip(1), 0 * each, prompt, prompt.roll(1, 1).int())
    length, draft = each + p.context, torch.full((p.rows, 1, 1), -1, dtype=torch.int64, device=p.device)
    read = size(logits, how.bias, how.forbidden, how.prompt, how.times)
    return Launch(
        lambda: (p.ops.reshape_logits(logits, how, length, draft),),
        lambda: (reference_logits.reshape_logits(logits, how, length, draft),),
        read,
    )


def logprobs(p: Point) -> Launch:
    """Those of a token and of the five most likely ones."""
    logits, token = p.randn(p.rows, p.config.vocab_size), p.arange(p.rows)

    def call(function: Callable[..., tuple[Tensor, Tensor]]) -> Outputs:
        return tuple(function(logits, token, token >= 0, top=TOP))

    return Launch(lambda: call(p.ops.logprobs), lambda: call(reference_logits.logprobs), size(logits))


ROUND_OPS: dict[str, Callable[[Point], Launch]] = {
    "enter": enter,
    "extend": extend,
    "branch": branch,
    "commit": commit,
    "lookup": lookup,
    "reshape_logits": reshape_logits,
    "logprobs": logprobs,
}
