"""How many layers each token uses, by task (FlexiDepth, arXiv 2503.23798, §4): mean, variance, and the text itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.engine import Engine
from ..runtime.prompts import Prompt
from ..runtime.request import SamplingParams
from .methods import load

METHOD = "flexidepth"
PARAGRAPHS = (
    "The ferry to the outer islands was cancelled for a third day after gales of up to 90 km/h closed the harbour. "
    "About two hundred passengers spent the night in the town's sports hall, where volunteers served soup.",
    "A bakery in the old quarter has reopened after a fire last spring. The owner, who is 71, said that the oven, "
    "built by her grandfather, had survived without a crack, and that the first loaves were sold within an hour.",
    "Engineers have finished moving a lighthouse forty metres inland, because the cliff it stood on loses a metre a "
    "year to the sea. The tower weighs nine hundred tonnes and travelled on rails for eleven days.",
    "The city council voted to plant six thousand trees along its widest avenues by the end of next year. Shade is "
    "expected to lower summer temperatures on the pavement by up to four degrees, a study by the university found.",
    "A rare beetle not seen in the region since 1954 was found by a school class on a walk. The museum has asked the "
    "public to report further sightings, and not to catch the animals, which bite when they are frightened.",
)
# Layers used of 32 by the authors' Llama-3-8B-Instruct: mean and variance.
PUBLISHED = {
    "copy": (22.0, 6.05),
    "summarise": (28.7, 18.3),
    "continue": (30.3, 12.6),
    "repeat": (20.1, 8.08),
    "add": (22.5, 14.7),
    "multiply": (23.9, 21.6),
}
_LANGUAGE = {
    "copy": "Please copy this paragraph",
    "summarise": "Please summarize this paragraph into a single sentence",
    "continue": "Please continue writing this paragraph",
}
_MATHEMATICS = {
    "repeat": "Please repeat the following list for 5 times",
    "add": "Please calculate the sum of numbers in the following list",
    "multiply": "Please calculate the product of numbers in the following list",
}


@dataclass(frozen=True)
class Reading:
    """One prompt and its answer: their tokens as text, and the layers each of them used."""

    task: str
    prompt_words: tuple[str, ...]
    prompt_layers: tuple[float, ...]
    words: tuple[str, ...]
    layers: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """Layers used per generated token of one task, over all its answers; the variance is over tokens."""

    task: str
    prompts: int
    tokens: int
    mean: float
    variance: float
    published_mean: float
    published_variance: float


def load_routed(model: str, dtype: str) -> Engine:
    """The engine of a routed model folder, or of "synthetic:routed-SHAPE[:LATE_SCALE]".

    Raises:
        RequestError: the model is not routed.
    """
    return load(model, dtype, METHOD)


def prompts(task: str, count: int) -> list[str]:
    """The first `count` prompts of a task; lists of 5 to 10 integers from 10 to 99 are the same in every run."""
    if task in _LANGUAGE:
        return [f"{_LANGUAGE[task]}: {PARAGRAPHS[i % len(PARAGRAPHS)]}" for i in range(count)]
    drawn = random.Random(0)
    lists = [[drawn.randint(10, 99) for _ in range(drawn.randint(5, 10))] for _ in range(count)]
    return [f"{_MATHEMATICS[task]}: {numbers}" for numbers in lists]


def read(
    engine: Engine, per_task: int, max_tokens: int, method: str, progress: Callable[[Reading], None]
) -> list[Reading]:
    """The answers to every task's prompts. A model without a tokenizer gets random token ids of the prompt's length."""
    readings: list[Reading] = []
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=engine.tokenizer is None)
    for task in PUBLISHED:
        for number, text in enumerate(prompts(task, per_task)):
            output = engine.generate(_source(engine, text, number), params, method=method)
            asked, said = ([_word(engine, token) for token in ids] for ids in (output.prompt_ids, output.token_ids))
            used = output.stats
            readings.append(
                Reading(task, tuple(asked), used.layers_per_prompt_token, tuple(said), used.layers_per_token)
            )
            progress(readings[-1])
    return readings


def summary(readings: Sequence[Reading]) -> list[Line]:
    """A line for every task."""
    lines: list[Line] = []
    for task in dict.fromkeys(reading.task for reading in readings):
        own = [reading.layers for reading in readings if reading.task == task]
        used = np.concatenate([np.array(layers) for layers in own])
        lines.append(Line(task, len(own), len(used), float(used.mean()), float(used.var()), *PUBLISHED[task]))
    return lines


def _source(engine: Engine, text: str, number: int) -> Prompt:
    if engine.tokenizer is None:
        drawn = random.Random(number)
        return [drawn.randrange(3, engine.config.vocab_size) for _ in range(len(text) // 5)]
    return [{"role": "user", "content": text}] if engine.tokenizer.has_chat_template else text


def _word(engine: Engine, token: int) -> str:
    return engine.tokenizer.decode([token]) if engine.tokenizer else f"{token} "
