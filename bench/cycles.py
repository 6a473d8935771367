"""Direct Multi-Token Decoding against plain decoding of the same tensors, the cost model, and the bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.host import ints
from ..runtime.cache import KVCache
from ..runtime.costs import Costs, calibrate
from ..runtime.decode import decode, prefill
from ..runtime.engine import Engine
from ..runtime.methods import registry
from ..runtime.methods.autoregressive import Autoregressive, Options
from ..runtime.methods.base import Method
from ..runtime.methods.dmtd import DirectMultiToken
from ..runtime.model import Model
from ..runtime.request import SamplingParams
from ..runtime.rows import Rows, one_sequence
from ..runtime.sequence import Counters
from ..runtime.sequence import Sequence as Continuation
from ..runtime.speculate import speculate
from ..runtime.stepwise import at_once

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Line:
    """One horizon. `speed` is the decoding time of plain decoding ÷ that of dmtd, the median over pairs.

    A pair is run plain, dmtd, dmtd, plain. `predicted` is the cost model's, from passes timed one by one; `bound` is
    what weight reads alone would allow. `identical`: decoding gave the tokens of one pass over all of them.
    """

    horizon: int
    batch: int
    tokens: int
    pairs: int
    identical: bool
    speed: float
    speed_low: float
    speed_high: float
    predicted: float
    tokens_per_weight_pass: float
    bound: float


def compare(
    engine: Engine, horizons: Sequence[int], batch: int, tokens: int, pairs: int, progress: Callable[[str], None]
) -> list[Line]:
    """A line a horizon: `batch` random prompts of 32 tokens, `tokens` generated for each, `pairs` times."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    generator = torch.Generator().manual_seed(0)
    prompts = [
        ints(torch.randint(3, engine.config.vocab_size, (PROMPT_TOKENS,), generator=generator)) for _ in range(batch)
    ]
    plain = Autoregressive(Options(), engine.config.num_layers)
    lines: list[Line] = []
    with torch.inference_mode():
        costs = at_once(calibrate(model))
        for horizon in horizons:
            method = registry.parse(f"dmtd:horizon={horizon}").build(engine.config)
            assert isinstance(method, DirectMultiToken)
            identical = _as_taught(model, cache, prompts[0], method, min(tokens, 8 * horizon))
            speeds: list[float] = []
            counted = Counters()
            for pair in range(pairs + 1):
                first, one, counted, last = (
                    _decode(model, cache, prompts, how, tokens) for how in (plain, method, method, plain)
                )
                if pair:
                    speeds.append((first.decode_s + last.decode_s) / (one.decode_s + counted.decode_s))
                progress(f"horizon {horizon}: pair {pair} of {pairs}")
            low, middle, high = (float(value) for value in np.percentile(speeds, (10, 50, 90)))
            lines.append(
                Line(
                    horizon,
                    batch,
                    tokens,
                    pairs,
                    identical,
                    middle,
                    low,
                    high,
                    predict(costs, method, batch),
                    counted.rounds / counted.weight_passes,
                    method.bound or 1.0,
                )
            )
    return lines


def predict(costs: Costs, method: DirectMultiToken, batch: int) -> float:
    """Plain decoding's time of a cycle ÷ dmtd's: every token decodes, the head thinks for a cycle's rows at once."""
    rows = batch * method.horizon
    cycle = method.horizon * costs.draft(method.plan, batch) + costs.part(method.thinking, rows)
    return method.horizon * costs.verify(batch) / cycle


def _decode(model: Model, cache: KVCache, prompts: Sequence[list[int]], method: Method, tokens: int) -> Counters:
    """What decoding `tokens` for every prompt together came to, for the first of them."""
    sequences = [_read(model, cache, prompt, method, tokens) for prompt in prompts]
    try:
        while not sequences[0].finish_reason:
            if isinstance(method, DirectMultiToken):
                decode(model, cache, sequences, method)
            else:
                speculate(model, cache, sequences, method)
        return sequences[0].counters
    finally:
        for sequence in sequences:
            cache.release(sequence.pages)


def _read(model: Model, cache: KVCache, prompt: list[int], method: Method, tokens: int) -> Continuation:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    sequence = Continuation(0, 0, prompt, params, 0, frozenset(), model.config.max_context, None)
    sequence.pages = cache.reserve(sequence.max_length)
    prefill(model, cache, sequence, method)
    return sequence


def _as_taught(model: Model, cache: KVCache, prompt: list[int], method: DirectMultiToken, tokens: int) -> bool:
    """Whether decoded tokens are those that one pass over all of them gives."""
    decoded = _read(model, cache, prompt, method, tokens)
    while not decoded.finish_reason:
        decode(model, cache, [decoded], method)
    cache.release(decoded.pages)
    taught = _read(model, cache, prompt, method, tokens)
    given = decoded.tokens[len(prompt) : -1]
    rows = one_sequence(given, len(prompt), taught.pages, model.ops.decode_tile, model.device)
    chosen = model.predict(_teach(model, cache, rows, method)).token
    cache.release(taught.pages)
    return ints(chosen) == decoded.tokens[len(prompt) + 1 :]


def _teach(model: Model, cache: KVCache, rows: Rows, method: DirectMultiToken) -> Tensor:
    """The residual streams [R, H] of tokens, all at once; the first is a head."""
    laid = model.lay(rows, cache)
    x = model.embed(laid)
    model.run(laid, cache, method.encoding, x)
    early = x.clone()
    model.run(laid, cache, method.thinking, x)
    head = torch.arange(len(x), device=model.device) % method.horizon == 0
    x = torch.where(head[:, None], early + x, early)
    model.run(laid, cache, method.decoding, x)
    return x[: len(rows)]
