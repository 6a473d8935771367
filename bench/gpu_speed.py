"""What the speed targets are measured with: steps, kernels, drafts and rounds, on random weights of named shapes.

Every part yields figures as it goes and its measurements as they are known; a measurement that has no value says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from ..runtime.engine import Engine
from ..runtime.request import Output, SamplingParams
from . import exact as exactness
from .gpu_parts import Setting, engine_of
from .methods import PLAIN, head_layers
from .step import Bed, Clock, Figure, bubble_per_layer, figures
from .targets import DRAFTS, FRACTIONS, SHAPES, Measurement

Found = Iterator[Figure | Measurement]
EXACT_TOKENS = 10_000
ROUND_SHAPE, DRAFT_TOKENS = "1b", 4
PAIRS = 5


def steps(setting: Setting) -> Found:
    """T1 to T7: whole steps of 1, 8 and 16 rows, and the kernels of a layer."""
    shapes = setting.named(SHAPES)
    found: list[Figure] = []
    for figure in figures(setting.device, shapes.values(), setting.dry):
        found.append(figure)
        yield figure
    for label, shape in shapes.items():
        yield from of_steps(label, setting.config(shape).num_layers, [f for f in found if f.shape in (shape, "")])


def of_steps(label: str, layers: int, found: Iterable[Figure]) -> Iterator[Measurement]:
    """The measurements of a shape's figures and of the copy bandwidth among them."""
    times = {(figure.name, figure.rows): figure for figure in found}
    copy, one = times.get(("copy bandwidth", 0)), times["step", 1]
    if copy is not None and copy.median and one.median:
        yield Measurement("T1", label, bubble_per_layer(one.median, one.bytes, copy.median, layers))
    yield Measurement({"8b": "T2", "1b": "T3", "135m": "T4"}[label], label, one.share, _rate(one))
    if label != "135m":
        for kernel in ("up", "down", "head"):
            yield Measurement("T5", f"{label} {kernel}", times[kernel, 1].share)
    yield Measurement("T6", label, _over(times["step", 8], one))
    if label != "135m":
        yield Measurement("T7", label, _over(times["step", 16], one))


def drafts(setting: Setting) -> Found:
    """T8 and T9: the step of one row by the number of layers that run, spread evenly."""
    clock = Clock(setting.dry)
    for label, shape in setting.named(DRAFTS).items():
        bed = Bed.of(shape, setting.device, setting.dry)
        full, layers = bed.model.full, bed.model.config.num_layers
        times: dict[int, float | None] = {}
        for eighth in range(1, 9):
            kept = max(1, round(layers * eighth / 8))
            if kept in times:
                continue
            running = {i * layers // kept for i in range(kept)}
            skipped = [i for i in range(layers) if i not in running]
            spread = clock.times(bed.step(1, full.without(skipped, skipped)))
            times[kept] = spread[0]
            yield Figure("draft", shape, 1, *spread, 0, 0, None, f"{kept} of {layers} layers")
        yield from of_drafts(label, bed.head_bytes / bed.step_bytes, times)


def of_drafts(label: str, head: float, times: Mapping[int, float | None]) -> Iterator[Measurement]:
    """Seconds by layers kept, all layers last: against a line through nothing but the full step, and their own line.

    `head` is the LM head's share of a full step's bytes, which no draft saves.
    """
    known = {kept: seconds for kept, seconds in times.items() if seconds is not None}
    layers = max(times)
    for fraction in FRACTIONS:
        kept = min(times, key=lambda count: abs(count - fraction * layers))
        value = None
        if kept in known and layers in known:
            value = known[kept] / (known[layers] * (head + kept / layers * (1 - head)))
        yield Measurement("T8", f"{label} f={fraction}", value, f"{kept} of {layers} layers")
    yield Measurement("T9", label, linearity(known) if len(known) > 2 else None)


def linearity(times: Mapping[int, float]) -> float:
    """R² of the least-squares line through seconds by layers."""
    x, y = np.array(list(times)), np.array(list(times.values()))
    rest = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(1 - (rest @ rest) / ((y - y.mean()) @ (y - y.mean())))


def drafts_and_rounds(setting: Setting) -> Found:
    """T8 to T11."""
    yield from drafts(setting)
    yield from rounds(setting)


def rounds(setting: Setting) -> Found:
    """T10 and T11: an engine that drafts with half of its layers, against its rounds' steps and plain decoding."""
    shape = setting.named((ROUND_SHAPE,))[ROUND_SHAPE]
    clock, bed = Clock(setting.dry), Bed.of(shape, setting.device, setting.dry)
    full, count = bed.model.full, bed.model.config.num_layers
    skipped = range(1, count - 1, 2)
    draft = clock.times(bed.step(1, full.without(skipped, skipped)))[0]
    verify = clock.times(bed.step(DRAFT_TOKENS + 1))[0]
    del bed
    engine = engine_of(shape, setting.dtypes[0], setting)
    every = "+".join(map(str, range(1, engine.config.num_layers - 1, 2)))
    method = f"swift:skip_attention={every},skip_mlp={every},num_draft_tokens={DRAFT_TOKENS},threshold=0"
    tokens = 3 if setting.dry else 192
    for name in () if setting.dry else (method, PLAIN):
        _run(engine, name, tokens)
    yield Measurement("T10", "host syncs", _syncs(engine, method, tokens, setting))
    pairs = [_pair(engine, method, tokens) for _ in range(1 if setting.dry else PAIRS)]
    yield from of_rounds(pairs, draft, verify, head_layers(engine.config), setting.dry)


def of_rounds(
    pairs: Iterable[tuple[Output, Output]], draft: float | None, verify: float | None, head: float, dry: bool
) -> Iterator[Measurement]:
    """Plain and speculative runs of the same tokens; seconds of a draft step and of a verification alone."""
    glues: list[float] = []
    ratios: list[float] = []
    for plain, own in pairs:
        stats = own.stats
        drafted = sum(stats.drafted_per_position)
        if draft is not None and verify is not None:
            glues.append(1 - (drafted * draft + stats.rounds * verify) / stats.decode_s)
        cost = (stats.layers_kept + head) / (stats.layers + head)
        ideal = stats.mean_acceptance_length / (drafted / stats.rounds * cost + 1)
        ratios.append(plain.stats.decode_s / stats.decode_s / ideal)
    yield Measurement("T10", "glue", float(np.median(glues)) if glues else None)
    value = None if dry else float(np.median(ratios))
    yield Measurement("T11", ROUND_SHAPE, value, "at the acceptance these weights give")


def exact(setting: Setting) -> Found:
    """T14: every lossless method in turn, in batches, against plain decoding of each prompt alone."""
    wanted, length, batch = (6, 3, 1) if setting.dry else (EXACT_TOKENS, 128, 8)
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    equal = total = 0
    for label, shape in setting.named(("135m", "1b")).items():
        engine = engine_of(shape, setting.dtypes[0], setting)
        number = same = seen = 0
        while seen < wanted / 2:
            prompts = [[3 + (7 * i + 11 * j + 13 * number) % 400 for j in range(4 + 5 * i)] for i in range(batch)]
            plain = [engine.generate(prompt, params).token_ids for prompt in prompts]
            method = exactness.cell(number, engine.config.num_layers)
            for output, alone in zip(engine.generate(prompts, params, method=method), plain, strict=True):
                same += sum(a == b for a, b in zip(output.token_ids, alone, strict=True))
                seen += len(alone)
            number += 1
        equal, total = equal + same, total + seen
        yield Figure(f"exact {label}", shape, 0, None, None, None, 0, 0, None, f"{same} of {seen} tokens equal")
    note = f"{equal} of {total} tokens"
    yield Measurement("T14", "exact", equal / total if total >= EXACT_TOKENS else None, note)


def _run(engine: Engine, method: str, tokens: int) -> Output:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return engine.generate([5, 9, 11, 130, 7, 6, 200, 31], params, method=method)


def _pair(engine: Engine, method: str, tokens: int) -> tuple[Output, Output]:
    """Plain, method, method, plain: outputs with the mean decoding time of each two."""
    first, one, two, last = (_run(engine, name, tokens) for name in (PLAIN, method, method, PLAIN))

    def mean(a: Output, b: Output) -> Output:
        return replace(b, stats=replace(b.stats, decode_s=(a.stats.decode_s + b.stats.decode_s) / 2))

    return mean(first, last), mean(one, two)


def _syncs(engine: Engine, method: str, tokens: int, setting: Setting) -> float | None:
    """How often a round makes the host wait for the device; None without one."""
    if setting.dry:
        return None
    counts: list[int] = []
    rounds = 1
    # One token comes of the prompt alone: what it waits for is no round's.
    for length in (tokens, 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                rounds = max(rounds, _run(engine, method, length).stats.rounds)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return (counts[0] - counts[1]) / rounds


def _rate(step: Figure) -> str:
    return f"{1 / step.median:.0f} tokens/s" if step.median else ""


def _over(several: Figure, one: Figure) -> float | None:
    return several.median / one.median if several.median and one.median else None
