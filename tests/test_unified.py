"""Unified Layer Skipping: the authors' keep-sets and tokens, batches, and the work that is not done."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipjack import Engine, RequestError, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.synthetic import synthetic_weights
from skipjack.runtime.decode import decode, prefill
from skipjack.runtime.keep_sets import keep_set
from skipjack.runtime.methods import registry
from skipjack.runtime.model import Model
from skipjack.runtime.sequence import Sequence

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 90))]


@pytest.fixture(scope="module")
def cases(golden: Path) -> Callable[[str], tuple[Engine, list[dict]]]:
    def load(case: str) -> tuple[Engine, list[dict]]:
        runs = json.loads((golden / case / "expected.json").read_text())["runs"]
        return Engine.load(golden / case, dtype="float32", device="cpu"), runs

    return load


def test_keep_sets_are_the_authors(golden: Path) -> None:
    table = json.loads((golden / "unified-table" / "expected.json").read_text())["table"]
    undefined = 0
    for row in table:
        layers, speedup = row["num_layers"], row["speedup"]
        if row["defined"]:
            kept = list(keep_set(layers, speedup, rule="paper"))
            assert kept == list(keep_set(layers, speedup)) == row["keep"], row
            assert len(kept) == row["num_reserved"]
        else:
            undefined += 1
            with pytest.raises(RequestError, match=f"rule: paper expects .* got {speedup} for {layers} layers"):
                keep_set(layers, speedup, rule="paper")
            assert keep_set(layers, speedup) == (0, layers - 1)
    assert len(table) == 45
    assert undefined > 0


@pytest.mark.parametrize(("speedup", "count"), [(1.5, 20), (2.0, 15), (2.5, 12), (30, 2), (100, 2)])
def test_the_general_rule_spaces_evenly(speedup: float, count: int) -> None:
    kept = keep_set(30, speedup, rule="general")
    assert len(kept) == count
    assert (kept[0], kept[-1]) == (0, 29)
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1


def test_patterns_keep_as_many_layers() -> None:
    assert keep_set(12, 3, pattern="top") == (0, 1, 2, 3)
    assert keep_set(12, 3, pattern="bottom") == (8, 9, 10, 11)
    drawn = {keep_set(12, 3, pattern="random", seed=seed) for seed in range(20)}
    assert len(drawn) > 10
    assert all(len(set(kept)) == 4 and list(kept) == sorted(kept) for kept in drawn)
    assert keep_set(12, 3, pattern="random", seed=4) == keep_set(12, 3, pattern="random", seed=4)
    assert keep_set(1, 2) == keep_set(1, 1) == (0,)


@pytest.mark.parametrize(
    "options", ["speedup=0.5", "speedup=nan", "speedup=inf", "rule=fair", "pattern=middle", "rule=paper,speedup=1.5"]
)
def test_options_that_mean_nothing_are_refused(synthetic: Callable[..., Engine], options: str) -> None:
    name = options.partition("=")[0]
    with pytest.raises(RequestError, match=f"{name}: .*expect"):
        synthetic("tiny").generate([1], method=f"unified:{options}")


@pytest.mark.parametrize("case", ["unified-1", "unified-2", "unified-batch", "unified-bloom-1"])
def test_tokens_are_the_authors_alone_and_together(cases: Callable, case: str) -> None:
    engine, runs = cases(case)
    for speedup in {run["options"]["speedup"] for run in runs}:
        own = [run for run in runs if run["options"]["speedup"] == speedup]
        params = SamplingParams(max_tokens=own[0]["max_new_tokens"], ignore_eos=True)
        method, prompts = f"unified:speedup={speedup}", [run["prompt_ids"] for run in own]
        assert [output.token_ids for output in engine.generate(prompts * 2, params, method=method)] == [
            run["token_ids"] for run in own
        ] * 2
        output = engine.generate(prompts[0], params, method=method)
        kept, of = len(own[0]["keep_layers"]), engine.config.num_layers
        assert output.token_ids == own[0]["token_ids"]
        assert (output.stats.layers_kept, output.stats.lossless) == (kept, False)
        assert output.stats.layers_per_token == (of, *[kept] * (params.max_tokens - 1))
        assert output.stats.executed_skips == 2 * (of - kept) * (params.max_tokens - 1)
        # What the method itself chose is where forcing it along its own tokens leads.
        assert engine.score(prompts[:1], [output.token_ids], method=method)[0].chosen == tuple(output.token_ids)


@pytest.mark.parametrize("pattern", ["balanced", "top", "bottom", "random"])
def test_batches_are_their_members_alone(synthetic: Callable[..., Engine], pattern: str) -> None:
    engine = synthetic("tiny", torch.bfloat16)
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7, seed=1)
    method = f"unified:pattern={pattern}"
    together = engine.generate(PROMPTS, params, method=method)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert output.token_ids == engine.generate(prompt, params, method=method).token_ids


def test_what_is_skipped_is_neither_computed_nor_read(synthetic: Callable[..., Engine]) -> None:
    """A quarter of the products and of the attention; a skipped layer's cache may hold anything."""
    engine = synthetic("tiny")
    model, _ = engine._loaded()
    counts = Counter[str]()

    def counted(name: str) -> Callable[..., Tensor]:
        def op(*arguments: object, **options: object) -> Tensor:
            counts[name] += 1
            return getattr(TORCH, name)(*arguments, **options)

        return op

    watched = Model(model.config, synthetic_weights(model.config, 0, torch.float32, 0.3), TORCH)
    watched.ops = replace(TORCH, **{name: counted(name) for name in ("linear", "attend", "qkv_rope_append")})
    policy, cache = registry.parse("unified:speedup=4").build(model.config), watched.new_cache(2)
    sequence = Sequence(0, 0, PROMPTS[0], SamplingParams(max_tokens=9), 0, frozenset(), 1024, None)
    sequence.pages = cache.reserve(sequence.max_length)
    with torch.inference_mode():
        prefill(watched, cache, sequence, policy)
        assert counts == {"linear": 3 * 8, "attend": 8, "qkv_rope_append": 8}
        counts.clear()
        for layer in policy.target.skipped_attention:
            cache.keys[layer], cache.values[layer] = torch.nan, torch.nan
        while sequence.finish_reason is None:
            decode(watched, cache, [sequence], policy)
    assert counts == {"linear": 8 * 3 * 2, "attend": 8 * 2, "qkv_rope_append": 8 * 2}
    expected = engine.generate(PROMPTS[0], SamplingParams(max_tokens=9, ignore_eos=True), method="unified:speedup=4")
    assert sequence.tokens[4:] == expected.token_ids
