"""What papers report, as far as it could be confirmed; projections stand beside it."""

from __future__ import annotations

from dataclasses import dataclass

LAYERSKIP_README = "README of facebookresearch/LayerSkip at 02075d0 (arXiv 2404.16710), mean of acceptance_rate"
LAYERSKIP_PAPER = "LayerSkip, arXiv 2404.16710"
SWIFT_PAPER = "SWIFT, arXiv 2410.06916"
CLASP_PAPER = "CLaSp, arXiv 2505.24196"


@dataclass(frozen=True)
class Published:
    """One published result. `kept` is the share of the layers a draft step runs.

    `acceptance` is accepted ÷ drafted tokens with drafts of `k` tokens; None where only the speed-up could be
    confirmed. `speedup` is over the paper's own plain decoding, on its own hardware.
    """

    method: str
    source: str
    model: str
    task: str
    kept: float
    speedup: float
    k: int | None = None
    acceptance: float | None = None


# The README gives tokens per second with and without speculation; the speed-up is their ratio.
PUBLISHED = (
    Published("layerskip E=8", LAYERSKIP_README, "Llama-2-7B", "CNN/DM", 8 / 32, 80.122 / 39.047, 6, 0.7945),
    Published(
        "layerskip E=8", LAYERSKIP_README, "Llama-2-7B", "CNN/DM, text, sampled", 8 / 32, 50.723 / 38.696, 6, 0.4316
    ),
    Published(
        "layerskip E=10", LAYERSKIP_README, "Llama-2-7B", "HumanEval, sampled", 10 / 32, 54.486 / 39.270, 6, 0.5554
    ),
    Published("layerskip E=8", LAYERSKIP_README, "Llama-2-7B", "CNN/DM, 1 shot", 8 / 32, 41.243 / 31.220, 12, 0.4305),
    Published("layerskip E=8", LAYERSKIP_README, "Llama-2-7B", "XSUM, 3 shots", 8 / 32, 28.222 / 26.413, 12, 0.4386),
    Published("layerskip E=8", LAYERSKIP_PAPER, "Llama-2-7B", "CNN/DM", 8 / 32, 1.86),
    Published("layerskip E=8", LAYERSKIP_PAPER, "Llama-2-7B", "XSUM", 8 / 32, 1.54),
    Published("layerskip E=8", LAYERSKIP_PAPER, "Llama-2-7B", "HumanEval", 8 / 32, 1.83),
    Published("swift r=0.45", SWIFT_PAPER, "Llama-2-13B", "lowest of its tasks", 1 - 0.45 * 38 / 40, 1.28),
    Published("swift r=0.45", SWIFT_PAPER, "Llama-2-13B", "highest of its tasks", 1 - 0.45 * 38 / 40, 1.53),
    Published("swift r=0.5", SWIFT_PAPER, "Llama-2-70B", "lowest of its tasks", 1 - 0.5 * 78 / 80, 1.39),
    Published("swift r=0.5", SWIFT_PAPER, "Llama-2-70B", "highest of its tasks", 1 - 0.5 * 78 / 80, 1.62),
    Published("clasp M=8", CLASP_PAPER, "Llama-3-8B", "Spec-Bench", 24 / 32, 1.24),
    Published("clasp M≈40", CLASP_PAPER, "Llama-3-70B", "Spec-Bench", 40 / 80, 1.67),
)
