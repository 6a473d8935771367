"""Routed models whose layers are skipped by command: what skipping saves, whatever routers would choose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..loaders.config import ModelConfig
from ..runtime.engine import Engine
from ..runtime.errors import RequestError, SkipjackError
from ..runtime.graphs import Graphs
from ..runtime.model import Model
from ..runtime.request import SamplingParams
from .forced_acceptance import own_graphs, with_graphs

ALWAYS, NEVER = -1.0, 2.0


@contextmanager
def forced(model: Model, skipped: Collection[int]) -> Generator[None, None, None]:
    """Inside, every token skips the routed layers in `skipped` and runs the others; routers are computed as ever.

    The thresholds are part of what is captured in a graph.
    """
    before = dict(model.routed)
    for i, routed in before.items():
        model.routed[i] = routed._replace(threshold=NEVER if i in skipped else ALWAYS)
    try:
        yield
    finally:
        model.routed |= before


def layer_bytes(config: ModelConfig, itemsize: int) -> tuple[int, int]:
    """Bytes of the weights of a routed layer that a token reads where it runs, and where it is skipped.

    Raises:
        RequestError: no layer of the model is routed.
    """
    routing, hidden = config.routing, config.hidden_size
    if routing is None:
        raise RequestError(
            f"MODEL: expected a routed checkpoint, such as skipjack route makes, got {config.model_type}"
        )
    queries, keys = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    always = (keys + routing.router_width) * hidden
    runs = 2 * queries * hidden + 3 * hidden * config.intermediate_size
    return (always + runs) * itemsize, (always + 3 * hidden * routing.adapter_width) * itemsize


@dataclass(frozen=True)
class Row:
    """Decoding with `skipped` of the `of` routed layers skipped, against none: medians over pairs.

    `speed`: the time of a token where nothing is skipped ÷ its own. `bytes_saved`: weight bytes a token does not read
    ÷ those it reads where nothing is skipped. `time_saved` is the same share of the time.
    """

    skipped: int
    of: int
    speed: float
    speed_p10: float
    speed_p90: float
    time_saved: float
    bytes_saved: float


def measure(
    engine: Engine, counts: Sequence[int], tokens: int, pairs: int, progress: Callable[[int], None]
) -> list[Row]:
    """A row for each count of skipped layers, each pair run none, skipped, skipped, none.

    Raises:
        RequestError: the model is not routed, or has fewer routed layers.
        SkipjackError: a run did not skip what it was told to: no speed is reported.
    """
    model = engine._loaded()[0]
    config, params = engine.config, SamplingParams(max_tokens=tokens, ignore_eos=True)
    ran, left = layer_bytes(config, model.dtype.itemsize)
    routed = config.routing.layers if config.routing else ()
    wrong = next((count for count in counts if not 0 <= count <= len(routed)), None)
    if wrong is not None:
        raise RequestError(f"--skipped: expected 0 to {len(routed)}, the routed layers of the model, got {wrong}")
    total = config.num_layers * ran + config.vocab_size * config.hidden_size * model.dtype.itemsize
    total -= (config.num_layers - len(routed)) * config.hidden_size * _router_width(config) * model.dtype.itemsize
    rows: list[Row] = []
    for count in counts:
        speeds: list[float] = []
        with own_graphs(engine) as none, own_graphs(engine) as some:
            plain, skipping = ((), none), (routed[len(routed) - count :], some)
            for own in (plain, skipping):
                _decode(engine, *own, params)
            for _ in range(pairs):
                times = [_decode(engine, *own, params) for own in (plain, skipping, skipping, plain)]
                speeds.append((times[0] + times[3]) / (times[1] + times[2]))
        low, speed, high = (float(value) for value in np.percentile(speeds, (10, 50, 90)))
        rows.append(Row(count, len(routed), speed, low, high, 1 - 1 / speed, count * (ran - left) / total))
        progress(count)
    return rows


def _decode(engine: Engine, skipped: Collection[int], graphs: Graphs | None, params: SamplingParams) -> float:
    """`graphs` have been captured under these thresholds and no others."""
    with with_graphs(engine, graphs), forced(engine._loaded()[0], skipped):  # pyright: ignore[reportPrivateUsage]
        stats = engine.generate([1, 2, 3, 4], params, method="flexidepth").stats
    expected = 2 * len(skipped) * (stats.prompt_tokens + stats.completion_tokens - 1)
    if stats.executed_skips != expected:
        raise SkipjackError(f"expected {expected} skipped sub-layers, counted {stats.executed_skips}")
    return stats.decode_s


def _router_width(config: ModelConfig) -> int:
    return config.routing.router_width if config.routing else 0
