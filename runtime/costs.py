"""What passes cost on this machine, and a ledger that keeps speculation from losing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from ..loaders.config import ModelConfig
from .model import Model
from .plan import LayerPlan
from .rows import one_sequence
from .stepwise import Stepwise

Clock = Callable[[], float]
REPEATS = 5
PROBED_ROWS = 8


@dataclass
class Costs:
    """Seconds of a pass as a function of its rows and sub-layers, for one machine.

    A pass reads its weights once for every tile, or is taken to: `full` is the whole model for one row, head included,
    `tiles` what a pass in one tile of so many rows takes beyond that, ascending, `per_row` what each further row of a
    tile adds, `per_tile` what each further tile of the largest size adds, or so much of it as there is, where passes
    are `unpadded`, `fixed` the part that no skipped sub-layer saves. `pace` is how much slower than calibrated passes
    have been lately. `drafter`: the same of the model that drafts, where that is another.
    """

    sublayers: int
    full: float
    tiles: tuple[tuple[int, float], ...]
    per_tile: float
    fixed: float
    per_row: float = 0.0
    pace: float = 1.0
    unpadded: bool = False
    drafter: Costs | None = None

    def verify(self, rows: int) -> float:
        """A full pass over `rows` rows; plain decoding is one over a row a sequence."""
        largest, most = self.tiles[-1]
        count = max(1.0, rows / largest) if self.unpadded else -(-rows // largest)
        first = self.full + next((extra for size, extra in self.tiles if rows <= size), most)
        return self.pace * (first + self.per_tile * (count - 1) + self.per_row * (rows - count))

    def draft(self, plan: LayerPlan, rows: int) -> float:
        """A draft pass of `plan` over `rows` rows."""
        if self.drafter:
            return self.pace * self.drafter.draft(plan, rows)
        share = len(plan.sublayers) / self.sublayers
        return self.verify(rows) * (self.fixed + share * (self.full - self.fixed)) / self.full

    def part(self, plan: LayerPlan, rows: int) -> float:
        """The sub-layers of `plan` over `rows` rows, as a part of a pass: without what no skipped sub-layer saves."""
        share = len(plan.sublayers) / self.sublayers
        return self.verify(rows) * share * (self.full - self.fixed) / self.full

    def observe(self, rows: int, seconds: float) -> None:
        """A full pass over `rows` rows took `seconds`."""
        now = seconds / (self.verify(rows) / self.pace)
        self.pace += 0.1 * (min(max(now, 0.5 * self.pace), 2 * self.pace) - self.pace)


def calibrate(model: Model, clock: Clock = perf_counter) -> Stepwise[Costs]:
    """Time the passes of `model` at a short context, a pass a step: the fastest of a few of each, after a warm-up."""
    sizes, layers = model.tiles or (PROBED_ROWS,), model.config.num_layers
    smallest, largest = sizes[0], sizes[-1]
    cache = model.new_cache(-(-2 * largest // model.ops.page_size))
    pages = cache.reserve(2 * largest)

    def run(rows: int, plan: LayerPlan) -> Tensor:
        return model.forward(one_sequence([0] * rows, 0, pages, model.ops.decode_tile, model.device), cache, plan)

    def timed(rows: int, plan: LayerPlan) -> float:
        # If others had their turn, the threads of a CPU are gone, and a GPU is still at their rounds.
        int(model.predict(run(1, first)).token[0])
        start = clock()
        int(model.predict(run(rows, plan)[-1:]).token[0])
        return clock() - start

    first, half = model.full.early_exit(1), model.full.early_exit(max(1, layers // 2))
    passes = [(1, half), *((rows, model.full) for rows in (1, *sizes, 2 * largest))]
    turns: list[list[float]] = []
    # In turns, so that a machine that is busy for a while slows all of them.
    for _ in range(REPEATS + 1):
        turns.append([])
        for rows, plan in passes:
            turns[-1].append(timed(rows, plan))
            yield
    some, full, *filled, two = (min(times) for times in zip(*turns[1:], strict=True))
    share = max(1, layers // 2) / layers
    fixed = full if share == 1 else (some - share * full) / (1 - share)
    per_row = max(0.0, filled[0] - full) / max(1, smallest - 1)
    tiles = tuple(
        (size, max(0.0, seconds - full - per_row * (size - 1))) for size, seconds in zip(sizes, filled, strict=True)
    )
    per_tile = max(0.0, two - full - tiles[-1][1] - per_row * (2 * largest - 2))
    # A GPU's kernels step by eight rows or sixteen all the same.
    unpadded = bool(model.tiles) and model.device.type == "cpu" and not model.ops.pads(model.dtype)
    return Costs(2 * layers, full, tiles, per_tile, min(max(fixed, 0.0), full), per_row, unpadded=unpadded)


def head_layers(config: ModelConfig) -> float:
    """h: the parameters of the LM head ÷ those of one layer, norms aside."""
    width, heads = config.head_dim, config.num_heads + config.num_kv_heads
    attention = 2 * heads * width * config.hidden_size
    mlp = (3 if config.gated else 2) * config.hidden_size * config.intermediate_size
    return config.vocab_size * config.hidden_size / (attention + mlp)


def weight_pass(config: ModelConfig, layers: float) -> float:
    """(l + h)/(L + h): the share of the weights a pass of l of the L layers reads, with the LM head."""
    head = head_layers(config)
    return (layers + head) / (config.num_layers + head)


@dataclass
class Ledger:
    """Seconds won and lost against plain decoding: a round may be risked only where its worst outcome is covered.

    Covered means that the balance stays above −`limit` of the decoding time so far.
    """

    limit: float
    decoding: float = 0.0
    balance: float = 0.0

    def affords(self, loss: float) -> bool:
        """Whether losing `loss` seconds would keep the promise."""
        return loss <= 0 or self.balance - loss >= -self.limit * self.decoding

    def book(self, seconds: float, plain: float) -> None:
        """A round took `seconds`, and plain decoding would have taken `plain` for the same tokens."""
        self.decoding += seconds
        self.balance += plain - seconds


def expected_tokens(rate: float, drafted: float) -> float:
    """E = (1 − α^{k+1})/(1 − α): tokens of a round that drafts k tokens accepted at rate α (Leviathan et al.)."""
    return drafted + 1.0 if rate >= 1 else (1 - rate ** (drafted + 1)) / (1 - rate)
