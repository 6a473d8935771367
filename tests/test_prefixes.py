"""The prefix cache: what a prompt has in common with an earlier one is copied, and nothing else changes."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from skipjack import Engine, RequestError, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import cache as cache_module
from skipjack.runtime.cache import KVCache
from skipjack.runtime.prefixes import LEAST, MOST, Prefixes

BASE = [random.Random(0).randrange(400) for _ in range(700)]
DTYPES = torch.float32, torch.bfloat16
METHODS = [
    "autoregressive",
    "swift:skip_attention=2+3,num_draft_tokens=4,threshold=0.1",
    "layerskip:exit_layer=5",
    "clasp:skip=2",
    "lookup",
    "kangaroo:adapter=untrained,exit_layer=2",
    "unified:speedup=2",
    "static:skip=2",
    "static:skip=2+3,phase=prefill,kv=fill",
    "calm:threshold=0.9,least=2",
]


def engine_of(
    shape: str = "tiny", dtype: torch.dtype = torch.float32, fields: dict[str, Any] | None = None, **options: Any
) -> Engine:
    config = ModelConfig.parse(synthetic_config(shape) | (fields or {}), shape)
    return Engine(config, synthetic_weights(config, 0, dtype, 0.1), **options)


@pytest.fixture(scope="module", params=[False, True], ids=["host", "device"])
def pair(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    """An engine without the cache and one with it."""
    return engine_of(graphs=request.param), engine_of(graphs=request.param, prefix_caching=True)


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_without_it(pair: tuple[Engine, Engine], method: str) -> None:
    without, caching = pair
    # Other methods have left theirs.
    first, seen = METHODS.index(method) + 20, list[int]()
    for number, (common, own) in enumerate(((300, 5), (300, 1), (256, 40), (600, 30), (40, 3), (300, 5), (10, 9))):
        prompt = [first, *BASE[:common]] + [number + 3] * own
        temperature = 0.8 if number % 2 else 0.0
        params = SamplingParams(max_tokens=7, ignore_eos=True, temperature=temperature, seed=1, n=1 + number % 3 // 2)
        expected, output = (engine.generate(prompt, params, method=method) for engine in (without, caching))
        assert [choice.token_ids for choice in output.choices] == [choice.token_ids for choice in expected.choices]
        assert expected.stats.cached_tokens == 0
        seen.append(output.stats.cached_tokens)
    assert seen == [0, 301, 257, 301, 41, 301, 0]
    # The last token of a prompt is always read.
    assert caching.generate(prompt, params, method=method).stats.cached_tokens == len(prompt) - 1
    metrics = caching.metrics()
    assert metrics.pages_free == metrics.pages


# The interpreter is slow, and wrong in bfloat16.
READ = [("torch", shape, dtype) for shape in ("tiny", "tiny-qwen3", "tiny-bloom") for dtype in DTYPES]


@pytest.mark.parametrize(("backend", "shape", "dtype"), [*READ, ("triton", "tiny", torch.float32)], ids=str)
def test_keys_and_values_are_those_of_reading(backend: str, shape: str, dtype: torch.dtype) -> None:
    common = 101 if backend == "torch" else 65
    long, prompt = BASE[: common + 9], [*BASE[:common], 7, 8]
    fields = {"num_hidden_layers": 2} if backend == "triton" else None
    found: list[list[torch.Tensor]] = []
    for prompts in ([prompt], [long, prompt]):
        engine = engine_of(shape, dtype, fields, backend=backend, prefix_caching=True)
        cache = engine._loaded()[1]
        for one in prompts:
            with engine.stream(one, SamplingParams(max_tokens=2, ignore_eos=True)) as stream:
                next(stream)
                pages = list(stream._run.sequences[0].pages)
                slots = [part[:, pages].transpose(1, 2).flatten(2, 3)[:, :, : common + 2] for part in cache._parts]
        found.append(slots)
        engine.close()
    assert all(torch.equal(*parts) for parts in zip(*found, strict=True))
    assert found[0][0].abs().sum() > 0


def test_methods_that_read_alike_find_each_others() -> None:
    engine = engine_of(prefix_caching=True)
    prompt = BASE[:50]

    def cached(method: str) -> int:
        return engine.generate(prompt, SamplingParams(max_tokens=2), method=method).stats.cached_tokens

    assert cached("autoregressive") == 0
    assert [cached(name) for name in ("lookup", "unified:speedup=2", "swift:skip_mlp=2", "calm")] == [49] * 4
    # These leave other keys and values.
    for name in ("static:skip=2", "kangaroo:adapter=untrained,exit_layer=2", "kangaroo:adapter=untrained,exit_layer=3"):
        assert [cached(name), cached(name)] == [0, 49]


def test_prompts_that_routes_decide_are_read_anew(synthetic: Callable[..., Engine]) -> None:
    for shape, method in (("routed-tiny-llama", "flexidepth"), ("tiny-dmtd", "dmtd")):
        engine = engine_of(shape, method=method, prefix_caching=True)
        for _ in range(2):
            assert engine.generate(BASE[:40], SamplingParams(max_tokens=2)).stats.cached_tokens == 0


def test_a_stretched_prompt_is_read_anew() -> None:
    fields = synthetic_config("tiny-llama") | {
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    config = ModelConfig.parse(fields, "dynamic")
    engine = Engine(config, synthetic_weights(config, 0, torch.float32), prefix_caching=True)
    without = Engine(config, synthetic_weights(config, 0, torch.float32))
    for length, expected in ((50, 0), (60, 50), (90, 0), (95, 0), (40, 39)):
        outputs = [one.generate(BASE[:length], SamplingParams(max_tokens=5)) for one in (engine, without)]
        assert outputs[0].stats.cached_tokens == expected
        assert outputs[0].token_ids == outputs[1].token_ids


def test_it_is_off_unless_asked_for() -> None:
    engine = engine_of()
    outputs = [engine.generate(BASE[:50], SamplingParams(max_tokens=2)) for _ in range(2)]
    assert [output.stats.cached_tokens for output in outputs] == [0, 0]
    with pytest.raises(RequestError, match="prefix_caching: expected True or False, got 'false'"):
        engine_of(prefix_caching="false")


def test_a_pass_reads_what_was_written_or_copied(audit: Callable[[Engine], Any]) -> None:
    engine = engine_of(prefix_caching=True)
    watched = audit(engine)
    for prompt in (BASE[:300], [*BASE[:280], 3], [*BASE[:20], 4]):
        engine.generate(prompt, SamplingParams(max_tokens=4), method="swift:skip_attention=2")
    assert watched.reads > 1000


def test_choices_and_teacher_forcing_begin_with_it_too() -> None:
    without, engine = engine_of(), engine_of(prefix_caching=True)
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=3, n=5)
    # With room for few of them, some begin when the one that read the prompt has ended.
    small = engine_of(prefix_caching=True, max_sequences=2)
    expected = without.generate(BASE[:90], params)
    for _ in range(2):
        for one in (engine, small):
            output = one.generate(BASE[:90], params)
            assert [c.token_ids for c in output.choices] == [c.token_ids for c in expected.choices]
    prompts, given = [BASE[:90], BASE[:100]], [[4, 5, 6], [7]]
    for method in ("autoregressive", "unified:speedup=2"):
        assert engine.score(prompts, given, method=method) == without.score(prompts, given, method=method)


def test_requests_at_the_same_time_and_a_cache_that_is_small() -> None:
    engine, without = engine_of(prefix_caching=True, cache_tokens=2048), engine_of()
    rng, wrong, cached = random.Random(3), list[str](), list[int]()
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(10):
            prompt = BASE[: rng.choice((0, 30, 300, 500))] + [
                rng.randrange(400) for _ in range(rng.choice((1, 8, 120)))
            ]
            method = rng.choice(("autoregressive", "lookup", "static:skip=2"))
            with engine.stream(prompt, params, method=method) as stream:
                leaves = rng.random() < 0.2
                for _ in stream:
                    if leaves:
                        break
            output = stream.outputs[0]
            cached.append(output.stats.cached_tokens)
            expected = without.generate(prompt, params, method=method).token_ids
            if output.token_ids != expected[: len(output.token_ids)]:
                wrong.append(f"{method} {len(prompt)}")

    threads = [threading.Thread(target=ask, args=(rng.random(),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(cached) > 1000
    metrics = engine.metrics()
    assert (metrics.pages_free, metrics.pages_leaked) == (metrics.pages, 0)
    assert metrics.cached_tokens <= metrics.prompt_tokens


def test_what_a_warm_up_reads_is_nobodys_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, without = engine_of(prefix_caching=True), engine_of()
    # As with kernels to be compiled.
    monkeypatch.setattr(engine._watch, "enabled", True)
    engine.warm_up(["lookup"], sequences=2, context=512)
    for prompt in ([0] * 40, [0] * 400):
        outputs = [one.generate(prompt, SamplingParams(max_tokens=6)) for one in (engine, without)]
        assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].stats.cached_tokens == 40


def test_an_adapter_that_is_gone_is_not_kept(synthetic: Callable[..., Engine]) -> None:
    import weakref

    engine = engine_of(prefix_caching=True)
    name = "kangaroo:adapter=untrained,exit_layer=2"
    engine.generate(BASE[:40], SamplingParams(max_tokens=2), method=name)
    from skipjack.runtime.methods import registry

    method = weakref.ref(engine._method(registry.parse(name)))
    engine._methods().forget(registry.parse(name))
    gc.collect()
    assert method() is None
    assert engine.generate(BASE[:40], SamplingParams(max_tokens=2), method=name).stats.cached_tokens == 0


def small(pages: int = 12) -> KVCache:
    cache = KVCache(2, 1, 1, pages=pages, page_size=4, dtype=torch.float32, device=torch.device("cpu"))
    cache.prefixes = Prefixes(4)
    return cache


def write(cache: KVCache, pages: list[int], first: int, tokens: list[int], factor: float = 1.0) -> None:
    """A layer's key in a slot is the sum of all tokens up to it, as if it depended on all of them."""
    for place, token in enumerate(tokens, first):
        before = cache.keys[0, pages[(place - 1) // 4], 0, (place - 1) % 4, 0] if place else 0.0
        cache.keys[:, pages[place // 4], 0, place % 4, 0] = before * 3 % 1009 + factor * (token + 1)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_recalled_is_what_was_written(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "COPIED_PAGES", 2)
    cache, rng = small(30), random.Random(seed)
    base = [rng.randrange(9) for _ in range(40)]
    held: list[list[int]] = []
    recalled = 0
    for _ in range(400):
        if held and (rng.random() < 0.45 or len(held) > 3):
            cache.release(held.pop(rng.randrange(len(held))))
        prompt = base[: rng.randrange(1, 33)] + [rng.randrange(9) for _ in range(rng.randrange(1, 6))]
        more = rng.randrange(6)
        if cache.pages_for(len(prompt) + more) > cache.free_pages:
            continue
        kind, pages = rng.choice("ab"), cache.reserve(len(prompt) + more)
        assert not cache.keys[:, pages].any()
        known = cache.recall(kind, prompt, pages)
        recalled += known
        flat = cache.keys[0, pages].flatten().tolist()
        expected = small()
        own = expected.reserve(len(prompt) + more)
        write(expected, own, 0, prompt, 1.0 if kind == "a" else 2.0)
        assert flat[:known] == expected.keys[0, own].flatten().tolist()[:known]
        assert not any(flat[known:])
        assert known == 0 or LEAST <= known < len(prompt)
        write(cache, pages, known, prompt[known:], 1.0 if kind == "a" else 2.0)
        if rng.random() < 0.8:
            cache.remember(kind, prompt, pages)
        # What comes after a prompt, NaN even, is nobody's else.
        for place in range(len(prompt), len(prompt) + more):
            cache.keys[:, pages[place // 4], 0, place % 4] = torch.nan
        held.append(pages)
    assert recalled > 1000
    for pages in held:
        cache.release(pages)
    assert sorted([*cache._free, *cache._kept]) == list(range(1, 31))


def test_pages_that_hold_nothing_are_taken_first_then_the_longest_free() -> None:
    cache = small()
    prompts = [[number] * 8 + BASE[:10] for number in range(2)]
    for prompt in prompts:
        pages = cache.reserve(len(prompt))
        cache.remember("a", prompt, pages)
        cache.release(pages)
    assert (len(cache._kept), cache.free_pages) == (10, 12)

    def known() -> list[int]:
        return [cache.prefixes.longest("a", [*prompt, 1])[1] for prompt in prompts]

    assert known() == [18, 18]
    pages = cache.reserve(8)
    assert known() == [18, 18]
    # Its last page goes first: of the older one the beginning is left.
    pages += cache.reserve(4)
    assert known() == [16, 18]
    pages += cache.reserve(4)
    assert known() == [0, 18]


def test_it_knows_so_many_prompts_and_no_more() -> None:
    prefixes = Prefixes(4)
    for number in range(MOST + 5):
        prefixes.add("a", [number] * 20, [number * 5 + place for place in range(5)])
    assert prefixes.longest("a", [4] * 21) == ([], 0)
    assert prefixes.longest("a", [5] * 21)[1] == 20
    assert prefixes.longest("b", [5] * 21)[1] == 0


def test_an_interrupt_loses_no_page_and_leaves_none_that_is_wrong(interrupted: Callable[..., Iterator[None]]) -> None:
    cache = small()
    other = cache.reserve(20)
    prompt = BASE[:18]
    write(cache, other, 0, prompt)
    cache.remember("a", prompt, other)
    cache.release(other)

    def work() -> None:
        mine: list[int] = []
        try:
            cache.reserve(36, mine)
            known = cache.recall("a", prompt, mine)
            write(cache, mine, known, prompt[known:])
            cache.remember("a", prompt, mine)
        finally:
            try:
                cache.release(mine)
            finally:
                cache.release(mine)

    functions = (KVCache.reserve, KVCache.release, KVCache.remember, Prefixes.add, Prefixes.forget, Prefixes.longest)
    expected = small()
    own = expected.reserve(18)
    write(expected, own, 0, prompt)
    for _ in interrupted(work, *functions):
        source, known = cache.prefixes.longest("a", [*prompt, 1])
        kept = cache.keys[0, source].flatten().tolist()[:known]
        assert kept == expected.keys[0, own].flatten().tolist()[:known]
        everywhere = [*cache._free, *cache._kept]
        assert sorted(everywhere) == list(range(1, 13))
