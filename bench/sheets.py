"""Result files of comparisons as tables."""

from __future__ import annotations

from typing import Any

from .record import Sheet, device, title, where


def exact(result: dict[str, Any]) -> Sheet:
    """`bench exact`: one row a file."""
    columns = (
        "dtype",
        "temperature",
        "batch",
        "prompts",
        "tokens",
        "identical to plain",
        "acceptance rate",
        "mean length",
    )
    total = result["summary"][-1]
    row = (
        result["dtype"],
        f"{result['temperature']:g}",
        str(result["batch"]),
        str(total["prompts"]),
        str(total["tokens"]),
        f"{total['identical']} of {total['prompts']}",
        f"{total['acceptance_rate']:.2f}",
        f"{total['mean_acceptance_length']:.2f}",
    )
    machine = result["machine"]
    return Sheet(f"Against plain decoding: {device(machine)}", columns, (row,), (f"Measured on {where(machine)}.",))


def methods(result: dict[str, Any]) -> Sheet:
    """`bench methods`: a row for every method and category."""
    columns = ("method", "category", "prompts", "speed ÷ plain", "p10–p90", "ideal", "gap", "accepted", "mean length")
    rows = tuple(
        (
            line["method"],
            line["category"],
            str(line["prompts"]),
            f"{line['speed']:.2f}",
            f"{line['speed_p10']:.2f}–{line['speed_p90']:.2f}",
            f"{line['ideal']:.2f}",
            line["gap"],
            f"{line['acceptance_rate']:.2f}",
            f"{line['mean_acceptance_length']:.2f}",
        )
        for line in result["summary"]
    )
    return Sheet(f"Methods: {title(result)}", columns, rows, (f"Measured on {where(result['machine'])}.",))


def peers(result: dict[str, Any]) -> Sheet:
    """`bench peers`: a row for every peer, also for one that could not run."""
    columns = (
        "peer",
        "skipjack ÷ peer",
        "p10–p90",
        "peer tokens/s",
        "skipjack tokens/s",
        "ids equal in float32",
        f"ids equal in {result['dtype']}",
    )
    rows: list[tuple[str, ...]] = []
    for line in result["summary"]:
        if line["unavailable"] is not None:
            rows.append((line["peer"], f"unavailable: {line['unavailable']}", *[""] * 3, line["identical_float32"], ""))
            continue
        rows.append(
            (
                line["peer"],
                f"{line['ratio']:.2f}",
                f"{line['ratio_p10']:.2f}–{line['ratio_p90']:.2f}",
                f"{line['tokens_per_s']:.1f}",
                f"{line['skipjack_tokens_per_s']:.1f}",
                line["identical_float32"],
                f"{line['identical']} of {line['prompts']}",
            )
        )
    notes = (
        "Whole calls, prompt included, greedy, run skipjack, peer, peer, skipjack; medians over prompts.",
        f"Measured on {where(result['machine'])}, transformers {result['transformers']}.",
    )
    return Sheet(f"Peers: {title(result)}, {result['max_tokens']} tokens", columns, tuple(rows), notes)
