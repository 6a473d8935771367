"""Rounds on the device alone: the tokens and counts of rounds the host steers, and nothing asked of the host."""

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from time import sleep
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import select
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import graphs, round_graph
from skipjack.runtime.cache import KVCache
from skipjack.runtime.graphs import Graphs, Rounds
from skipjack.runtime.methods.stretches import Stretches
from skipjack.runtime.methods.swift import Swift
from skipjack.runtime.model import Model
from skipjack.runtime.ngrams import GAP
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.recipe import Ngrams, Recipe
from skipjack.runtime.request import Output
from skipjack.runtime.round import State, device_round
from skipjack.runtime.round_graph import AHEAD, RoundGraph

pytestmark = pytest.mark.usefixtures("whole_drafts")

PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]
FIXED = "swift:skip_attention=2+3,num_draft_tokens=4"
METHODS = [
    "autoregressive",
    f"{FIXED},threshold=0",
    f"{FIXED},threshold=0.1",
    f"{FIXED},threshold=0.1,acceptance=rejection",
    f"{FIXED},threshold=0.1,draft_vocab=128",
    f"{FIXED},threshold=0,acceptance=rejection,draft_vocab=128",
    "layerskip:exit_layer=5",
    "layerskip:exit_layer=5,acceptance=rejection",
    "layerskip:exit_layer=5,threshold=0.05",
    "layerskip:exit_layer=5,reuse=false",
    "kangaroo:adapter=untrained,exit_layer=5",
    "kangaroo:adapter=untrained,exit_layer=5,threshold=0.1",
    "kangaroo:adapter=untrained,exit_layer=5,threshold=0,acceptance=rejection,draft_vocab=128",
    "quantized",
    "quantized:threshold=0.1,acceptance=rejection,draft_vocab=128",
    "layerskip:exit_layer=3,verify=false",
    "unified:speedup=2",
    "skipdecode:length=6",
    "calm:threshold=0.9,least=1",
    "adaskip:n=5,online=4",
    "adaskip:n=3,online=9,phase=decode",
    "static:skip=2+5,kv=fill",
]


@pytest.fixture(scope="module")
def device(engine_of: Callable[..., Engine]) -> Engine:
    """The model of `synthetic("tiny", …, 0.1)` whose rounds run on the device alone."""
    return engine_of(True)


LOOKUPS = [
    "lookup",
    "lookup:num_draft_tokens=12,max_ngram=1",
    "lookup:acceptance=rejection",
    "lookup:choose=likeliest,max_ngram=4",
    "lookup:choose=likeliest,acceptance=rejection",
    "lookup:choose=likeliest,tree=true,num_draft_tokens=16",
    "lookup:choose=likeliest,tree=true,acceptance=rejection",
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", LOOKUPS)
def test_drafts_from_the_text_are_those_of_the_host(
    synthetic: Callable[..., Engine], told: Callable[[Output], Any], method: str, temperature: float
) -> None:
    """Of few letters, so that there is something to find, in a batch whose sequences end at different times."""
    host = synthetic("tiny", torch.float32, 0.1, vocab=24)
    prompts = [[3, 4, 5, 6] * 5, [7], [*range(3, 20), 3, 4], [5] * 60]
    params = SamplingParams(max_tokens=32, temperature=temperature, seed=4, ignore_eos=True)
    ends = (host.generate(prompts[0], params).token_ids[9],)
    weights = synthetic_weights(host.config, 0, torch.float32, 0.1)
    with Engine(host.config, weights, graphs=True) as engine:
        for stops in ((), ends):
            params = replace(params, stop_token_ids=stops)
            expected = host.generate(prompts, params, method=method)
            outputs = engine.generate(prompts, params, method=method)
            assert [told(output) for output in outputs] == [told(output) for output in expected]
            assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs)
            assert sum(output.stats.accepted for output in outputs) > 0
            if "rejection" not in method:
                plain = [output.token_ids for output in host.generate(prompts, params)]
                assert [output.token_ids for output in outputs] == plain


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", METHODS)
def test_rounds_of_the_device_are_those_of_the_host(
    synthetic: Callable[..., Engine],
    device: Engine,
    told: Callable[[Output], Any],
    method: str,
    temperature: float,
) -> None:
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=3, ignore_eos=True)
    host = synthetic("tiny", torch.float32, 0.1)
    expected = host.generate(PROMPTS, params, method=method)
    outputs = device.generate(PROMPTS, params, method=method)
    assert [told(output) for output in outputs] == [told(output) for output in expected]
    assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs)
    assert not any(output.stats.graph_rounds for output in expected)


def test_sequences_that_end_at_different_times_take_nothing_from_each_other(device: Engine) -> None:
    free = SamplingParams(max_tokens=24, ignore_eos=True)
    whole = [device.generate(prompt, free, method=FIXED).token_ids for prompt in PROMPTS]
    ends = [whole[0][5], whole[2][11]]
    params = SamplingParams(max_tokens=24, stop_token_ids=ends, ignore_eos=True)
    for output, tokens in zip(device.generate(PROMPTS, params, method=FIXED), whole, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        assert output.token_ids == tokens[: end + 1]
    assert device._loaded()[1].free_pages == device._loaded()[1].total_pages


def test_more_prompts_than_fit_a_round_wait_their_turn(synthetic: Callable[..., Engine], device: Engine) -> None:
    prompts = [[3 + i, 40 + i] for i in range(18)]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    expected = synthetic("tiny", torch.float32, 0.1).generate(prompts, params)
    assert [o.token_ids for o in device.generate(prompts, params, method=FIXED)] == [o.token_ids for o in expected]


def test_a_search_goes_on_while_the_device_drafts_by_its_mask(synthetic: Callable[..., Engine], device: Engine) -> None:
    method = "swift:window=8,search_budget=1,max_opt_iter=6,restart_drop=0,num_draft_tokens=3,threshold=0"
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    output = device.generate(PROMPTS[0], params, method=method)
    assert output.token_ids == synthetic("tiny", torch.float32, 0.1).generate(PROMPTS[0], params).token_ids
    assert [name for name, _ in output.stats.phases] == ["accumulation", "acceleration"]
    assert len([event for event in output.stats.events if "score" in event]) == 6
    assert output.stats.graph_rounds == output.stats.rounds


@pytest.mark.parametrize("tree", [False, True])
def test_what_is_remembered_of_other_answers_is_drafted_from_by_the_device_too(
    synthetic: Callable[..., Engine], device: Engine, told: Callable[[Output], Any], tree: bool
) -> None:
    """Of answers the device gave and of one that did not fit; a graph that is taken again knows the newest."""
    host, params = synthetic("tiny", torch.float32, 0.1), SamplingParams(max_tokens=20, ignore_eos=True)
    method = f"lookup:choose=likeliest,remember=50,max_ngram=4,tree={str(tree).lower()}"
    seen = []
    for prompt in (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[2], PROMPTS[0]):
        output, expected = (engine.generate(prompt, params, method=method) for engine in (device, host))
        assert told(output) == told(expected)
        assert output.stats.graph_rounds == output.stats.rounds
        seen.append(output.stats.rounds)
    first, again, _, other, repeated, forgotten = seen
    assert again < first / 2
    assert repeated < other / 2
    assert forgotten == first


@pytest.mark.parametrize(
    "method", ["lookup:choose=likeliest,remember=64,num_draft_tokens=3", "auto:remember=64,search_budget=0"]
)
def test_what_is_remembered_is_told_to_the_device_when_it_changes(
    device: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Once for a request, and again, between two of its rounds, when another one's answer has ended."""
    # A way of `auto` that looks in the text, for the whole of a request.
    monkeypatch.setattr(Stretches, "choose", lambda self, size: self.ways[1])
    told, honest = list[torch.Tensor](), Rounds._steer

    def steer(rounds: Rounds, graph: RoundGraph) -> None:
        before = rounds._remembered
        honest(rounds, graph)
        if rounds._remembered is not before and rounds._remembered is not None:
            told.append(rounds._remembered)

    monkeypatch.setattr(Rounds, "_steer", steer)
    params = SamplingParams(max_tokens=90, ignore_eos=True)
    stream = device.stream(PROMPTS[0], params, method=method)
    assert len(next(stream).token_ids) == 1, "of the prompt"
    next(stream)
    assert [known.tolist() for known in told] == [[GAP] * 64]
    # One that is drawn, and so shares no rounds with the other.
    drawn = replace(params, max_tokens=10, temperature=0.5, seed=1)
    answer = device.generate(PROMPTS[1], drawn, method=method).token_ids
    assert len(told) == 2, "for the other"
    said = [token for chunk in stream for token in chunk.token_ids]
    assert len(said) > 50
    assert [known.tolist() for known in told[2:]] == [[GAP, *answer, *[GAP] * 53]]


def test_drafts_from_a_part_of_the_vocabulary_choose_what_the_whole_would_among_it(
    synthetic: Callable[..., Engine],
) -> None:
    model, _ = synthetic("tiny", torch.float32, 0.1)._loaded()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    whole, part = model.logits(x), model.logits(x, 100)
    assert torch.equal(part[:, :100], whole[:, :100])
    assert part[:, 100:].isinf().all()
    assert torch.equal(model.predict(x, vocabulary=100).token, whole[:, :100].argmax(dim=1))
    assert torch.equal(model.predict(x, vocabulary=600).token, whole.argmax(dim=1))
    assert model.vocabulary(1).ids.tolist() == [0, *model.config.eos_token_ids], "what ends a text is always among it"


@pytest.mark.parametrize("method", [f"{FIXED},threshold=0.9", f"{FIXED},threshold=0.9,acceptance=rejection"])
def test_sampled_drafts_that_have_stopped_read_no_head(
    device: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As greedy ones do: their steps are launched all the same, and nothing depends on what such rows get."""
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    expected = device.generate(PROMPTS[0], params, method=method)
    model, rows = device._loaded()[0], Counter[bool]()
    ops = model.ops

    def logits(*given: Any, active: Tensor | None = None, **how: Any) -> Tensor:
        scores: Tensor = ops.logits(*given, active=active, **how)
        if active is None:
            return scores
        rows.update(active.tolist())
        return torch.where(active[:, None], scores, torch.nan)

    monkeypatch.setattr(model, "ops", replace(ops, logits=logits))
    output = device.generate(PROMPTS[0], params, method=method)
    assert output.token_ids == expected.token_ids
    assert rows[True] >= output.stats.drafted
    assert rows[False] > rows[True]


def test_a_stream_closed_early_leaves_its_graph_to_the_next(device: Engine) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = device.generate(PROMPTS[0], params, method=FIXED).token_ids
    pool, cache = device._open().graphs, device._loaded()[1]
    assert pool is not None
    captured = pool.captured
    for _ in range(3):
        stream = device.stream(PROMPTS[0], params, method=FIXED)
        next(stream)
        next(stream)
        stream.close()
        assert cache.free_pages == cache.total_pages
    assert device.generate(PROMPTS[0], params, method=FIXED).token_ids == expected
    assert pool.captured == captured


def test_rounds_under_way_are_waited_for_when_an_engine_is_dropped(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody closes it, and the device writes reports into memory that would be another's."""
    begun, waited = list[int](), list[int]()
    forget = RoundGraph.forget

    def forgotten(graph: RoundGraph) -> None:
        begun.append(graph.pending)
        forget(graph)

    monkeypatch.setattr(RoundGraph, "forget", forgotten)
    monkeypatch.setattr(RoundGraph, "settle", lambda graph: waited.append(graph._written))
    engine = engine_of(True)
    engine.generate(PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True))
    assert begun == [AHEAD]
    del engine
    gc.collect()
    assert waited == [8 - 1 + AHEAD]


def test_a_first_round_that_was_interrupted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while it is enqueued is handled before it is counted, and the device runs it all the same."""
    queue, waited = list[object](), list[object]()

    class Event:
        def record(self) -> None:
            queue.append(self)

        def synchronize(self) -> None:
            waited.append(self)

    def run(_: RoundGraph) -> None:
        queue.append("round")
        raise KeyboardInterrupt

    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    model = Model(config, synthetic_weights(config, 0, torch.float32, 0.1), select("torch"))
    graph = RoundGraph(model, model.new_cache(4), Recipe(model.full, model.full), 1, 1)
    graph._events = cast("Any", [(Event(), Event()) for _ in range(AHEAD + 1)])
    monkeypatch.setattr(RoundGraph, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        graph.enqueue()
    graph.forget()
    graph.stop()
    graph.settle()
    assert waited == queue[-1:], "what was recorded last"
    assert queue.index("round") < len(queue) - 1


def test_a_graph_that_was_given_back_writes_to_nobodys_pages(device: Engine) -> None:
    """Its sequence ended before its tokens were used up, and a warm-up runs every graph there is."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    said = device.generate(PROMPTS[0], params, method=FIXED).token_ids
    stopped = device.generate(PROMPTS[0], replace(params, stop_token_ids=(said[3],)), method=FIXED)
    assert (stopped.finish_reason, len(stopped.token_ids) < 60) == ("stop", True)
    assert device._open().graphs is not None
    assert all(
        not graph.state.progress.left.any() for graphs in device._open().graphs._idle.values() for graph in graphs
    )
    expected = device.generate(PROMPTS[2], params, method="lookup:choose=likeliest,tree=true").token_ids
    stream = device.stream(PROMPTS[2], params, method="lookup:choose=likeliest,tree=true")
    got = list(next(stream).token_ids)
    device.warm_up(FIXED, sequences=1, context=80)
    assert got + [token for chunk in stream for token in chunk.token_ids] == expected


def test_graphs_of_sets_out_of_use_are_let_go_of(
    synthetic: Callable[..., Engine], engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that settles anew for days would fill the memory."""
    monkeypatch.setattr(graphs, "SPARE", 3)
    host, params = synthetic("tiny", torch.float32, 0.1), SamplingParams(max_tokens=6, ignore_eos=True)
    expected = host.generate(PROMPTS[0], params).token_ids
    with engine_of(True) as engine:
        engine.warm_up(sequences=2, context=256)
        assert engine._open().graphs is not None
        waiting = engine._open().graphs._idle
        prepared, seen = set(waiting), list[weakref.ref[RoundGraph]]()
        assert prepared
        for layer in (2, 3, 4, 5, 2, 6):
            method = f"swift:skip_attention={layer},threshold=0,num_draft_tokens=2"
            assert engine.generate(PROMPTS[0], params, method=method).token_ids == expected
            idle = [graph for own in engine._open().graphs._idle.values() for graph in own]
            newest = max(idle, key=lambda graph: graph.waiting_since)
            seen.append(weakref.ref(newest))
        del newest, idle
        waiting = engine._open().graphs._idle
        assert prepared <= set(waiting)
        gc.collect()
        kept = [ref() for ref in seen]
        assert [graph is not None for graph in kept] == [False, False, False, True, True, True]
        assert sum(map(len, waiting.values())) == len(prepared) + 3


def test_many_graphs_for_one_recipe_drive_no_other_out(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a burst of requests alike, those that are not used again are let go of first."""
    monkeypatch.setattr(graphs, "SPARE", 6)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with engine_of(True) as engine:
        # Methods of their own, which share no rounds.
        streams = [engine.stream(PROMPTS[0], params, method=f"{FIXED},seed={seed}") for seed in range(6)]
        while any(chunks := [next(stream, None) for stream in streams]):
            assert len(chunks) == 6
        counts = list[int]()
        for _ in range(3):
            for layer in (2, 3, 4):
                engine.generate(PROMPTS[0], params, method=FIXED)
                engine.generate(PROMPTS[0], params, method=f"swift:skip_attention={layer},threshold=0")
            assert engine._open().graphs is not None
            counts.append(engine._open().graphs.captured)
        assert counts == [9, 9, 9]


def test_requests_at_the_same_time_have_the_tokens_they_have_alone(device: Engine) -> None:
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    expected = [device.generate(prompt, params, method=FIXED).token_ids for prompt in PROMPTS]
    streams = [device.stream(prompt, params, method=FIXED) for prompt in PROMPTS]
    got: list[list[int]] = [[] for _ in PROMPTS]
    while any(chunks := [next(stream, None) for stream in streams]):
        for index, chunk in enumerate(chunks):
            got[index] += chunk.token_ids if chunk else []
    assert got == expected


@pytest.mark.parametrize("method", [f"{FIXED},threshold=0", "lookup"])
def test_a_context_that_is_full_ends_the_request(synthetic: Callable[..., Engine], device: Engine, method: str) -> None:
    prompt = [(7 * i) % 500 + 3 for i in range(device.config.max_context - 6)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    output = device.generate(prompt, params, method=method)
    assert (len(output.token_ids), output.finish_reason) == (6, "length")
    assert output.token_ids == synthetic("tiny", torch.float32, 0.1).generate(prompt, params).token_ids


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sampled", [False, True])
@torch.inference_mode()
def test_a_round_asks_the_host_nothing(questions: Any, sampled: bool) -> None:
    pytest.importorskip("triton")
    fields = synthetic_config("tiny-llama") | {"num_hidden_layers": 2, "vocab_size": 64}
    config = ModelConfig.parse(fields, "tiny-llama")
    model = Model(config, synthetic_weights(config, 0, torch.float32, 0.1), select("triton"))
    cache = model.new_cache(4)
    full = LayerPlan.full(2)
    recipes = [
        Recipe(full, full, 2, masked=True, confident=True, sampled=sampled),
        Recipe(full, full.early_exit(1), 2, reuse=True, sampled=sampled),
        Recipe(full, full, 2, masked=True, limited=True, sampled=sampled),
        Recipe(full, full, 2, sampled=sampled, ngrams=Ngrams(3)),
        Recipe(full, full, 2, sampled=sampled, rejection=sampled, ngrams=Ngrams(3, 128)),
        Recipe(full, full, 2, sampled=sampled, rejection=sampled, ngrams=Ngrams(3, 128, 40, tree=True)),
        *([Recipe(full, full, 2, confident=True, sampled=True, rejection=True)] if sampled else []),
    ]
    for recipe in recipes:
        state = State.empty(model, recipe, 2, 1)
        state.allow(torch.tensor([9, 0]))
        state.block_table[0, 0] = 1
        state.limit.fill_(1)
        with questions:
            device_round(model, cache, state, recipe)
        assert questions.asked == []
        accepted, drafted = state.report[0, 0, :2].tolist()
        assert 0 <= accepted <= drafted <= 2
        # A text of one token has nothing to look up.
        assert recipe.confident or drafted == (0 if recipe.ngrams else 1 if recipe.limited else 2)
        assert (state.progress.left.tolist(), state.progress.length.tolist()) == ([8 - accepted, 0], [accepted + 1, 0])
        assert state.report[0, 1, 0] == -1, "a place no sequence has does not run"


def test_a_round_takes_what_the_device_says_where_the_host_had_not_to_wait_for_it(
    device: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its caller has the tokens of one round, the device goes on with the next."""
    usual, told = RoundGraph.report, 0.25

    def report(self: RoundGraph) -> Any:
        found = usual(self)
        self.took = told
        return found

    monkeypatch.setattr(RoundGraph, "report", report)
    for method in ("autoregressive", f"{FIXED},threshold=0"):
        stats = device.generate(PROMPTS[0], SamplingParams(max_tokens=9, ignore_eos=True), method=method).stats
        assert stats.decode_s == pytest.approx(told * stats.rounds, rel=0.02)


@pytest.mark.parametrize(("told", "rounds", "learnt"), [(60.0, 60.0, 0.0), (15.0, 15.0, 25.0), (0.0, 0.0, 40.0)])
def test_what_a_method_learns_while_the_device_goes_on_takes_no_time(
    device: Engine, monkeypatch: pytest.MonkeyPatch, told: float, rounds: float, learnt: float
) -> None:
    """Of forty seconds after every round those that the next round does not take; all of them after the last."""
    usual = RoundGraph.report

    def report(self: RoundGraph) -> Any:
        found = usual(self)
        self.took = told
        return found

    monkeypatch.setattr(RoundGraph, "report", report)
    monkeypatch.setattr(Swift, "count", lambda *given: 40.0)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    stats = device.generate(PROMPTS[0], params, method=f"{FIXED},threshold=0").stats
    assert stats.search_s == pytest.approx(learnt * (stats.rounds - 1) + 40, abs=2)
    assert stats.decode_s == pytest.approx((rounds + learnt) * (stats.rounds - 1) + rounds + 40, abs=2)


def test_the_device_is_ahead_of_the_host(device: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueued: list[Recipe] = []

    def note(model: Model, cache: KVCache, state: State, recipe: Recipe) -> None:
        enqueued.append(recipe)
        device_round(model, cache, state, recipe)

    monkeypatch.setattr(round_graph, "device_round", note)
    stream = device.stream(PROMPTS[0], SamplingParams(max_tokens=30, ignore_eos=True), method=FIXED)
    next(stream)
    assert not enqueued, "the first token does not wait for a round"
    next(stream)
    assert len(enqueued) == 1 + AHEAD
    next(stream)
    assert len(enqueued) == 2 + AHEAD
    stream.close()


def test_an_interrupt_gives_no_graph_back_twice(interrupted: Callable[..., Iterator[None]]) -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    with Engine(config, synthetic_weights(config, 0, torch.float32), graphs=True) as engine:
        expected = engine.generate([5, 6], SamplingParams(max_tokens=4, ignore_eos=True)).token_ids

        def work() -> None:
            stream = engine.stream([5, 6], SamplingParams(max_tokens=50, ignore_eos=True))
            try:
                next(stream)
                next(stream)
            finally:
                stream.close()

        for _ in interrupted(work, Rounds.close, Graphs.give, Graphs._keep):
            assert engine._open().graphs is not None
            idle = [id(graph) for graphs in engine._open().graphs._idle.values() for graph in graphs]
            assert len(idle) == len(set(idle))
        assert engine.generate([5, 6], SamplingParams(max_tokens=4, ignore_eos=True)).token_ids == expected


class Pools:
    """PyTorch's rules for the memory of captures, and graphs captured by them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handles, self.begun, self.spoilt = 0, set[int](), set[int]()
        self.failure: BaseException | None = None
        self.holders = weakref.WeakKeyDictionary[Any, int]()
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.handle)
        monkeypatch.setattr(Graphs, "_build", lambda *_: self.graph())

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def graph(self) -> Any:
        class Graph:
            captured = False

            def capture(graph, pool: int) -> None:
                assert pool not in self.spoilt, "already recording to mempool_id"
                assert pool not in self.begun or pool in self.holders.values(), "use_count > 0 INTERNAL ASSERT FAILED"
                self.begun.add(pool)
                if self.failure is not None:
                    self.spoilt.add(pool)
                    raise self.failure
                self.holders[graph], graph.captured = pool, True

        return Graph()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), torch.OutOfMemoryError(), RuntimeError("spoilt by others")])
@pytest.mark.parametrize("others", [0, 1])
def test_after_a_capture_that_failed_others_are_captured(
    failure: BaseException, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools, model, key = Pools(monkeypatch), cast("Any", SimpleNamespace(device=torch.device("cuda"))), cast("Any", None)
    held = Graphs(model, cast("Any", None))
    kept = [held._take(key) for _ in range(others)]
    pools.failure = failure
    with pytest.raises(type(failure)):
        held._take(key)
    pools.failure = None
    kept += [held._take(key) for _ in range(2)]
    assert len(kept) == held.captured == others + 2
    assert pools.handles == 1 + 1, "those that live share one, and the spoilt one is another's"


def test_where_no_graph_is_left_the_next_one_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, model, key = Pools(monkeypatch), cast("Any", SimpleNamespace(device=torch.device("cuda"))), cast("Any", None)
    held = Graphs(model, cast("Any", None))
    held._take(key)
    gc.collect()
    assert [held._take(key).captured, held._take(key).captured] == [True, True]
    assert pools.handles > 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The captures that are under way, on a stream of nobody's GPU."""
    under_way = list[object]()

    class Graph:
        def capture_begin(self, **_: object) -> None:
            under_way.append(self)

        def capture_end(self) -> None:
            under_way.remove(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(under_way))
    monkeypatch.setattr(round_graph, "_capture_stream", lambda _: None)
    monkeypatch.setattr(round_graph, "_OPEN", [])
    return under_way


def on_a_gpu() -> RoundGraph:
    graph = RoundGraph.__new__(RoundGraph)
    graph._model, graph._events = cast("Any", SimpleNamespace(device=torch.device("cuda"))), None
    graph.captured = False
    return graph


def test_engines_capture_one_after_the_other(captures: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    most = list[int]()

    def run(_: RoundGraph) -> None:
        sleep(0.2)
        most.append(len(captures))
        assert not gc.isenabled()

    monkeypatch.setattr(RoundGraph, "_run", run)
    graphs = [on_a_gpu() for _ in range(2)]
    threads = [threading.Thread(target=graph.capture, args=(None,)) for graph in graphs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1, 1]
    assert all(graph.captured for graph in graphs)
    assert not round_graph._OPEN


@pytest.mark.parametrize("begun", [True, False])
def test_a_capture_that_is_interrupted_as_it_begins_is_ended(
    begun: bool, captures: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = cast("Any", torch.cuda.CUDAGraph).capture_begin

    def interrupted(graph: object, **given: object) -> None:
        if begun:
            begin(graph, **given)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", interrupted)
    monkeypatch.setattr(RoundGraph, "_run", lambda _: None)
    graph = on_a_gpu()
    with pytest.raises(KeyboardInterrupt):
        graph.capture(None)
    assert captures == []
    assert len(round_graph._OPEN) == (not begun), "PyTorch's allocator may know one that could not begin"
    assert not graph.captured
    assert gc.isenabled()
