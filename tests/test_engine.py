"""Generation end to end: losslessness, batches, stop rules, resources."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skipjack import BusyError, CapacityError, Engine, RequestError, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime.cache import KVCache
from skipjack.runtime.methods.base import Method
from skipjack.runtime.methods.static import Static
from skipjack.runtime.request import Output
from skipjack.runtime.round_graph import RoundGraph

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 90)), [400, 3, 3, 17, 250, 8]]
EAGER = "threshold=0.0"


async def freed(cache: KVCache) -> None:
    """All pages are free, or will be with the turn under way."""
    for _ in range(3000):
        if cache.free_pages == cache.total_pages:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{cache.free_pages} of {cache.total_pages} pages free")


def skip_set(seed: int, layers: int, count: int) -> str:
    """A random set of `count` sub-layers of layers 1 to L - 2, as an option string."""
    chosen = np.random.default_rng(seed).choice(2 * (layers - 2), count, replace=False)
    attention = sorted(int(i) // 2 + 1 for i in chosen if i % 2 == 0)
    mlp = sorted(int(i) // 2 + 1 for i in chosen if i % 2)
    return f"skip_attention={'+'.join(map(str, attention))},skip_mlp={'+'.join(map(str, mlp))}"


def counts_add_up(output: Output) -> bool:
    """A token of the prefill, the accepted ones, and a bonus token of every round that did not end in its draft."""
    stats = output.stats
    return (
        1 + stats.accepted + stats.bonus == stats.completion_tokens
        and stats.rounds - 1 <= stats.bonus <= stats.rounds
        and sum(stats.accepted_per_position) == stats.accepted <= stats.drafted
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", range(1, 9))
def test_swift_is_plain_decoding(synthetic: Callable[..., Engine], k: int, dtype: torch.dtype) -> None:
    engine = synthetic("tiny", dtype)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = engine.generate(PROMPTS[k % 4], params)
    for threshold in (0.0, 0.4):
        method = f"swift:{skip_set(k, 8, 5)},num_draft_tokens={k},threshold={threshold}"
        swift = engine.generate(PROMPTS[k % 4], params, method=method)
        assert swift.token_ids == plain.token_ids
        assert counts_add_up(swift)
    assert len(set(plain.token_ids)) > 5


@pytest.mark.parametrize("k", [3, 8])
def test_swift_is_plain_decoding_across_pages(synthetic: Callable[..., Engine], k: int) -> None:
    engine = synthetic("tiny-mistral", torch.bfloat16)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    prompt = torch.randint(3, 500, (230,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = engine.generate(prompt, params)
    swift = engine.generate(prompt, params, method=f"swift:{skip_set(4, 8, 4)},num_draft_tokens={k},{EAGER}")
    assert swift.token_ids == plain.token_ids


def test_swift_is_plain_decoding_where_token_zero_is_frequent(synthetic: Callable[..., Engine]) -> None:
    """The released verifier pads with id 0 and then takes the padding for accepted tokens."""
    engine = synthetic("tiny", torch.float32, 0.3, vocab=4)
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    plain = engine.generate([1, 2, 3], params)
    assert plain.token_ids.count(0) > 10
    for seed in range(4):
        swift = engine.generate([1, 2, 3], params, method=f"swift:{skip_set(seed, 8, 5)},{EAGER}")
        assert swift.token_ids == plain.token_ids
        assert swift.stats.accepted > 0


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-smollm3", "tiny-bloom"])
def test_searching_swift_is_plain_decoding_on_every_family(synthetic: Callable[..., Engine], shape: str) -> None:
    engine = synthetic(shape)
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    plain = engine.generate(PROMPTS[0], params)
    swift = engine.generate(PROMPTS[0], params, method=f"swift:search_budget=0.9,seed=5,{EAGER}")
    assert swift.token_ids == plain.token_ids
    assert swift.stats.events
    assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": {7: 3.0, 9: -100.0}},
    {"temperature": 0.9, "min_tokens": 20},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fields", SAMPLING, ids=str)
def test_sampled_swift_gives_plain_samplings_tokens(
    synthetic: Callable[..., Engine], fields: dict[str, object], seed: int
) -> None:
    engine = synthetic("tiny")
    params = SamplingParams(max_tokens=30, seed=seed, **fields)
    plain = engine.generate(PROMPTS[seed], params)
    swift = engine.generate(PROMPTS[seed], params, method=f"swift:{skip_set(seed, 8, 4)},num_draft_tokens=5,{EAGER}")
    assert swift.token_ids == plain.token_ids
    assert swift.finish_reason == plain.finish_reason


@pytest.mark.parametrize("method", ["autoregressive", f"swift:skip_mlp=2+4+5,skip_attention=3,{EAGER}"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_gives_what_each_prompt_gives_alone(
    synthetic: Callable[..., Engine], dtype: torch.dtype, method: str
) -> None:
    engine = synthetic("tiny", dtype)
    prompts = [p[i:] for p in PROMPTS for i in range(3)] + [[9] * n for n in range(1, 9)]
    for fields in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 11}):
        params = SamplingParams(max_tokens=25, ignore_eos=True, **fields)
        together = engine.generate(prompts, params, method=method)
        assert [o.token_ids for o in together] == [engine.generate(p, params, method=method).token_ids for p in prompts]
    assert all(counts_add_up(o) for o in together)


@pytest.mark.parametrize(
    "method", ["swift:search_budget=0.5,window=8", "swift:tree=true", "lookup", "layerskip", "clasp"]
)
def test_no_round_copies_the_cache(method: str) -> None:
    """Nothing a round computes is as large as a tenth of the keys: SWIFT's released code clones all of them."""
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    engine = Engine(config, synthetic_weights(config, 0, torch.float32, 0.2), cache_tokens=60_000)
    cache, largest = engine._loaded()[1], 0
    own = {cache.keys.untyped_storage().data_ptr(), cache.values.untyped_storage().data_ptr()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in own:
                largest = max(largest, result.numel())
            return result

    with Watch():
        engine.generate([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True), method=method)
    assert 0 < largest < cache.keys.numel() / 10


def test_ends_exactly_at_stop_tokens_and_max_tokens(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny", torch.float32, 0.0)
    method = f"swift:skip_mlp=4+5+6,skip_attention=4+5+6,num_draft_tokens=8,{EAGER}"
    plain = engine.generate(PROMPTS[2], SamplingParams(max_tokens=40, ignore_eos=True)).token_ids
    for n in range(1, 20):
        output = engine.generate(PROMPTS[2], SamplingParams(max_tokens=n, ignore_eos=True), method=method)
        assert output.token_ids == plain[:n]
        assert output.finish_reason == "length"
        assert counts_add_up(output)
    assert output.stats.acceptance_rate > 0.9, "the case must accept long drafts to mean anything"
    for stop in dict.fromkeys(plain[3:20]):
        params = SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=[stop])
        output = engine.generate(PROMPTS[2], params, method=method)
        assert output.token_ids == plain[: plain.index(stop) + 1]
        assert output.finish_reason == "stop"


def test_end_of_text_is_suppressed_until_min_tokens(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    base = SamplingParams(max_tokens=30, ignore_eos=True)
    stop = engine.generate(PROMPTS[0], base).token_ids[2]
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=[stop], min_tokens=12)
    for method in ("autoregressive", f"swift:skip_mlp=3+4,{EAGER}"):
        ids = engine.generate(PROMPTS[0], params, method=method).token_ids
        assert stop not in ids[:12]
        assert len(ids) >= 12


def test_min_tokens_without_a_token_that_ends(synthetic: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=8, min_tokens=5, ignore_eos=True)
    assert len(synthetic("tiny").generate(PROMPTS[0], params).token_ids) == 8


def test_generation_ends_at_the_context_limit() -> None:
    config = ModelConfig.parse(synthetic_config("tiny") | {"max_position_embeddings": 48}, "test")
    with Engine(config, synthetic_weights(config, 0, torch.float32, 0.3)) as engine:
        for method in ("autoregressive", f"swift:skip_mlp=2+3,{EAGER}"):
            output = engine.generate([5] * 40, SamplingParams(max_tokens=100, ignore_eos=True), method=method)
            assert len(output.token_ids) == 8
            assert output.finish_reason == "length"
        with pytest.raises(RequestError, match="48 tokens leave no room in the model's context of 48"):
            engine.generate([5] * 48)


def test_one_choice_per_n_each_reproducible(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=3, ignore_eos=True)
    output = engine.generate(PROMPTS[0], params)
    ids = [choice.token_ids for choice in output.choices]
    assert len({tuple(i) for i in ids}) == 3
    for choice in range(3):
        alone = SamplingParams(max_tokens=12, temperature=1.0, seed=3 + choice, ignore_eos=True)
        assert engine.generate(PROMPTS[0], alone).token_ids == ids[choice]


@pytest.mark.parametrize(("method", "reads"), [("autoregressive", 1), ("swift:skip_mlp=2", 1), ("static:skip=3", 4)])
def test_choices_copy_what_the_first_of_them_has_read(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, method: str, reads: int
) -> None:
    """Where a policy reads a prompt, it remembers of each choice what it decided: there every one reads."""
    engine, prompt = synthetic("tiny"), [5 + place % 90 for place in range(300)]
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=3, ignore_eos=True, logprobs=1)
    alone = [engine.generate(prompt, replace(params, seed=3 + choice), method=method).choices[0] for choice in range(4)]
    model, lengths = engine._loaded()[0], list[int]()
    forward = model.forward

    def counted(rows: Any, *given: Any, **how: Any) -> Any:
        lengths.append(len(rows))
        return forward(rows, *given, **how)

    monkeypatch.setattr(model, "forward", counted)
    together = engine.generate(prompt, replace(params, n=4), method=method)
    assert list(together.choices) == alone
    assert sum(length for length in lengths if length > 40) == reads * len(prompt)


@pytest.mark.parametrize(
    ("method", "graphs"), [("autoregressive", False), ("static:skip=3", False), ("swift:skip_mlp=3", True)]
)
def test_a_request_took_the_time_of_the_rounds_it_was_in(
    monkeypatch: pytest.MonkeyPatch, method: str, graphs: bool
) -> None:
    """Rounds of a second each, two sequences at a time: times of choices that run one after another add up."""
    seconds = 0.0

    def timed(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal seconds
            seconds += 1
            return step(*args)

        return run

    for module in ("speculate", "decode", "graphs"):
        monkeypatch.setattr(f"skipjack.runtime.{module}.perf_counter", lambda: seconds)
    for place, name in ((Method, "propose"), (Static, "step"), (RoundGraph, "report")):
        monkeypatch.setattr(place, name, timed(getattr(place, name)))
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    with Engine(
        config, synthetic_weights(config, 0, torch.float32), method=method, graphs=graphs, max_sequences=2
    ) as engine:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        five, alone = (engine.generate(PROMPTS[0], replace(params, n=n)) for n in (5, 1))
        waves = 3 * alone.stats.decode_s
        assert alone.stats.decode_s == alone.stats.rounds
        assert five.stats.decode_s == waves
        assert alone.stats.tokens_per_s == 3 / alone.stats.decode_s
        assert five.stats.tokens_per_s == 5 * 3 / waves
        pair = engine.generate(PROMPTS[:2], params)
        assert [output.stats.decode_s for output in pair] == [output.stats.rounds for output in pair]


def test_logprobs_are_those_of_the_logits(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    params = SamplingParams(max_tokens=10, temperature=0.8, seed=1, logprobs=3, ignore_eos=True)
    outputs = [engine.generate(PROMPTS[0], params, method=m) for m in ("autoregressive", f"swift:skip_mlp=2+3,{EAGER}")]
    first, second = (o.choices[0].logprobs for o in outputs)
    assert first == second
    assert first is not None
    assert [p.token_id for p in first] == outputs[0].token_ids
    for entry in first:
        assert len(entry.top) == 3
        assert max(entry.top.values()) >= entry.logprob
        assert sum(np.exp(list(entry.top.values()))) <= 1 + 1e-6


def test_streaming_gives_the_same_tokens(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=2, ignore_eos=True)
    expected = engine.generate(PROMPTS[1], params).token_ids
    stream = engine.stream(PROMPTS[1], params, method=f"swift:skip_mlp=2+5,{EAGER}")
    chunks = list(stream)
    assert [t for c in chunks for t in c.token_ids] == expected == stream.outputs[0].token_ids
    assert sum(p.drafted for c in chunks for p in c.pieces) == stream.outputs[0].stats.accepted
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"

    async def collect() -> list[int]:
        return [t async for c in engine.astream(PROMPTS[1], params) for t in c.token_ids]

    assert asyncio.run(collect()) == expected


def test_an_event_loop_never_waits_for_the_engine(synthetic: Callable[..., Engine]) -> None:
    """Another thread holds the engine until the loop lets it go, which it cannot while it waits itself."""
    engine = synthetic("tiny")
    params, let_go = SamplingParams(max_tokens=9, ignore_eos=True), list[bool]()

    async def while_held(work: Callable[[], Coroutine[None, None, Any]]) -> Any:
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with engine._turn:
                held.set()
                let_go.append(release.wait(20))

        holder = threading.Thread(target=hold)
        holder.start()
        await asyncio.to_thread(held.wait, 20)
        task = asyncio.create_task(work())
        await asyncio.sleep(0.05)
        release.set()
        done = await task
        # What was closed while it was held ends with its turn, which nobody waits for.
        await asyncio.to_thread(holder.join, 20)
        return done

    async def serve() -> int:
        stream = engine.astream(PROMPTS[0], params)
        chunk = await while_held(stream.__anext__)
        await while_held(stream.aclose)
        return len(chunk.token_ids)

    assert asyncio.run(serve()) == 1
    assert let_go == [True, True]
    assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


def test_a_stream_cancelled_inside_a_round_ends_with_it(synthetic: Callable[..., Engine]) -> None:
    """Another thread holds the engine, so that the cancellation finds the worker thread inside `next`."""
    engine = synthetic("tiny")
    cache = engine._loaded()[1]
    go = threading.Event()

    async def consume(begun: asyncio.Event) -> None:
        async for _ in engine.astream(PROMPTS[0], SamplingParams(max_tokens=500, ignore_eos=True)):
            begun.set()

    async def cancel() -> None:
        held, begun = threading.Event(), asyncio.Event()

        def hold() -> None:
            with engine._turn:
                held.set()
                go.wait(10)

        task = asyncio.create_task(consume(begun))
        await begun.wait()
        threading.Thread(target=hold).start()
        await asyncio.to_thread(held.wait, 10)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not go.is_set(), "it waits for nobody's turn"
        go.set()
        await freed(cache)

    asyncio.run(cancel())


def test_an_unfinished_output_says_so(synthetic: Callable[..., Engine]) -> None:
    stream = synthetic("tiny").stream(PROMPTS[0], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    assert 1 <= len(stream.outputs[0].token_ids) < 50
    assert stream.outputs[0].finish_reason == "abort"


def test_an_abandoned_stream_gives_its_pages_back(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    cache = engine._loaded()[1]
    stream = engine.stream(PROMPTS, SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert cache.free_pages < cache.total_pages
    stream.close()
    assert cache.free_pages == cache.total_pages


def test_threads_and_nested_streams_share_an_engine(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    params = SamplingParams(max_tokens=15, ignore_eos=True)
    expected = [engine.generate(p, params).token_ids for p in PROMPTS]
    got: dict[int, list[int]] = {}

    def work(i: int) -> None:
        got[i] = engine.generate(PROMPTS[i], params, method=f"swift:search_budget=0.5,{EAGER}").token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(4)] == expected
    outer = engine.stream(PROMPTS[0], params)
    ids = [t for c in outer for t in c.token_ids if engine.generate(PROMPTS[1], params).token_ids == expected[1]]
    assert ids == expected[0]


def test_requests_that_cannot_be_served_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipjack.runtime.admission.ADMISSION_WAIT_S", 0.0)
    config = ModelConfig.parse(synthetic_config("tiny") | {"max_position_embeddings": 4096}, "test")
    engine = Engine(config, synthetic_weights(config, 0, torch.float32), cache_tokens=256)
    cache = engine._loaded()[1]
    with pytest.raises(CapacityError, match="cache_tokens"):
        engine.generate([1] * 900, SamplingParams(max_tokens=600))
    big = SamplingParams(max_tokens=cache.total_pages * 256 - 10, ignore_eos=True)
    held = engine.stream([1], big)
    next(held)
    with pytest.raises(BusyError, match="pages free"):
        engine.generate([1], big)
    with pytest.raises(RequestError, match="unknown method ''"):
        engine.generate([1], method="")
    held.close()
    for prompt, message in (([], "at least one token"), ([512], "outside the vocabulary"), ("hi", "no tokenizer")):
        with pytest.raises(RequestError, match=message):
            engine.generate(prompt)
    with pytest.raises(RequestError, match="stop"):
        engine.generate([1], SamplingParams(stop=["x"]))
    with pytest.raises(RequestError, match="logit_bias"):
        engine.generate([1], SamplingParams(logit_bias={512: 1.0}))
    for prompt in (5, None, {1, 2}, [[1, 2], 3]):
        with pytest.raises(RequestError, match="prompt: expected text, token ids or chat messages"):
            engine.generate(prompt)
    assert cache.free_pages == cache.total_pages
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.generate([1])


def test_more_logprobs_than_tokens_are_refused(synthetic: Callable[..., Engine]) -> None:
    with pytest.raises(RequestError, match="logprobs: 5 are more than the vocabulary of 4"):
        synthetic("tiny", torch.float32, 0.3, vocab=4).generate([1], SamplingParams(logprobs=5))


@pytest.mark.parametrize("tokens", [0, -99999])
def test_a_cache_of_no_tokens_is_refused(tokens: int) -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "test")
    with pytest.raises(RequestError, match="cache_tokens: expected an integer of at least 1"):
        Engine(config, synthetic_weights(config, 0, torch.float32), cache_tokens=tokens)


def test_more_prompts_than_pages_wait_their_turn() -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "test")
    with Engine(config, synthetic_weights(config, 0, torch.float32, 0.3), cache_tokens=256) as engine:
        prompts = [[i + 3, 8] for i in range(40)]
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        outputs = engine.generate(prompts, params)
        assert [o.token_ids for o in outputs] == [engine.generate(p, params).token_ids for p in prompts]


def test_a_cancelled_request_gives_its_pages_back(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    cache = engine._loaded()[1]

    async def cancel_after(seconds: float) -> None:
        async def consume() -> None:
            async for _ in engine.astream(PROMPTS, SamplingParams(max_tokens=900, ignore_eos=True)):
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await freed(cache)

    for i in range(10):
        asyncio.run(cancel_after(0.005 * i))


def test_a_call_waits_for_the_pages_of_another() -> None:
    config = ModelConfig.parse(synthetic_config("tiny") | {"max_position_embeddings": 4096}, "test")
    with Engine(config, synthetic_weights(config, 0, torch.float32), cache_tokens=256) as engine:
        cache = engine._loaded()[1]
        big = SamplingParams(max_tokens=cache.total_pages * 256 - 10, ignore_eos=True)
        held = engine.stream([1], big)
        next(held)
        got: list[Output] = []
        small = SamplingParams(max_tokens=3, ignore_eos=True)
        thread = threading.Thread(target=lambda: got.append(engine.generate([1], small)))
        thread.start()
        next(held)
        assert not got
        held.close()
        thread.join(60)
        assert len(got[0].token_ids) == 3


@pytest.mark.parametrize("temperature", [1e-38, 1e-6])
def test_a_vanishing_temperature_is_greedy(synthetic: Callable[..., Engine], temperature: float) -> None:
    engine = synthetic("tiny")
    greedy = engine.generate(PROMPTS[0], SamplingParams(max_tokens=10, ignore_eos=True)).token_ids
    params = SamplingParams(max_tokens=10, temperature=temperature, seed=1, ignore_eos=True)
    assert engine.generate(PROMPTS[0], params).token_ids == greedy


def test_a_checkpoint_in_float64_must_be_given_a_type(tmp_path: Path) -> None:
    fields = synthetic_config("tiny") | {"torch_dtype": "float64"}
    config = ModelConfig.parse(fields, "tiny")
    weights = synthetic_weights(config, 0, torch.float64)
    save_checkpoint(tmp_path / "m", fields, checkpoint_tensors(weights, config))
    with pytest.raises(RequestError, match=r"dtype: expected one of float32, .*, got auto .* in float64"):
        Engine.load(tmp_path / "m")
    with Engine.load(tmp_path / "m", dtype="float32") as engine:
        assert engine.dtype == torch.float32


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_that_overflow_are_an_error_and_not_a_text(dtype: torch.dtype, graphs: bool) -> None:
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "test")
    weights = synthetic_weights(config, 0, dtype)
    weights.down[3].fill_(torch.finfo(dtype).max / 2)
    engine = Engine(config, weights, graphs=graphs)
    cache = engine._loaded()[1]
    with pytest.raises(RequestError, match=f"activations leave the range of {str(dtype)[6:]}"):
        engine.generate([[5, 6], [7]], SamplingParams(max_tokens=4, temperature=0.7, logprobs=2))
    assert cache.free_pages == cache.total_pages
