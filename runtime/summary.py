"""Finished sequences to results."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from .methods.base import Method
from .methods.policy import Policy
from .request import Output, Stats
from .sequence import Sequence

FAST = "fast numerics: the text may differ from that of exact numerics where two tokens are almost equally likely"
REJECTION = "rejection sampling: the distribution of plain decoding, but not the tokens it has for this seed"


def summarise(
    sequences: list[Sequence],
    method: Method,
    backend: str,
    numerics: str,
    seed: int,
    events: list[Mapping[str, Any]],
) -> Output:
    """The result of one prompt from the sequences of its choices."""
    counters = [sequence.counters for sequence in sequences]
    accepted, drafted = ([getattr(c, f"{name}_per_position") for c in counters] for name in ("accepted", "drafted"))
    first = sequences[0]
    decoded = first.layers_used[1:]
    skips = sum(c.executed_skips for c in counters)
    sampled = method.rejection and not first.params.greedy
    said = [note for note, holds in ((FAST, method.lossless and numerics == "fast"), (REJECTION, sampled)) if holds]
    stats = Stats(
        method=method.name,
        lossless=method.lossless and numerics == "exact",
        backend=backend,
        numerics=numerics,
        seed=seed,
        prompt_tokens=len(first.prompt),
        completion_tokens=sum(sequence.generated for sequence in sequences),
        prefill_s=sum(c.prefill_s for c in counters),
        decode_s=sum(c.decode_s for c in counters),
        draft_s=sum(c.draft_s for c in counters),
        verify_s=sum(c.verify_s for c in counters),
        search_s=sum(c.search_s for c in counters),
        rounds=sum(c.rounds for c in counters),
        graph_rounds=sum(c.graph_rounds for c in counters),
        drafted=sum(c.drafted for c in counters),
        accepted=sum(c.accepted for c in counters),
        bonus=sum(c.bonus for c in counters),
        drafted_per_position=tuple(sum(counts) for counts in zip_longest(*drafted, fillvalue=0)),
        accepted_per_position=tuple(sum(counts) for counts in zip_longest(*accepted, fillvalue=0)),
        layers=method.plan.num_layers,
        layers_kept=sum(decoded) / len(decoded) if decoded else method.plan.layers_kept,
        executed_skips=skips,
        weight_passes=sum(c.weight_passes for c in counters),
        weight_pass_bound=method.bound if isinstance(method, Policy) else None,
        layers_per_token=tuple(first.layers_used),
        layers_per_prompt_token=tuple(first.prompt_layers),
        notes=(*method.notes(skips), *said),
        phases=tuple(first.phases),
        events=(*method.findings(first), *events),
        cached_tokens=first.known,
    )
    return Output(first.prompt, tuple(sequence.result() for sequence in sequences), stats)
