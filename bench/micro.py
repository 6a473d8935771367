"""Every op of the table alone, at the shapes of real models: what `pytest bench --benchmark-only` times.

A launch is one op on inputs of its own, and plain unfused PyTorch on the same inputs; `bytes` are those of
docs/kernels.md. A case has as many launches as it takes for what they read to exceed the last cache together, and they
run in turn, so that every one of them reads memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.reference import routes as reference_routes
from ..kernels.reference import verify as reference_verify
from ..kernels.reference.packed import rounded
from ..kernels.values import Norm, Rope, Router
from .micro_rounds import DRAFT, ROUND_OPS
from .point import Launch, Outputs, Point, size

MAX_LAUNCHES = 64
# Of a relative error in the norm: a few roundings of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FILL_LAYERS = 4


def normalise(p: Point) -> Launch:
    x, norm = p.randn(p.rows, p.config.hidden_size), p.norm(p.config.hidden_size)
    return Launch(lambda: (p.ops.normalise(x, norm),), lambda: (_rms(x, norm),), size(x))


def output(p: Point) -> Launch:
    return _residual(p, p.config.num_heads * p.config.head_dim)


def down(p: Point) -> Launch:
    return _residual(p, p.config.intermediate_size)


def up(p: Point, light: bool = False) -> Launch:
    """`light`: the weight in eight bits, whose values plain PyTorch multiplies in p's dtype."""
    x, norm = p.randn(p.rows, p.config.hidden_size), p.norm(p.config.hidden_size)
    weight = p.weight(2 * p.config.intermediate_size, p.config.hidden_size)
    matrix, read = p.ops.prepare_gated(weight), size(weight)
    if light:
        data, scale = rounded(weight)
        matrix, read, weight = p.ops.quantise(matrix), size(data, scale), (data * scale[:, None]).to(p.dtype)

    def plain() -> Outputs:
        gate, linear = functional.linear(_rms(x, norm), weight).chunk(2, dim=-1)
        return (functional.silu(gate) * linear,)

    return Launch(
        lambda: (p.ops.linear(x, matrix, tile=p.tile, norm=norm, activation="silu_gate"),),
        plain,
        read,
        _flops(p, weight),
    )


def logits(p: Point) -> Launch:
    x, norm = p.randn(p.rows, p.config.hidden_size), p.norm(p.config.hidden_size)
    weight = p.weight(p.config.vocab_size, p.config.hidden_size)
    matrix = p.ops.prepare(weight)
    return Launch(
        lambda: (p.ops.logits(x, norm, matrix, tile=p.tile),),
        lambda: (functional.linear(_rms(x, norm), weight),),
        size(weight),
        _flops(p, weight),
    )


def head(p: Point) -> Launch:
    x, norm = p.randn(p.rows, p.config.hidden_size), p.norm(p.config.hidden_size)
    weight = p.weight(p.config.vocab_size, p.config.hidden_size)
    matrix = p.ops.prepare(weight)

    def op() -> Outputs:
        _, value, log_sum_exp = p.ops.head(x, norm, matrix, tile=p.tile)
        return value, log_sum_exp

    def plain() -> Outputs:
        scores = functional.linear(_rms(x, norm), weight).float()
        return scores.max(dim=-1).values, scores.logsumexp(dim=-1)

    return Launch(op, plain, size(weight), _flops(p, weight))


def qkv_rope_append(p: Point) -> Launch:
    heads, kv_heads, head_dim, hidden = _heads(p)
    x, norm, rope, slots = p.randn(p.rows, hidden), p.norm(hidden), p.rope(), p.slots
    weight = p.weight((heads + 2 * kv_heads) * head_dim, hidden)
    matrix, (keys, values), other = p.ops.prepare(weight), p.caches(), p.caches()
    scale = p.norm(head_dim).weight if p.config.qk_norm else None

    def op() -> Outputs:
        q = p.ops.qkv_rope_append(
            x, norm, matrix, None, scale, scale, rope, keys, values, slots, heads=heads, tile=p.tile
        )
        return q, keys, values

    def plain() -> Outputs:
        qkv = functional.linear(_rms(x, norm), weight).view(p.rows, -1, head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        qk = _rotated(qk if scale is None else _rms(qk, Norm(scale, None, norm.eps)), rope)
        other[0][slots.page, :, slots.offset] = qk[:, heads:]
        other[1][slots.page, :, slots.offset] = v
        return qk[:, :heads], *other

    return Launch(op, plain, size(weight), _flops(p, weight))


def attend(p: Point) -> Launch:
    heads, kv_heads, head_dim, _ = _heads(p)
    q, (keys, values) = p.randn(p.rows, heads, head_dim), p.caches()
    table, at = p.arange(p.pages)[None], p.arange(p.rows, p.context)
    index = p.ops.index(torch.zeros_like(at), at, table, page_size=p.ops.page_size, tile=p.tile, width=p.rows)
    end = p.context + p.rows
    k, v = (cache.transpose(0, 1).reshape(1, kv_heads, -1, head_dim)[:, :, :end] for cache in (keys, values))
    mask = p.arange(end) <= at[:, None]

    def plain() -> Outputs:
        mixed = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=heads != kv_heads
        )
        return (mixed[0].transpose(0, 1).reshape(p.rows, -1),)

    read = 2 * p.context * kv_heads * head_dim * q.element_size()
    flops = 4 * p.rows * p.context * heads * head_dim
    return Launch(lambda: (p.ops.attend(q, keys, values, index, scale=head_dim**-0.5),), plain, read, flops)


def fill_kv(p: Point) -> Launch:
    heads, kv_heads, head_dim, hidden = _heads(p)
    x, norm, rope, slots = p.randn(p.rows, hidden), p.norm(FILL_LAYERS, hidden), p.rope(), p.slots
    weight = torch.stack([p.weight((heads + 2 * kv_heads) * head_dim, hidden)] * FILL_LAYERS)
    stack, (keys, values), other = p.ops.prepare_stack(weight), p.caches(FILL_LAYERS), p.caches(FILL_LAYERS)
    rows = p.ops.row_map(torch.ones(FILL_LAYERS, p.rows, dtype=torch.bool, device=p.device))

    def op() -> Outputs:
        p.ops.fill_kv(x, rows, norm, stack, None, None, rope, None, keys, values, slots, heads=heads, tile=p.tile)
        return keys, values

    def plain() -> Outputs:
        for layer in range(FILL_LAYERS):
            own = Norm(norm.weight[layer], None, norm.eps)
            kv = functional.linear(_rms(x, own), weight[layer, heads * head_dim :]).view(p.rows, -1, head_dim)
            other[0][layer][slots.page, :, slots.offset] = _rotated(kv[:, :kv_heads], rope)
            other[1][layer][slots.page, :, slots.offset] = kv[:, kv_heads:]
        return other

    read = weight[:, heads * head_dim :]
    return Launch(op, plain, size(read), _flops(p, read))


def row_map(p: Point) -> Launch:
    active = p.randn(p.config.num_layers, p.rows) > 0
    return Launch(lambda: tuple(p.ops.row_map(active)), lambda: tuple(reference_routes.row_map(active)), active.numel())


def route(p: Point) -> Launch:
    hidden = p.config.hidden_size
    reduced = max(16, hidden // 16)
    x, norm, inner = p.randn(p.rows, hidden), p.norm(hidden), p.norm(reduced)
    encoder, readout = p.weight(reduced, hidden), p.randn(reduced, dtype=torch.float32) / reduced**0.5
    router = Router(p.ops.prepare(encoder), inner.weight, readout)

    def plain() -> Outputs:
        code = _rms(functional.linear(_rms(x, norm), encoder).float(), inner._replace(weight=inner.weight.float()))
        return ((code.tanh() @ readout).sigmoid(),)

    return Launch(lambda: (p.ops.route(x, norm, router, tile=p.tile).weight,), plain, size(encoder), _flops(p, encoder))


def sample(p: Point) -> Launch:
    scores = p.randn(p.rows, p.config.vocab_size, dtype=torch.float32)
    each = p.arange(p.rows)
    rule = (torch.full((p.rows,), 0.8, device=p.device), 0 * each + 50, torch.full((p.rows,), 0.9, device=p.device))
    rest = (torch.zeros(p.rows, device=p.device), each + 7, each + p.context)

    def call(function: Callable[..., Tensor]) -> Outputs:
        return (function(scores, *rule, *rest),)

    return Launch(lambda: call(p.ops.sample), lambda: call(reference_verify.sample), size(scores), syncs=True)


def verify(p: Point) -> Launch:
    target = (p.randn(p.rows, DRAFT + 1) > 0).long()
    draft, count = target[:, :DRAFT] * (p.randn(p.rows, DRAFT) > -1), torch.full_like(target[:, 0], DRAFT)
    inputs = (target, draft, count, count + p.context)
    return Launch(
        lambda: tuple(p.ops.verify(*inputs)),
        lambda: tuple(reference_verify.verify(*inputs)),
        size(*inputs),
    )


def verify_rejection(p: Point) -> Launch:
    scores = p.randn(p.rows, DRAFT + 1, p.config.vocab_size, dtype=torch.float32)
    drafted = scores[:, :DRAFT] + 0.1 * p.randn(p.rows, DRAFT, p.config.vocab_size, dtype=torch.float32)
    count, one = torch.full_like(p.arange(p.rows), DRAFT), torch.ones(p.rows, device=p.device)
    inputs = (scores, drafted.argmax(-1), drafted, count, count + p.context, one, 0 * count + 50, one, 0 * one, count)
    return Launch(
        lambda: tuple(p.ops.verify_rejection(*inputs)),
        lambda: tuple(reference_verify.verify_rejection(*inputs)),
        size(scores, drafted),
        syncs=True,
    )


def compact(p: Point) -> Launch:
    """One row moved, of one sequence, in as many layers as `fill_kv` fills."""
    (keys, values), table = p.caches(FILL_LAYERS), p.arange(p.pages)[None]
    other = keys.clone(), values.clone()
    path = torch.tensor([[0, min(2, p.rows - 1)]], device=p.device)
    accepted, length = torch.ones_like(path[:, 0]), torch.full_like(path[:, 0], p.context - 1)

    def call(function: Callable[..., None], caches: tuple[Tensor, Tensor]) -> Outputs:
        function(*caches, table, path, accepted, length)
        return caches

    return Launch(
        lambda: call(p.ops.compact, (keys, values)),
        lambda: call(reference_verify.compact, other),
        2 * FILL_LAYERS * p.config.num_kv_heads * p.config.head_dim * keys.element_size(),
        syncs=True,
    )


OPS: dict[str, Callable[[Point], Launch]] = {
    "normalise": normalise,
    "linear (output)": output,
    "linear (up, silu_gate)": up,
    "linear (up, eight bits)": partial(up, light=True),
    "linear (down)": down,
    "logits": logits,
    "head": head,
    "qkv_rope_append": qkv_rope_append,
    "attend": attend,
    "fill_kv": fill_kv,
    "row_map": row_map,
    "route": route,
    "sample": sample,
    "verify": verify,
    "verify_rejection": verify_rejection,
    "compact": compact,
    **ROUND_OPS,
}
OF_CONTEXT = ("attend", "lookup")


def difference(got: Outputs, expected: Outputs) -> float:
    """The largest relative error in the norm over the outputs; infinite for a NaN or an unequal integer."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if b.is_floating_point():
            x, y = a.double(), b.double()
            error = float((x - y).square().sum().sqrt() / y.square().sum().sqrt().clamp_min(1e-30))
        else:
            error = 0.0 if torch.equal(a.long(), b.long()) else float("inf")
        worst = max(worst, float("inf") if math.isnan(error) else error)
    return worst


def _residual(p: Point, columns: int) -> Launch:
    """The op adds in place, launch after launch: plain PyTorch adds to a copy that it leaves alone."""
    x, added = p.randn(p.rows, columns), p.randn(p.rows, p.config.hidden_size)
    weight, residual = p.weight(p.config.hidden_size, columns), added.clone()
    matrix = p.ops.prepare(weight)
    return Launch(
        lambda: (p.ops.linear(x, matrix, tile=p.tile, residual=residual),),
        lambda: (added + functional.linear(x, weight),),
        size(weight),
        _flops(p, weight),
    )


def _heads(p: Point) -> tuple[int, int, int, int]:
    return p.config.num_heads, p.config.num_kv_heads, p.config.head_dim, p.config.hidden_size


def _rms(x: Tensor, norm: Norm) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype) * norm.weight


def _rotated(x: Tensor, rope: Rope) -> Tensor:
    return (x * rope.cos + torch.roll(x, x.shape[-1] // 2, -1) * rope.sin).to(x.dtype)


def _flops(p: Point, weight: Tensor) -> int:
    return 2 * p.rows * weight.numel()
