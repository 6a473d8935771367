"""What the speed targets are measured with: steps, kernels, drafts and rounds, on random weights of named shapes.

Every part yields figures as it goes and its measurements as they are known; a measurement that has no value says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
import torch

from ..runtime.costs import head_layers
from ..runtime.engine import Engine
from ..runtime.plan import LayerPlan
from ..runtime.request import Output, SamplingParams
from . import sampled
from .gpu_parts import engine_of
from .gpu_setting import Setting
from .methods import PLAIN
from .rotation import NAMES, cells
from .step import Figure, bubble_per_layer, figures
from .targets import SHAPES, Measurement

Found = Iterator[Figure | Measurement]
EXACT_TOKENS = 10_000
ROUND_SHAPE, UNIFIED = "1b", "unified:speedup=2"


def steps(setting: Setting) -> Found:
    """T1 to T7: whole steps of 1, 8 and 16 rows, and the kernels of a layer; and what it costs to choose tokens."""
    shapes = setting.named(SHAPES)
    labels, bandwidths = {shape: label for label, shape in shapes.items()}, list[Figure]()
    for shape, group in groupby(figures(setting.device, shapes.values(), setting.dry), key=lambda figure: figure.shape):
        found: list[Figure] = []
        for figure in group:
            found.append(figure)
            yield figure
        if shape in labels:
            yield from of_steps(labels[shape], setting.config(shape).num_layers, [*bandwidths, *found])
        else:
            bandwidths = found
    yield from sampled.figures(setting.device, setting.dry)


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


def syncs(setting: Setting) -> Found:
    """T10's host syncs: how often a round of SWIFT makes the host wait for the device."""
    engine = engine_of(setting.named((ROUND_SHAPE,))[ROUND_SHAPE], setting.dtypes[0], setting)
    every = "+".join(map(str, range(1, engine.config.num_layers - 1, 2)))
    method = f"swift:skip_attention={every},skip_mlp={every},num_draft_tokens={2 if setting.dry else 4},threshold=0"
    value = None
    if setting.dry:
        _run(engine, method, 3)
    else:
        _run(engine, method, 96)
        # What a request waits for once, at its prompt and where its rounds begin and end, is no round's.
        (several, rounds), (few, least) = _waits(engine, method, 96), _waits(engine, method, 32)
        value = (several - few) / (rounds - least)
    yield Measurement("T10", "host syncs", value)


def unified(setting: Setting) -> Found:
    """T17: half of the layers, evenly spaced, against all of them, plain, unified, unified, plain."""
    engine = engine_of(setting.named(("8b",))["8b"], setting.dtypes[0], setting)
    full, h = LayerPlan.full(engine.config.num_layers), head_layers(engine.config)
    predicted = (full.num_layers + h) / (full.balanced(2).layers_kept + h)
    tokens, pairs = (2, 1) if setting.dry else (96, 5)
    for batch in (1, 8):
        ratios: list[float] = []
        for _ in range(pairs):
            first, one, two, last = (_run(engine, name, tokens, batch) for name in (PLAIN, UNIFIED, UNIFIED, PLAIN))
            own = one.stats.decode_s + two.stats.decode_s
            ratios.append((first.stats.decode_s + last.stats.decode_s) / own / predicted)
        yield Measurement("T17", f"8b batch {batch}", float(np.median(ratios)))


def exact(setting: Setting) -> Found:
    """T14: the lossless methods in turn, in batches, against plain decoding of each prompt alone.

    A shape goes on with the method after the last one of the shape before it: together they have had all of them.
    """
    length, batch = (3, 1) if setting.dry else (128, 8)
    wanted = 6 if setting.dry else max(EXACT_TOKENS, len(NAMES) * length * batch)
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    equal = total = number = 0
    for label, shape in setting.named(("135m", "1b")).items():
        engine = engine_of(shape, setting.dtypes[0], setting)
        same = seen = 0
        while seen < wanted / 2:
            prompts = [[3 + (7 * i + 11 * j + 13 * number) % 400 for j in range(4 + 5 * i)] for i in range(batch)]
            plain = [engine.generate(prompt, params).token_ids for prompt in prompts]
            turn, place = divmod(number, len(NAMES))
            own = cells(NAMES[place])
            method = own[turn % len(own)].method(engine.config.num_layers, number)
            for output, alone in zip(engine.generate(prompts, params, method=method), plain, strict=True):
                same += sum(a == b for a, b in zip(output.token_ids, alone, strict=True))
                seen += len(alone)
            number += 1
        equal, total = equal + same, total + seen
        yield Figure(f"exact {label}", shape, 0, None, None, None, 0, 0, None, f"{same} of {seen} tokens equal")
    note = f"{equal} of {total} tokens"
    yield Measurement("T14", "exact", equal / total if total >= EXACT_TOKENS else None, note)


def _run(engine: Engine, method: str, tokens: int, batch: int = 1) -> Output:
    """The output of the first of `batch` prompts decoded together, after the warm-up of earlier runs."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return engine.generate([[5, 9, 11, 130, 7, 6, 200, 31 + i] for i in range(batch)], params, method=method)[0]


def _waits(engine: Engine, method: str, tokens: int) -> tuple[int, int]:
    """The synchronising operations of a run, and its rounds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            rounds = _run(engine, method, tokens).stats.rounds
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught), rounds


def _rate(step: Figure) -> str:
    return f"{1 / step.median:.0f} tokens/s" if step.median else ""


def _over(several: Figure, one: Figure) -> float | None:
    return several.median / one.median if several.median and one.median else None
