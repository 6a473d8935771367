"""The round: draft, verify, commit. Every lossless method decodes through this one function."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.host import ints
from ..kernels.values import Verdict
from .batch import Batch, Draft, Round, Sampling
from .cache import KVCache
from .methods.base import Method
from .model import Model, Streams
from .plan import LayerPlan
from .request import Piece
from .rows import Lineage
from .sampling import choose, tell
from .sequence import Sequence, firsts


def speculate(model: Model, cache: KVCache, sequences: list[Sequence], method: Method) -> list[list[Piece]]:
    """One round of speculative decoding (Leviathan et al., arXiv 2211.17192) for sequences that share it.

    The method drafts tokens for every sequence, a chain or a tree of them. One pass of the full model over each
    sequence's newest token and its draft gives the token the full model itself chooses after every one of them. The
    longest path of the draft that follows those choices is accepted, and the choice after it comes free. The pass wrote
    the keys and values of all those rows: a tree's accepted ones move together, and not counting the rejected ones is
    the whole rollback.
    """
    start = perf_counter()
    batch = Batch.of(sequences, model.ops.decode_tile, model.device)
    draft = method.propose(model, cache, batch).within(batch.room)
    drafted, phase, plan = perf_counter(), method.phase(), method.plan

    path = torch.cat([batch.last[:, None], draft.tokens], dim=1)
    lineage = None if draft.parent is None else Lineage.of(draft.parent)
    streams: Streams | None = [] if draft.record else None
    with model.mark("verify", len(batch), path.numel()):
        hidden = verify_pass(model, cache, batch, draft, lineage, method.target, streams)
        target = choose(model, hidden, batch, path, lineage)
        rejection = method.rejection and not batch.sequences[0].params.greedy
        rule = batch.sampling() if rejection else None
        verdict = decide(model, batch, draft, target.token, target.scores, rule, lineage)
        if lineage is not None:
            close_up(model, cache, batch, verdict, lineage)
        accepted = ints(verdict.accepted)
    verified = perf_counter()

    for sequence in sequences:
        sequence.enter(phase)
    with model.mark("commit", len(batch), path.numel()):
        counts = ints(draft.length)
        depth = counts if lineage is None else ints(_deepest(lineage, draft.length))
        pieces: list[list[Piece]] = []
        for row, sequence in enumerate(sequences):
            rows = verdict.path[row, : accepted[row] + 1]
            tokens = [*ints(path[row, rows[1:]]), int(verdict.token[row])]
            pieces.append(commit(sequence, tokens, counts[row], depth[row]))
        tell(model, sequences, pieces, target.logits, verdict.path)
    # One that is lost gets none and has ended; what a round gives, methods divide by.
    emitted = [max(1, len(new)) for new in pieces]
    seconds = drafted - start, verified - drafted
    done = Round(batch, draft, path, target.token, verdict, depth, emitted, *seconds, streams)
    searched = method.observe(model, cache, done)
    for sequence, rows in zip(sequences, depth if draft.rows is None else ints(draft.rows), strict=True):
        counters = sequence.counters
        counters.rounds += 1
        counters.executed_skips += plan.skipped * rows + method.target.skipped
    for counters in (sequence.counters for sequence in firsts(sequences)):
        counters.draft_s += drafted - start
        counters.verify_s += verified - drafted
        counters.search_s += searched
        counters.decode_s += perf_counter() - start
    return pieces


def verify_pass(
    model: Model,
    cache: KVCache,
    batch: Batch,
    draft: Draft,
    lineage: Lineage | None,
    target: LayerPlan,
    streams: Streams | None = None,
) -> Tensor:
    """The residual stream [S·K, H] of each newest token and its K − 1 draft tokens, by the pass that has the last word.

    Where the draft left its streams after some layers, only the newest draft token still runs those (LayerSkip §4.3).
    """
    rows = batch.drafts(draft, lineage)
    if draft.exit is None:
        return model.forward(rows, cache, target, streams=streams)
    layer, known, adapter = draft.exit
    path, one = torch.cat([batch.last[:, None], draft.tokens], dim=1), torch.ones_like(draft.length)
    newest = path.gather(1, draft.length[:, None])
    last = batch.rows(newest, batch.length + draft.length, one)
    hidden = functional.pad(known, (0, 0, 0, 1))
    each = torch.arange(len(batch), device=batch.device)
    early = target.early_exit(layer)
    # Of an adapter's keys and values only the newest token's are missing, which the next draft may come after.
    newly = model.forward(last, cache, early) if adapter is None else adapter.exit(model, cache, last, early)
    hidden[each, draft.length] = newly
    return model.forward(rows, cache, target.resume(layer), hidden.flatten(0, 1))


def decide(
    model: Model,
    batch: Batch,
    draft: Draft,
    target: Tensor,
    scores: Tensor | None,
    rule: Sampling | None,
    lineage: Lineage | None,
) -> Verdict:
    """Which draft rows are accepted: by equality with `target` int64 [S, K] under shared noise, or by rejection.

    The latter with a `rule` [S], from the scores [S, K, V] of the full model.
    """
    if rule is None or scores is None:
        return model.ops.verify(target, draft.tokens, draft.length, batch.length, draft.parent)
    return model.ops.verify_rejection(
        scores,
        draft.tokens,
        draft.scores,
        draft.length,
        batch.length,
        *rule,
        parent=draft.parent,
        drawn=None if lineage is None else lineage.depth,
    )


def close_up(model: Model, cache: KVCache, batch: Batch, verdict: Verdict, lineage: Lineage) -> None:
    """Move the keys and values of a tree's accepted path to where a chain would have them."""
    path = verdict.path[:, : lineage.path.shape[2]]
    model.ops.compact(cache.keys, cache.values, batch.block_table, path, verdict.accepted, batch.length)


def _deepest(lineage: Lineage, count: Tensor) -> Tensor:
    """The depth of each sequence's draft tree, whose first `count` int64 [S] nodes are real."""
    real = torch.arange(lineage.depth.shape[1], device=count.device) <= count[:, None]
    return torch.where(real, lineage.depth, 0).amax(dim=1)


def commit(sequence: Sequence, tokens: list[int], drafted: int, depth: int) -> list[Piece]:
    """Append what a round gave a sequence, accepted draft tokens and the one after them, and count it.

    Its stop rules may end it before the last of them. A draft of `drafted` nodes was `depth` deep.
    """
    pieces = sequence.extend(tokens, len(tokens) - 1)
    counters = sequence.counters
    accepted = min(len(pieces), len(tokens) - 1)
    counters.drafted += drafted
    counters.accepted += accepted
    counters.bonus += len(pieces) - accepted
    for tally, reached in ((counters.drafted_per_position, depth), (counters.accepted_per_position, accepted)):
        tally.extend([0] * (reached - len(tally)))
        for position in range(reached):
            tally[position] += 1
    return pieces
