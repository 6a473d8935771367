"""`skipjack bench decode`: what a token, a draft and a round cost, against what the bytes and the acceptance allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..runtime.costs import weight_pass
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.methods import registry
from ..runtime.model import Model
from ..runtime.plan import LayerPlan
from ..runtime.quantised import drafter
from ..runtime.request import SamplingParams, Stats
from .clock import Sampler, Spread, denominator, paired, peak, sampler
from .forced_acceptance import forced_acceptance
from .passes import chain_after, fill, first_layers, pass_bytes, prompt_flops, step
from .shares import Share, shares

PLAIN = "autoregressive"
Note = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """How much is measured: 2·`pairs` samples of every pass, 2·`repeats` runs of every prompt and of every round, which
    has `tokens` tokens.
    """

    context: int
    rows: tuple[int, ...]
    rates: tuple[float, ...]
    pairs: int
    repeats: int
    tokens: int
    prompts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """Reading a prompt, as a request does: FLOP/s of its products with matrices, and that ÷ those of a large one."""

    tokens: int
    seconds: Spread
    flops: float
    share: float


@dataclass(frozen=True)
class Pass:
    """One pass with its head: `kind` "verify" of `rows` rows (1: decode), or with `layers` layers "draft" or, with
    weights of eight bits, "light draft".

    `share` is bytes ÷ time ÷ bandwidth, `bubble` (time − bytes ÷ bandwidth) ÷ layers in seconds. `ratio` is the time ÷
    decode(1) of the same turn; `ideal` the time of a draft ÷ the linear ideal t·(h + f·(1 − h)).
    """

    kind: str
    rows: int
    layers: int
    seconds: Spread
    bytes: int
    share: float
    bubble: float | None
    ratio: Spread
    ideal: float | None


@dataclass(frozen=True)
class Line:
    """The straight line through the draft times: seconds = fixed + layer·layers kept."""

    fixed: float
    layer: float
    r2: float


@dataclass(frozen=True)
class Round:
    """A method at a forced acceptance rate, run plain, method, method, plain.

    Times in seconds: a round, and what its passes take alone, a draft step and the verification. `glue` is
    1 − (k·draft + verify) ÷ round. `speed` is the time of plain decoding ÷ the method's, for a token; `possible` what
    the acceptance allows at v = 1 with drafts as cheap as their bytes, and `of_possible` their quotient.
    """

    method: str
    rate: float
    k: int
    rounds: int
    mean_length: float
    seconds: Spread
    draft: float
    verify: float
    glue: float
    plain: Spread
    speed: Spread
    possible: float
    of_possible: float


@dataclass(frozen=True)
class Result:
    """Everything one run measured."""

    bandwidth: dict[str, float]
    passes: list[Pass]
    line: Line
    rounds: list[Round]
    prompts: list[Prompt]
    operators: list[Share]


def measure(
    engine: Engine, methods: Sequence[str], setting: Setting, bandwidth: dict[str, float], note: Note
) -> Result:
    """Passes alone, then rounds of every method at every rate, then prompts.

    Raises:
        RequestError: a method drafts neither with some of the layers nor with weights of eight bits.
    """
    light = any(drafting(engine, method)[2] for method in methods)
    passes = measure_passes(engine, setting, bandwidth, note, light=light)
    drafts = [one for one in passes if one.kind == "draft"]
    rounds = [measure_rounds(engine, method, rate, setting, note) for method in methods for rate in setting.rates]
    line = fit([(one.layers, one.seconds.median) for one in drafts])
    prompts = measure_prompts(engine, setting, note)
    return Result(bandwidth, passes, line, rounds, prompts, measure_operators(engine, setting))


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares through (layers, seconds)."""
    x, y = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    slope, fixed = np.polyfit(x, y, 1)
    residual, total = float(((y - fixed - slope * x) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return Line(float(fixed), float(slope), 1 - residual / total if total else 1.0)


def drafting(engine: Engine, name: str) -> tuple[LayerPlan, int, bool]:
    """What a draft step of a method runs, the draft tokens of a round, and whether its weights are of eight bits.

    Raises:
        RequestError: it drafts neither with some of the layers nor with such weights.
    """
    method = registry.parse(name).build(engine.config)
    plan, recipe = method.plan, method.recipe([]) if method.widest else None
    k = recipe.num_draft_tokens if recipe else 0
    if not (plan.skipped or method.quantised) or not k:
        raise RequestError(
            f"--method: expected one that drafts with some of the layers or with weights of eight bits, got {name}"
        )
    return plan, k, method.quantised


def measure_passes(
    engine: Engine, setting: Setting, bandwidth: dict[str, float], note: Note, *, light: bool = False
) -> list[Pass]:
    """verify(K) and draft passes after a context, every one in every turn; `light`: those of eight bits too."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    layers, rate = model.config.num_layers, bandwidth[denominator(model.device)]
    kept = sorted({round(share * layers) for share in (0, 0.25, 0.5, 0.75, 1)})
    with torch.inference_mode():
        pages = fill(cache, setting.context + max(setting.rows))
        try:
            one = chain_after(model, pages, setting.context, 1)
            functions = {
                ("verify", rows, layers): step(
                    model, cache, chain_after(model, pages, setting.context, rows), model.full
                )
                for rows in sorted({1, *setting.rows})
            }
            for kind in ("draft", "light draft") if light else ("draft",):
                part = drafter(model, kind == "light draft")
                functions |= {(kind, 1, count): step(part, cache, one, first_layers(model, count)) for count in kept}
            samplers: dict[str, Sampler] = {}
            for key, function in functions.items():
                note(f"{key[0]}, {key[1]} rows, {key[2]} layers")
                samplers[repr(key)] = sampler(function, model.device)
            taken = paired(samplers, setting.pairs)
        finally:
            cache.release(pages)
    single = taken[repr(("verify", 1, layers))]
    t = Spread.of(single).median
    found: list[Pass] = []
    for kind, rows, count in functions:
        samples = taken[repr((kind, rows, count))]
        seconds = Spread.of(samples)
        total = pass_bytes(
            model.config,
            model.dtype.itemsize,
            setting.context,
            count,
            weight_size=1 if kind == "light draft" else None,
        )
        share = _share(model, count, light=kind == "light draft")
        found.append(
            Pass(
                kind,
                rows,
                count,
                seconds,
                total,
                total / seconds.median / rate,
                (seconds.median - total / rate) / count if count else None,
                Spread.of(a / b for a, b in zip(samples, single, strict=True)),
                None if kind == "verify" else seconds.median / (t * share),
            )
        )
    return found


def measure_rounds(engine: Engine, name: str, rate: float, setting: Setting, note: Note) -> Round:
    """One method at one rate. A draft step is timed as the pass of the method's plan, at the same context."""
    note(f"{name}, acceptance {rate}")
    plan, k, light = drafting(engine, name)
    prompt = [3 + (7 * i) % (engine.config.vocab_size - 3) for i in range(setting.context)]
    params = SamplingParams(max_tokens=setting.tokens, ignore_eos=True)
    last: dict[str, Stats] = {}
    with forced_acceptance(engine, rate) as table:

        def run(method: str) -> float:
            table.restart()
            last[method] = engine.generate(prompt, params, method=method).stats
            return 1 / last[method].tokens_per_s

        for method in (PLAIN, name):
            run(method)
        taken = paired({method: partial(run, method) for method in (PLAIN, name)}, setting.repeats)
    # Every run has the same rounds, the table being the same.
    stats = last[name]
    seconds = Spread.of(sample * (stats.completion_tokens - 1) / stats.rounds for sample in taken[name])
    draft_s, verify_s = _passes_of_a_round(engine, plan, k, setting, light=light)
    speed = Spread.of(a / b for a, b in zip(taken[PLAIN], taken[name], strict=True))
    share = _share(engine._loaded()[0], plan.layers_kept, light=light)  # pyright: ignore[reportPrivateUsage]
    possible = stats.mean_acceptance_length / (k * share + 1)
    glue = 1 - (k * draft_s + verify_s) / seconds.median
    return Round(
        name,
        rate,
        k,
        stats.rounds,
        stats.mean_acceptance_length,
        seconds,
        draft_s,
        verify_s,
        glue,
        Spread.of(taken[PLAIN]),
        speed,
        possible,
        speed.median / possible,
    )


def measure_prompts(engine: Engine, setting: Setting, note: Note) -> list[Prompt]:
    """Prompts of plain decoding, in turns."""
    params, vocabulary = SamplingParams(max_tokens=1, ignore_eos=True), engine.config.vocab_size

    def seconds(tokens: int) -> float:
        prompt = [3 + (7 * i) % (vocabulary - 3) for i in range(tokens)]
        return engine.generate(prompt, params, method=PLAIN).stats.prefill_s

    for tokens in setting.prompts:
        note(f"prompt of {tokens} tokens")
        seconds(tokens)
    taken = paired({str(tokens): partial(seconds, tokens) for tokens in setting.prompts}, setting.repeats)
    model = engine._loaded()[0]  # pyright: ignore[reportPrivateUsage]
    roof, found = peak(model.device, model.dtype), list[Prompt]()
    for tokens in setting.prompts:
        time = Spread.of(taken[str(tokens)])
        flops = prompt_flops(engine.config, tokens) / time.median
        found.append(Prompt(tokens, time, flops, flops / roof))
    return found


def measure_operators(engine: Engine, setting: Setting) -> list[Share]:
    """What the host does in decode(1)."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    with torch.inference_mode():
        pages = fill(cache, setting.context + 1)
        try:
            return shares(step(model, cache, chain_after(model, pages, setting.context, 1), model.full))
        finally:
            cache.release(pages)


def _share(model: Model, layers: float, *, light: bool) -> float:
    """What a draft step of so many layers reads, ÷ what a pass of the model does."""
    return weight_pass(model.config, layers) / (model.dtype.itemsize if light else 1)


def _passes_of_a_round(
    engine: Engine, plan: LayerPlan, k: int, setting: Setting, *, light: bool
) -> tuple[float, float]:
    """Seconds of a draft step and of the verification of k draft tokens, alone."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    with torch.inference_mode():
        pages = fill(cache, setting.context + k + 1)
        try:
            draft = step(drafter(model, light), cache, chain_after(model, pages, setting.context, 1), plan)
            verify = step(model, cache, chain_after(model, pages, setting.context, k + 1), model.full)
            device = model.device
            taken = paired({"draft": sampler(draft, device), "verify": sampler(verify, device)}, setting.pairs)
        finally:
            cache.release(pages)
    return Spread.of(taken["draft"]).median, Spread.of(taken["verify"]).median
