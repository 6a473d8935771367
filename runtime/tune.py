"""Searching for a skip set ahead of time, to be saved and loaded by `swift:set=FILE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from time import monotonic
from typing import Any

import torch

from .confidence import confidence
from .engine import Engine
from .errors import RequestError
from .prefill import text_rows
from .request import SamplingParams
from .search import Search, matchness
from .skip_sets import SkipSet, config_hash

Report = Callable[[int, float], None]


def tune_swift(
    engine: Engine,
    prompts: list[list[int]],
    *,
    window: int,
    skip_ratio: float,
    candidates: int,
    seconds: float,
    seed: int,
    stop: Callable[[], bool],
    report: Report,
) -> SkipSet:
    """The set of SWIFT's search (arXiv 2410.06916, §4.1) with the best mean matchness over all prompts.

    Every prompt (token ids) is continued by `window` tokens of the full model, and a candidate's sub-network is held
    against them. Ends after `candidates`, after `seconds`, or when `stop` says so, with the best set so far.

    Raises:
        CapacityError: the prompts do not fit into the cache together.
    """
    model, cache = engine._loaded()
    outputs = engine.generate(prompts, SamplingParams(max_tokens=window + 1, ignore_eos=True))
    # One of a single token, where a prompt all but fills the context, has nothing that a set could predict.
    outputs = [output for output in outputs if len(output.token_ids) > 1]
    if not outputs:
        raise RequestError("tune: expected a prompt that leaves room for two tokens more, got none")
    texts = [[*output.prompt_ids, *output.token_ids] for output in outputs]
    windows = [len(output.token_ids) - 1 for output in outputs]
    search = Search(engine.config.num_layers, skip_ratio, 1.0, candidates, candidates, seed)
    if not search.size:
        raise RequestError(f"skip_ratio: expected a share of {search.dimensions} sub-layers, got {skip_ratio}: none")
    held: list[list[int]] = []
    started = monotonic()
    try:
        with torch.inference_mode():
            for output, tokens in zip(outputs, texts, strict=True):
                held.append([])
                cache.reserve(len(tokens), held[-1])
                for rows in text_rows(model, tokens[:-1], len(output.prompt_ids), held[-1]):
                    model.forward(rows, cache, model.full)

            def score() -> float:
                plan = candidate.plan if candidate else search.incumbent.plan
                scored = zip(held, texts, windows, strict=True)
                return sum(matchness(model, cache, *one, plan) for one in scored) / len(texts)

            candidate = None
            search.remeasure(score())
            each = zip(held, texts, windows, strict=True)
            said = [sum(of) for of in zip(*(confidence(model, cache, *one) for one in each), strict=True)]
            while search.candidates < candidates and not stop() and monotonic() - started < seconds:
                candidate = search.suggest(said if search.begins else None)
                search.record(candidate, score(), 0)
                report(search.candidates, search.incumbent.score)
    finally:
        for pages in held:
            cache.release(pages)
        engine._turn.take(engine._turn.rest)
    plan = search.incumbent.plan
    return SkipSet(
        config_hash(engine.config),
        model.fingerprint,
        "swift",
        engine.config.num_layers,
        plan.skipped_attention,
        plan.skipped_mlp,
        search.incumbent.score,
        None,
        search.candidates,
    )


def tune_knapspec(
    engine: Engine,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    seconds: float,
    stop: Callable[[], bool],
    report: Report,
) -> SkipSet:
    """The set KnapSpec (arXiv 2602.20217) chooses last while it decodes the prompts with nothing to hold it back.

    Ends after `seconds`, or when `stop` says so, with the set it has; both are asked after every round.

    Raises:
        RequestError: the prompts were too short for it to choose any, or the time was.
    """
    spec, params = "knapspec:search_budget=1.0,interval=8", SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    found: list[Mapping[str, Any]] = []
    started, over = monotonic(), False
    for ids in prompts:
        with closing(engine.stream(ids, params, method=spec)) as stream:
            for _ in stream:
                if over := stop() or monotonic() - started >= seconds:
                    break
        found += [event for event in stream.outputs[0].stats.events if event["kind"] == "programme"]
        report(len(found), found[-1]["score"] if found else 0.0)
        if over:
            break
    if not found:
        more = "more time" if over else "more or longer ones"
        raise RequestError(f"tune: knapspec chose no set on these prompts: give it {more}")
    last = found[-1]
    return SkipSet(
        config_hash(engine.config),
        engine._loaded()[0].fingerprint,
        "knapspec",
        engine.config.num_layers,
        tuple(last["skip_attention"]),
        tuple(last["skip_mlp"]),
        float(last["score"]),
        last["num_draft_tokens"] or None,
        last["iteration"],
    )
