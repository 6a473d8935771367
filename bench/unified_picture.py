"""A result of `bench unified` as a picture, and its scaling as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .charts import pyplot_svg, save
from .record import Sheet, title, where
from .unified import Pattern, Scale


def sheet(result: dict[str, Any]) -> Sheet:
    """A row for every speed-up and batch size, with the balanced set's agreement."""
    columns = ("speed-up", "batch", "tokens/s", "plain", "measured", "p10–p90", "predicted", "ratio", "agreement")
    agreement = {
        line.speedup: f"{line.agreement:.2f}"
        for line in (Pattern(**fields) for fields in result["patterns"])
        if (line.pattern, line.category) == ("balanced", "all")
    }
    rows = tuple(
        (
            f"{line.speedup:g}",
            str(line.batch),
            f"{line.tokens_per_s:.1f}",
            f"{line.plain_tokens_per_s:.1f}",
            f"{line.measured:.2f}",
            f"{line.measured_p10:.2f}–{line.measured_p90:.2f}",
            f"{line.predicted:.2f}",
            f"{line.ratio:.2f}",
            agreement[line.speedup],
        )
        for line in (Scale(**fields) for fields in result["scaling"])
    )
    notes = (
        "measured: decoding speed ÷ plain; predicted: (L+h)/(K+h); agreement: share of the full model's own tokens.",
        f"Measured on {where(result['machine'])}.",
    )
    return Sheet(f"Unified Layer Skipping: {title(result)}", columns, rows, notes)


def draw(result: dict[str, Any], path: Path) -> None:
    """Agreement and likelihood of every pattern over the speed-up asked for; measured speed-ups beside predicted ones.

    Raises:
        SkipjackError: matplotlib is not installed.
    """
    patterns = [Pattern(**fields) for fields in result["patterns"]]
    scaling = [Scale(**fields) for fields in result["scaling"]]
    pyplot = pyplot_svg()
    figure, (share, nll, speed) = pyplot.subplots(1, 3, figsize=(12, 3.8))
    whole = [line for line in patterns if line.category == "all" and line.pattern != "full"]
    for pattern in dict.fromkeys(line.pattern for line in whole):
        own = [line for line in whole if line.pattern == pattern]
        x = [line.speedup for line in own]
        share.plot(x, [line.agreement for line in own], "o-", label=pattern)
        nll.plot(x, [line.nll for line in own], "o-", label=pattern)
    share.set_ylim(0, 1)
    share.set_ylabel("agreement with the full model")
    nll.set_ylabel("nats per token of the full model")
    for axes in (share, nll):
        axes.set_xlabel("speed-up asked for")
        axes.legend(fontsize=8)
    batches = list(dict.fromkeys(line.batch for line in scaling))
    for i, batch in enumerate(batches):
        own = [line for line in scaling if line.batch == batch]
        x = [j + (i - (len(batches) - 1) / 2) * 0.8 / len(batches) for j in range(len(own))]
        low, high = ([abs(line.measured - getattr(line, f"measured_{p}")) for line in own] for p in ("p10", "p90"))
        speed.bar(x, [line.measured for line in own], 0.8 / len(batches), label=f"batch {batch}", yerr=[low, high])
        speed.scatter(x, [line.predicted for line in own], marker="_", color="black", s=300, zorder=3)
        speed.set_xticks(range(len(own)), [f"{line.speedup:g}×" for line in own])
    speed.set_ylabel("decoding speed ÷ plain (black: predicted)")
    speed.legend(fontsize=8)
    figure.suptitle(title(result), fontsize=9)
    save(pyplot, figure, path)
