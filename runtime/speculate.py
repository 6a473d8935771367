"""The round: draft, verify, commit. Every lossless method decodes through this one function."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.host import ints
from .batch import Batch, Draft
from .cache import KVCache
from .methods.base import Method
from .model import Model
from .plan import LayerPlan
from .request import Piece
from .rows import one_sequence
from .sampling import Chosen, choose, logprob
from .sequence import Sequence

PREFILL_CHUNK = 1024


def speculate(model: Model, cache: KVCache, sequences: list[Sequence], method: Method) -> list[list[Piece]]:
    """One round of speculative decoding (Leviathan et al., arXiv 2211.17192) for sequences that share it.

    The method drafts up to k tokens per sequence. One pass of the full model over each sequence's newest token and its
    draft gives the token the full model itself chooses after every one of them. The longest prefix of the draft that
    equals those choices is accepted, and the choice after it comes free. The pass wrote the keys and values of all
    those rows; not counting the rejected ones is the whole rollback.
    """
    start, phase, plan = perf_counter(), method.phase(), method.plan
    batch = Batch.of(sequences, model.ops.decode_tile, model.device)
    draft = method.propose(model, cache, batch)
    drafted = perf_counter()

    path = torch.cat([batch.last[:, None], draft.tokens], dim=1)
    target = choose(model, _verify_pass(model, cache, batch, path, draft, method.target), batch, path)
    verdict = model.ops.verify(target.tokens, draft.tokens, draft.length, batch.length)
    verified = perf_counter()

    for sequence in sequences:
        sequence.enter(phase)
    pieces = [
        _commit(sequence, target, row, int(draft.length[row]), count)
        for row, (sequence, count) in enumerate(zip(sequences, ints(verdict.accepted), strict=True))
    ]
    searched = method.observe(model, cache, sequences, sum(map(len, pieces)), verified - start)
    for sequence, count in zip(sequences, ints(draft.length), strict=True):
        counters = sequence.counters
        counters.rounds += 1
        counters.draft_s += drafted - start
        counters.verify_s += verified - drafted
        counters.search_s += searched
        counters.decode_s += perf_counter() - start
        counters.executed_skips += plan.skipped * count + method.target.skipped
    return pieces


def prefill(model: Model, cache: KVCache, sequence: Sequence, method: Method) -> list[Piece]:
    """Cache a prompt and choose the first token.

    The prompt has tiles of its own, of the same size for every prompt and batch: its neighbours cannot change it.
    """
    start = perf_counter()
    hidden = torch.empty(0, device=model.device)
    for first in range(0, len(sequence.prompt), PREFILL_CHUNK):
        chunk = sequence.prompt[first : first + PREFILL_CHUNK]
        rows = one_sequence(chunk, first, sequence.pages, model.ops.prefill_tile, model.device)
        hidden = model.forward(rows, cache, method.target)
    batch = Batch.of([sequence], model.ops.decode_tile, model.device)
    pieces = _append(sequence, choose(model, hidden[-1:], batch, batch.last[:, None]), 0, 0)
    sequence.counters.prefill_s += perf_counter() - start
    return pieces


def _verify_pass(model: Model, cache: KVCache, batch: Batch, path: Tensor, draft: Draft, target: LayerPlan) -> Tensor:
    """The residual stream [S·K, H] of every row of `path` int64 [S, K] after the pass that has the last word.

    Where the draft left its streams after some layers, only the newest draft token still runs those (LayerSkip §4.3).
    """
    rows = batch.rows(path, batch.length, draft.length + 1)
    if draft.exit is None:
        return model.forward(rows, cache, target)
    layer, known = draft.exit
    newest, one = path.gather(1, draft.length[:, None]), torch.ones_like(draft.length)
    last = batch.rows(newest, batch.length + draft.length, one)
    hidden = functional.pad(known, (0, 0, 0, 1))
    each = torch.arange(len(batch), device=batch.device)
    hidden[each, draft.length] = model.forward(last, cache, target.early_exit(layer))
    return model.forward(rows, cache, target.resume(layer), hidden.flatten(0, 1))


def _commit(sequence: Sequence, target: Chosen, row: int, drafted: int, accepted: int) -> list[Piece]:
    """Append what a round gave a sequence, and count it."""
    pieces = _append(sequence, target, row, accepted)
    counters = sequence.counters
    counters.drafted += drafted
    emitted = min(len(pieces), accepted)
    counters.accepted += emitted
    counters.bonus += len(pieces) - emitted
    per_position = counters.accepted_per_position
    per_position.extend([0] * (emitted - len(per_position)))
    for position in range(emitted):
        per_position[position] += 1
    return pieces


def _append(sequence: Sequence, target: Chosen, row: int, accepted: int) -> list[Piece]:
    """Append the accepted draft tokens and the one after them, as far as the sequence's stop rules allow."""
    pieces = sequence.extend(ints(target.tokens[row, : accepted + 1]), accepted)
    if sequence.params.logprobs is not None and target.logits is not None:
        sequence.logprobs += [
            logprob(target.logits[row, i], piece.token_id, sequence.params.logprobs) for i, piece in enumerate(pieces)
        ]
    return pieces
