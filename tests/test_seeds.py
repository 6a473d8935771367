"""The same seed gives the same tokens: by any lossless method, beside any others, streamed or not, after a restart.

Run as a program this file generates what the test compares, in a process of its own.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skipjack import Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights

METHODS = (
    "autoregressive",
    "swift:skip_attention=2+3,skip_mlp=3,num_draft_tokens=3,threshold=0.1",
    "swift:skip_attention=2+4,tree=true,num_draft_tokens=4",
    "swift:window=8,search_budget=1,max_opt_iter=3,num_draft_tokens=5",
    "layerskip:exit_layer=4",
    "kangaroo:adapter=untrained,exit_layer=4,threshold=0.1",
    "lookup:choose=likeliest,max_ngram=2",
    "clasp:interval=6,search_budget=1",
    "conflayers:interval=6,search_budget=1,window=8,tree=true",
    "knapspec:interval=6,search_budget=1",
    "del",
    "auto:max_loss=1,search_budget=0.5",
)
WARPINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.6},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 30, "min_p": 0.01},
    {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3},
)


class Run(NamedTuple):
    """A prompt by a method, in the middle of others, and how it is asked for."""

    prompt: list[int]
    params: SamplingParams
    method: str
    others: list[list[int]]
    streamed: bool


def runs(count: int) -> list[Run]:
    """The same ones every time; every method meets every way to draw."""
    draw = random.Random(0)

    def prompt() -> list[int]:
        return [draw.randint(3, 60) for _ in range(draw.randint(1, 24))]

    made: list[Run] = []
    for i in range(count):
        params = SamplingParams(
            max_tokens=12, seed=draw.choice((0, 1, 7, 2**40)), ignore_eos=True, **WARPINGS[i // len(METHODS) % 5]
        )
        others = [prompt() for _ in range(draw.choice((0, 0, 1, 4)))]
        made.append(Run(prompt(), params, METHODS[i % len(METHODS)], others, streamed=draw.random() < 0.5))
    return made


def tokens(engine: Engine, run: Run) -> list[int]:
    """Of the run's prompt, which has a place among the others that follows from them."""
    place = len(run.others) // 2
    prompts = [*run.others[:place], run.prompt, *run.others[place:]]
    if not run.streamed:
        return engine.generate(prompts, run.params, method=run.method)[place].token_ids
    with_index = [c for c in engine.stream(prompts, run.params, method=run.method) if c.index == place]
    return [token for chunk in with_index for token in chunk.token_ids]


def test_two_hundred_draws_are_those_of_plain_decoding_after_a_restart(synthetic: Callable[..., Engine]) -> None:
    count = 200
    path = str(Path(__file__).resolve())
    done = subprocess.run([sys.executable, path, str(count)], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    engine = synthetic("tiny", torch.float32, 0.3)
    expected = [engine.generate(run.prompt, run.params).token_ids for run in runs(count)]
    assert json.loads(done.stdout) == expected
    others = [(run.prompt, replace(run.params, seed=run.params.seed + 1)) for run in runs(40)]
    again = [engine.generate(prompt, params).token_ids for prompt, params in others]
    assert sum(a != b for a, b in zip(again, expected, strict=False)) > 36, "another seed draws other tokens"


def main() -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    made = runs(int(sys.argv[1]))
    with Engine(config, synthetic_weights(config, 0, torch.float32, 0.3)) as engine:
        # In another order than theirs, so that none follows from what came before it.
        found = {place: tokens(engine, made[place]) for place in reversed(range(len(made)))}
    print(json.dumps([found[place] for place in range(len(made))]))


if __name__ == "__main__":
    main()
