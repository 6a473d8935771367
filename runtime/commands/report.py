"""What the command line prints for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..request import Chunk, Output, Stats


def report(output: Output) -> dict[str, Any]:
    """One answer as the object `--json` prints; times are seconds."""
    stats = output.stats
    return {
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "method": stats.method,
        "lossless": stats.lossless,
        "numerics": stats.numerics,
        "backend": stats.backend,
        "seed": stats.seed,
        "usage": {"prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.completion_tokens},
        "timing": {
            "prefill_s": stats.prefill_s,
            "decode_s": stats.decode_s,
            "tokens_per_s": stats.tokens_per_s,
            "draft_s": stats.draft_s,
            "verify_s": stats.verify_s,
            "search_s": stats.search_s,
            "other_s": stats.other_s,
        },
        "speculative": {
            "rounds": stats.rounds,
            "graph_rounds": stats.graph_rounds,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "acceptance_rate": stats.acceptance_rate,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "bonus": stats.bonus,
            "drafted_per_position": list(stats.drafted_per_position),
            "accepted_per_position": list(stats.accepted_per_position),
        },
        "layers": {
            "kept": stats.layers_kept,
            "of": stats.layers,
            "executed_skips": stats.executed_skips,
            **({"per_token": list(stats.layers_per_token)} if stats.layers_per_token else {}),
            **({"per_prompt_token": list(stats.layers_per_prompt_token)} if stats.layers_per_prompt_token else {}),
        },
        **({"weights": _weights(stats)} if stats.weight_passes else {}),
        **({"events": list(stats.events)} if stats.events else {}),
        **({"notes": list(stats.notes)} if stats.notes else {}),
    }


def _weights(stats: Stats) -> dict[str, float | None]:
    return {
        "passes": stats.weight_passes,
        "tokens_per_pass": stats.tokens_per_weight_pass,
        "tokens_per_pass_bound": stats.weight_pass_bound,
    }


def report_chunk(chunk: Chunk, *, has_text: bool) -> dict[str, Any]:
    """One step of a stream as a line of `--json --stream`."""
    return {
        "token_ids": chunk.token_ids,
        "text": chunk.text if has_text else None,
        "drafted": [piece.drafted for piece in chunk.pieces],
        "finish_reason": chunk.finish_reason,
    }


def print_json(value: Mapping[str, Any]) -> None:
    """One line of ASCII JSON on standard output."""
    print(json.dumps(value), flush=True)
