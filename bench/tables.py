"""Tables of `bench decode` and of the microbenchmarks, from their result files."""

from __future__ import annotations

from typing import Any

from .record import Sheet, title, where

OPERATORS = 16


def decode(result: dict[str, Any]) -> tuple[Sheet, ...]:
    """Passes against their bytes, draft steps, rounds with forced acceptance, prompts, operators of decode(1)."""
    place, context = title(result), result["setting"]["context"]
    return (
        Sheet(
            f"verify(K): {place}",
            ("K", "ms", "MB", f"% of {result['of']}", "bubble a layer, µs", "÷ decode(1)"),
            tuple(_verify(one) for one in result["passes"] if one["kind"] == "verify"),
            (
                f"Pass and head after {context} tokens, {result['backend']}. Bytes: weights, keys and values read.",
                f"Bandwidth measured beside it: {_rates(result)}. {_measured(result)}",
            ),
        ),
        Sheet(
            f"A draft step: {place}",
            ("layers kept", "ms", f"% of {result['of']}", "÷ decode(1)", "÷ linear ideal"),
            tuple(_draft(one) for one in result["passes"] if one["kind"] == "draft"),
            (_line(result["line"]),),
        ),
        *_light(result, place),
        Sheet(
            f"Rounds with forced acceptance: {place}",
            (
                "method",
                "α",
                "length",
                "round, ms",
                "draft step, ms",
                "verify, ms",
                "glue, %",
                "plain, ms a token",
                "speed ÷ plain",
                "possible",
                "of it",
            ),
            tuple(_round(one) for one in result["rounds"]),
            ("Possible: mean length ÷ (k·(h + f·(1 − h)) + 1). Glue: 1 − (k·draft + verify) ÷ round.",),
        ),
        *_prompts(result, place),
        Sheet(
            f"Operators of decode(1): {place}",
            ("operator", "calls", "% of their time"),
            tuple(
                (one["name"], f"{one['calls']:.0f}", f"{100 * one['share']:.1f}")
                for one in result["operators"][:OPERATORS]
            ),
            (f"{sum(one['calls'] for one in result['operators']):.0f} calls in all, nested ones included.",),
        ),
    )


def micro(result: dict[str, Any]) -> Sheet:
    """Every op alone."""
    rows = tuple(
        (
            one["op"],
            one["shape"],
            str(one["rows"]),
            str(one["context"] or ""),
            _spread(one["seconds"], 1e6, 1),
            f"{one['bytes'] / 1e6:.3g}",
            f"{100 * one['share']:.1f}",
            f"{one['ratio']:.2f}",
        )
        for one in result["figures"]
    )
    columns = ("op", "shape", "rows", "context", "µs", "MB", f"% of {result['of']}", "plain PyTorch ÷ op")
    notes = (f"{result['backend']}. Bandwidth measured beside it: {_rates(result)}. {_measured(result)}",)
    return Sheet(f"Ops alone: {title(result)}", columns, rows, notes)


def _light(result: dict[str, Any], place: str) -> tuple[Sheet, ...]:
    rows = tuple(_draft(one) for one in result["passes"] if one["kind"] == "light draft")
    columns = ("layers kept", "ms", f"% of {result['of']}", "÷ decode(1)", "÷ linear ideal by its bytes")
    return (Sheet(f"A draft step in eight bits: {place}", columns, rows, ()),) if rows else ()


def _verify(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(one["rows"]),
        _spread(one["seconds"], 1e3),
        f"{one['bytes'] / 1e6:.0f}",
        f"{100 * one['share']:.1f}",
        f"{one['bubble'] * 1e6:.1f}",
        _spread(one["ratio"]),
    )


def _draft(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(one["layers"]),
        _spread(one["seconds"], 1e3),
        f"{100 * one['share']:.1f}",
        _spread(one["ratio"]),
        f"{one['ideal']:.2f}",
    )


def _round(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        one["method"],
        f"{one['rate']:.2f}",
        f"{one['mean_length']:.2f}",
        _spread(one["seconds"], 1e3),
        f"{one['draft'] * 1e3:.2f}",
        f"{one['verify'] * 1e3:.2f}",
        f"{100 * one['glue']:.1f}",
        _spread(one["plain"], 1e3),
        _spread(one["speed"]),
        f"{one['possible']:.2f}",
        f"{one['of_possible']:.2f}",
    )


def _prompts(result: dict[str, Any], place: str) -> tuple[Sheet, ...]:
    """Older files have none."""
    rows = tuple(_prompt(one) for one in result.get("prompts", ()))
    columns = ("tokens", "ms", "tokens/s", "GFLOP/s", "% of a large product")
    note = "Whole prompts as a request reads them. FLOP: those of products with matrices."
    return (Sheet(f"Prompts: {place}", columns, rows, (note,)),) if rows else ()


def _prompt(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(one["tokens"]),
        _spread(one["seconds"], 1e3, 1),
        f"{one['tokens'] / one['seconds']['median']:.0f}",
        f"{one['flops'] / 1e9:.0f}",
        f"{100 * one['share']:.0f}",
    )


def _line(fit: dict[str, float]) -> str:
    return f"Line: {fit['fixed'] * 1e3:.2f} ms + {fit['layer'] * 1e3:.3f} ms a layer, R² {fit['r2']:.4f}."


def _rates(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value / 1e9:.1f} GB/s" for key, value in result["bandwidth"].items())


def _spread(value: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    median, low, high = (f"{value[key] * scale:.{digits}f}" for key in ("median", "p10", "p90"))
    return f"{median} ({low}–{high})"


def _measured(result: dict[str, Any]) -> str:
    commit = result["machine"]["commit"]
    return f"Median (p10–p90). Measured on {where(result['machine'])}{f', commit {commit}' if commit else ''}."
