"""Result files of comparisons as tables."""

from __future__ import annotations

from typing import Any

from .record import Sheet, device, title, where

UNTRAINED = "UNTRAINED ROUTERS, drawn at random: which tokens use more layers means nothing here"


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
        f"and in {result['dtype']}, timed",
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
    mode, llama_cpp = result.get("float32_compile_mode"), result.get("llama_cpp_python")
    libraries = f"transformers {result['transformers']}" + (f", llama-cpp-python {llama_cpp}" if llama_cpp else "")
    notes = (
        "Whole calls, prompt included, greedy, run skipjack, peer, peer, skipjack; medians over prompts.",
        *((f"For the ids in float32 the loop is compiled in mode {mode}.",) if mode else ()),
        f"Measured on {where(result['machine'])}, {libraries}.",
    )
    return Sheet(f"Peers: {title(result)}, {result['max_tokens']} tokens", columns, tuple(rows), notes)


def baselines(result: dict[str, Any]) -> Sheet:
    """`bench baselines`: a row for every method and number of layers skipped, over all categories."""
    rows: list[tuple[str, ...]] = []
    for line in result["lines"]:
        if line["category"] != "all":
            continue
        if line["agreement"] is None:
            rows.append((line["method"], line["note"], "", "", ""))
            continue
        agreed, perplexity = f"{line['agreement']:.3f}", f"{line['perplexity']:.2f}"
        rows.append((line["method"], f"{line['skipped']:.1f}", str(line["tokens"]), agreed, perplexity))
    columns = ("method", "layers skipped", "tokens", "agreement", "perplexity")
    notes = (
        "Agreement: the share of the full model's own greedy tokens that the method would choose too, given those "
        "before them.",
        f"Measured on {where(result['machine'])}.",
    )
    return Sheet(f"Layers left out: {title(result)}", columns, tuple(rows), notes)


def dmtd(result: dict[str, Any]) -> Sheet:
    """`bench dmtd`: a row for every horizon."""
    columns = ("horizon", "batch", "speed ÷ plain", "p10–p90", "predicted", "tokens / weight pass", "bound")
    rows = tuple(
        (
            str(line["horizon"]),
            str(line["batch"]),
            f"{line['speed']:.2f}",
            f"{line['speed_low']:.2f}–{line['speed_high']:.2f}",
            f"{line['predicted']:.2f}",
            f"{line['tokens_per_weight_pass']:.2f}",
            f"{line['bound']:.2f}",
        )
        for line in result["lines"]
    )
    return Sheet(f"Cycles: {title(result)}", columns, rows, (f"Measured on {where(result['machine'])}.",))


def forced(result: dict[str, Any]) -> Sheet:
    """`bench forced`: a row for every number of layers skipped."""
    columns = ("layers skipped", "speed ÷ none skipped", "p10–p90", "time saved", "bytes saved", "time ÷ bytes")
    rows = tuple(
        (
            f"{row['skipped']} of {row['of']}",
            f"{row['speed']:.2f}",
            f"{row['speed_p10']:.2f}–{row['speed_p90']:.2f}",
            f"{row['time_saved']:.1%}",
            f"{row['bytes_saved']:.1%}",
            f"{row['time_saved'] / row['bytes_saved']:.2f}" if row["bytes_saved"] else "",
        )
        for row in result["rows"]
    )
    return Sheet(f"Routes by command: {title(result)}", columns, rows, (f"Measured on {where(result['machine'])}.",))


def layers(result: dict[str, Any]) -> Sheet:
    """`bench layers`: a row for every task."""
    columns = (
        "task",
        "prompts",
        "tokens",
        f"mean of {result['layers']}",
        "variance",
        "published mean of 32",
        "variance",
    )
    rows = tuple(
        (
            line["task"],
            str(line["prompts"]),
            str(line["tokens"]),
            f"{line['mean']:.1f}",
            f"{line['variance']:.2f}",
            f"{line['published_mean']:.1f}",
            f"{line['published_variance']:.2f}",
        )
        for line in result["summary"]
    )
    notes = ["published: the authors' trained Llama-3-8B-Instruct, layers 16 to 31 routed"]
    if not result["routers_trained"]:
        notes.append(UNTRAINED)
    return Sheet(f"Layers a token uses: {title(result)}, kv={result['kv']}", columns, rows, tuple(notes))
