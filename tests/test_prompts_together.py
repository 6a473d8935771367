"""Prompts of requests at the same time are read in one pass, and give what each gives alone."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from skipjack import AbortedError, Engine, RequestError, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import run as run_module
from skipjack.runtime.company import Company
from skipjack.runtime.methods.adaskip import AdaSkip
from skipjack.runtime.methods.base import Method
from skipjack.runtime.run import Run

PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 90)), [400, 3, 3, 17, 250, 8] * 11, [9, 9]]
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True)
METHODS = [
    "autoregressive",
    "swift:skip_attention=2+3,num_draft_tokens=4,threshold=0.1",
    "layerskip:exit_layer=5",
    "clasp:skip=2",
    "auto:search_budget=0",
    "kangaroo:adapter=untrained,exit_layer=2",
    "unified:speedup=2",
    "static:skip=2,kv=fill",
    "static:skip=2+3,phase=prefill,kv=fill",
    "skipdecode:length=9",
    "calm:threshold=0.9,least=2",
    "adaskip:n=5,online=3",
]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of every pass over prompts."""
    seen, forward = list[int](), Method.prompt_pass

    def noted(method: Method, model: Any, cache: Any, rows: Any) -> Any:
        seen.append(len(rows.block_table))
        return forward(method, model, cache, rows)

    monkeypatch.setattr(Method, "prompt_pass", noted)
    compensated = AdaSkip.prompt_pass

    def noted_too(method: AdaSkip, model: Any, cache: Any, rows: Any) -> Any:
        seen.append(len(rows.block_table))
        return compensated(method, model, cache, rows)

    monkeypatch.setattr(AdaSkip, "prompt_pass", noted_too)
    return seen


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "seed": 5, "logprobs": 2}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_a_list_is_read_in_one_pass(engine: Engine, passes: list[int], method: str, fields: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True, **fields)
    alone = [engine.generate(prompt, params, method=method) for prompt in PROMPTS]
    passes.clear()
    together = engine.generate(PROMPTS, params, method=method)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.stats.layers_per_token for one in together] == [one.stats.layers_per_token for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert [told.logprob for told in one.choices[0].logprobs or ()] == pytest.approx(
            [told.logprob for told in other.choices[0].logprobs or ()], abs=1e-5
        )
        assert one.stats.prefill_s > 0
    if "kangaroo" not in method:
        assert passes == [len(PROMPTS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-bloom", "tiny-smollm3"])
def test_keys_and_values_are_those_of_each_alone(
    engine_of: Callable[..., Engine], shape: str, dtype: torch.dtype
) -> None:
    """Bit for bit, at every position of every layer."""
    with engine_of(False, shape, dtype) as engine:
        one = SamplingParams(max_tokens=2, ignore_eos=True)
        cached: list[list[torch.Tensor]] = [[], []]
        for found, groups in zip(cached, ([[prompt] for prompt in PROMPTS], [PROMPTS]), strict=True):
            for group in groups:
                stream = engine.stream(group, one)
                while not all(sequence.generated for sequence in stream._run.sequences):
                    stream.advance()
                cache = engine._loaded()[1]
                for sequence in stream._run.sequences:
                    slots = [divmod(slot, cache.page_size) for slot in range(len(sequence.prompt))]
                    pages = torch.tensor([sequence.pages[page] for page, _ in slots])
                    offsets = torch.tensor([offset for _, offset in slots])
                    for kept in (cache.keys, cache.values):
                        found.append(torch.stack([layer[pages, :, offsets] for layer in kept]).clone())
                stream.close()
        assert all(map(torch.equal, *cached))


def test_threads_and_tasks_share_passes(engine: Engine, passes: list[int]) -> None:
    alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
    passes.clear()

    async def serve(prompt: list[int]) -> list[int]:
        return [token async for chunk in engine.astream(prompt, PARAMS) for token in chunk.token_ids]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(serve, PROMPTS))

    assert [tuple(tokens) for tokens in asyncio.run(all_of_them())] == [tuple(tokens) for tokens in alone]
    assert max(passes) > 1
    found: dict[int, Any] = {}
    passes.clear()
    # All threads stand in the line before the first has its turn.
    with engine._turn:
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: engine.generate(PROMPTS[i], PARAMS).token_ids}))
            for i in range(len(PROMPTS))
        ]
        for thread in threads:
            thread.start()
        while len(engine._turn._line) <= len(PROMPTS):
            pass
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))] == alone
    assert sum(passes) == len(PROMPTS)
    assert max(passes) > 1


def test_a_stream_that_nobody_reads_is_not_begun(engine: Engine, passes: list[int]) -> None:
    """Else it would keep pages from those who are read."""
    unread = engine.stream(PROMPTS[0], PARAMS)
    engine.generate(PROMPTS[1], PARAMS)
    assert passes == [1]
    assert not unread.outputs[0].token_ids
    unread.close()


def test_no_more_are_read_than_a_part_has_room_for(
    engine_of: Callable[..., Engine], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "prefill_chunk", lambda device, shared: 75)
    with engine_of(False) as engine:
        alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
        passes.clear()
        assert [output.token_ids for output in engine.generate(PROMPTS, PARAMS)] == alone
        assert passes == [3, 2], "4 + 1 + 70 rows, then 66 + 2"


def test_as_many_as_there_are_pages_for(engine_of: Callable[..., Engine]) -> None:
    with engine_of(False, cache_tokens=3 * 256) as engine:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        alone = [engine.generate(prompt, params).token_ids for prompt in PROMPTS]
        assert [output.token_ids for output in engine.generate(PROMPTS, params)] == alone
        assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


def test_long_texts_of_dynamic_rotations_are_read_alone(passes: list[int]) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    fields = synthetic_config("tiny") | {"rope_scaling": scaling, "max_position_embeddings": 32}
    config = ModelConfig.parse(fields, "tiny")
    with Engine(config, synthetic_weights(config, 0, torch.float32, 0.1), graphs=False) as engine:
        prompts = [[5, 9], [4], [(7 * i) % 300 + 3 for i in range(50)]]
        alone = [engine.generate(prompt, PARAMS).token_ids for prompt in prompts]
        passes.clear()
        assert [output.token_ids for output in engine.generate(prompts, PARAMS)] == alone
        assert passes == [2, 1]


def test_who_waits_has_what_is_wrong_with_his_own_prompt(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another has read it."""
    with engine_of(False) as engine:
        alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
        forward = Method.prompt_pass

        def overflowing(method: Method, model: Any, cache: Any, rows: Any) -> Any:
            hidden = forward(method, model, cache, rows)
            return torch.where((rows.token == 7)[:, None], torch.inf, hidden)

        monkeypatch.setattr(Method, "prompt_pass", overflowing)
        for leader in range(2):
            streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS]
            for stream in streams:
                stream.ask()
            streams[leader].advance()
            with pytest.raises(RequestError, match="prompt: the model's activations leave the range of float32"):
                next(streams[1])
            assert next(streams[1], None) is None, "as where he has read it himself"
            for i, stream in enumerate(streams):
                if i != 1:
                    list(stream)
                    assert stream.outputs[0].token_ids == alone[i]
            assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages
            assert engine.metrics().pages_leaked == 0


def test_whoever_is_interrupted_while_he_reads_for_others_costs_nobody_a_token_unseen(
    engine: Engine, interrupted: Callable[..., Iterator[None]], passes: list[int]
) -> None:
    expected = engine.generate(PROMPTS[1], PARAMS).token_ids
    others = [engine.stream(PROMPTS[1], PARAMS) for _ in range(2)]

    def work() -> None:
        for other in others:
            other.ask()
        engine.generate(PROMPTS[0], SamplingParams(max_tokens=2, ignore_eos=True))

    passes.clear()
    work()
    assert passes == [3]
    for _ in interrupted(
        work, Company.read, Company._gather, Run.admit, Run._begin, Run.retreat, Run.receive, Run._release_finished
    ):
        for other in others:
            got: list[int] = []
            try:
                got += [token for chunk in other for token in chunk.token_ids]
                assert tuple(got) == tuple(expected)
            except AbortedError:
                assert tuple(got) == tuple(expected[: len(got)])
        assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages
        assert not engine._open().runs
        metrics = engine.metrics()
        assert (metrics.pages_leaked, metrics.sequences_running, metrics.sequences_waiting) == (0, 0, 0)
        others = [engine.stream(PROMPTS[1], PARAMS) for _ in range(2)]
    for other in others:
        other.close()


def test_the_kernels_read_them_together() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    fields = synthetic_config("tiny") | {"num_hidden_layers": 1, "vocab_size": 64}
    config = ModelConfig.parse(fields, "tiny")
    weights = synthetic_weights(config, 3, torch.float32, 1.0)
    prompts, params = [[5, 9, 11], [i % 60 + 2 for i in range(66)], [7]], SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(config, weights, backend="triton", cache_tokens=512, graphs=False) as engine:
        alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
        assert [output.token_ids for output in engine.generate(prompts, params)] == alone
