"""Rounds without a draft: the first token of every sequence, and every token of a lossy policy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from time import perf_counter

from torch import Tensor

from ..kernels.host import ints
from ..loaders.config import ModelConfig
from .batch import Batch
from .cache import KVCache
from .costs import weight_pass
from .methods.base import Method
from .methods.policy import Policy
from .model import Model
from .prefill import Reading, read, whole_prompts
from .request import Piece
from .sampling import choose, tell
from .sequence import Sequence, firsts


def prefill(model: Model, cache: KVCache, sequence: Sequence, method: Method) -> list[Piece]:
    """Cache a prompt and choose the first token."""
    return next(pieces for pieces in reading(model, cache, sequence, method) if pieces is not None)


def reading(
    model: Model, cache: KVCache, sequence: Sequence, method: Method, sibling: Sequence | None = None
) -> Iterator[list[Piece] | None]:
    """Cache a prompt, pass by pass: None after each but the last, which the first token is chosen after.

    A `sibling` that has read the same prompt and still has its pages leaves it to be copied.
    """
    parts = _parts(model, cache, sequence, method, sibling)
    rows, pieces = next(parts), None
    while pieces is None:
        start = perf_counter()
        with model.mark("prefill", 1, rows):
            try:
                rows = next(parts)
            except StopIteration as end:
                hidden: Tensor = end.value
                if sequence.params.n > 1 and not isinstance(method, Policy):
                    sequence.entered = hidden.clone()
                pieces = _first(model, hidden, [sequence])[0]
        sequence.counters.prefill_s += perf_counter() - start
        yield pieces


def read_together(model: Model, cache: KVCache, sequences: list[Sequence], method: Method) -> list[list[Piece]]:
    """Cache the prompts of several sequences in one pass, and choose the first token of each.

    The method's prompts are plain, and none is stretched.
    """
    start = perf_counter()
    rows, last = whole_prompts(model, sequences)
    with model.mark("prefill", len(sequences), len(rows)):
        hidden = method.prompt_pass(model, cache, rows)[last]
        found = _first(model, hidden, sequences)
    spent = perf_counter() - start
    for sequence in sequences:
        sequence.counters.prefill_s += spent
        if isinstance(method, Policy):
            sequence.layers_used = [method.prompt.layers_kept]
    return found


def _first(model: Model, hidden: Tensor, sequences: list[Sequence]) -> list[list[Piece]]:
    """The first token of each sequence, after the residual stream hidden [S, H] of its prompt's last."""
    batch = Batch.of(sequences, model.ops.decode_tile, model.device)
    chosen = choose(model, hidden, batch, batch.last[:, None])
    tokens = ints(chosen.token[:, 0])
    pieces = [sequence.extend([token], 0) for sequence, token in zip(sequences, tokens, strict=True)]
    tell(model, sequences, pieces, chosen.logits)
    return pieces


def _parts(
    model: Model, cache: KVCache, sequence: Sequence, method: Method, sibling: Sequence | None
) -> Reading[Tensor]:
    """The residual stream [1, H] of a prompt's last token, which a sibling may have left."""
    if sibling is not None and sibling.entered is not None:
        yield 0
        cache.copy(sibling.pages, sequence.pages, len(sequence.prompt))
        return sibling.entered
    if not isinstance(method, Policy):
        return (yield from read(model, sequence, partial(method.prompt_pass, model, cache)))
    step = yield from method.read(model, cache, sequence)
    sequence.layers_used += step.used
    return step.hidden


def decode(model: Model, cache: KVCache, sequences: list[Sequence], policy: Policy) -> list[list[Piece]]:
    """One token for every sequence, from the pass the policy chooses."""
    start = perf_counter()
    for sequence in sequences:
        sequence.enter(policy.phase())
    batch = Batch.of(sequences, model.ops.decode_tile, model.device)
    with model.mark("verify", len(batch), len(batch)):
        step = policy.step(model, cache, batch)
        chosen = choose(model, step.hidden, batch, batch.last[:, None])
        tokens = ints(chosen.token[:, 0])
    pieces: list[list[Piece]] = []
    with model.mark("commit", len(batch), len(batch)):
        for row, (sequence, ran) in enumerate(zip(sequences, step.used, strict=True)):
            pieces.append(sequence.extend([tokens[row]], 0))
            if pieces[-1]:
                count(sequence, model.config, ran, step.layers_read)
        tell(model, sequences, pieces, chosen.logits)
    spent = perf_counter() - start
    for sequence in firsts(sequences):
        sequence.counters.verify_s += spent
        sequence.counters.decode_s += spent
    return pieces


def count(sequence: Sequence, config: ModelConfig, ran: float, layers_read: float | None) -> None:
    """Count a token that a policy's pass gave, with `ran` layers' worth of sub-layers behind it; as in `Step`."""
    sequence.layers_used.append(ran)
    counters = sequence.counters
    counters.rounds += 1
    counters.bonus += 1
    counters.executed_skips += round(2 * (config.num_layers - ran))
    if layers_read is not None:
        counters.weight_passes += weight_pass(config, layers_read)
