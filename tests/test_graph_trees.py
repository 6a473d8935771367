"""Draft trees on the device alone: the tokens and counts of rounds the host steers, and nothing asked of the host."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import select
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.recipe import Recipe
from skipjack.runtime.request import Output
from skipjack.runtime.round import State, device_round

pytestmark = pytest.mark.usefixtures("whole_drafts")

PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]
TREE = "swift:skip_attention=2+3,skip_mlp=4,tree=true"
# Drafts of every width; and ones that end at max_nodes, at a depth, by confidence, with one node.
METHODS = [
    f"{TREE},threshold=0",
    f"{TREE},threshold=0.3",
    f"{TREE},threshold=0.8,num_draft_tokens=3",
    f"{TREE},threshold=0.1,max_nodes=5,num_draft_tokens=12",
    f"{TREE},threshold=0,max_nodes=1",
    f"{TREE},threshold=0,max_nodes=64,num_draft_tokens=17",
    f"{TREE},threshold=0.1,draft_vocab=128",
    f"{TREE},threshold=0,draft_vocab=3",
    f"{TREE},threshold=0.1,draft_weights=int8",
    f"{TREE},threshold=0.1,acceptance=rejection",
    f"{TREE},threshold=0,acceptance=rejection,max_nodes=7",
    f"{TREE},threshold=0,acceptance=rejection,draft_vocab=128",
]


def engine(sure: float, *, graphs: bool, shape: str = "tiny", backend: str = "torch") -> Engine:
    """A random model whose logits are `sure` times what they usually are: high ones draft narrow trees."""
    config = ModelConfig.parse(synthetic_config(shape), shape)
    weights = synthetic_weights(config, 0, torch.float32, 0.1)
    return Engine(config, replace(weights, norm=weights.norm * sure), graphs=graphs, backend=backend)


@pytest.fixture(scope="module", params=[8.0, 40.0], ids=["wide", "narrow"])
def pair(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    return engine(request.param, graphs=False), engine(request.param, graphs=True)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", METHODS)
def test_trees_of_the_device_are_those_of_the_host(
    pair: tuple[Engine, Engine], told: Callable[[Output], Any], method: str, temperature: float
) -> None:
    host, device = pair
    params = SamplingParams(max_tokens=14, temperature=temperature, top_p=0.95, seed=3, ignore_eos=True)
    expected = host.generate(PROMPTS, params, method=method)
    outputs = device.generate(PROMPTS, params, method=method)
    assert [told(output) for output in outputs] == [told(output) for output in expected]
    assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs)
    if not temperature or "rejection" not in method:
        plain = host.generate(PROMPTS, params)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]


def test_drafts_have_every_width_and_several_depths() -> None:
    """What the comparison above rests on."""
    seen: set[int] = set()
    for sure in (8.0, 40.0):
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        for output in engine(sure, graphs=True).generate(PROMPTS, params, method=METHODS[1]):
            stats = output.stats
            seen.add(round(stats.drafted / stats.rounds))
            assert stats.accepted > 0
            assert len(stats.drafted_per_position) > 1
    assert len(seen) > 2


def test_sequences_that_end_at_different_times_take_nothing_from_each_other() -> None:
    device, free = engine(20.0, graphs=True), SamplingParams(max_tokens=13, ignore_eos=True)
    method = f"{TREE},threshold=0.2"
    whole = [device.generate(prompt, free, method=method).token_ids for prompt in PROMPTS]
    ends = [whole[0][5], whole[2][11]]
    params = replace(free, stop_token_ids=ends)
    for output, tokens in zip(device.generate(PROMPTS, params, method=method), whole, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        assert output.token_ids == tokens[: end + 1]


@pytest.mark.parametrize("shape", ["tiny-mistral", "tiny-bloom"])
def test_windows_and_distances_follow_the_path(told: Callable[[Output], Any], shape: str) -> None:
    host, device = (engine(8.0, graphs=graphs, shape=shape) for graphs in (False, True))
    params, method = SamplingParams(max_tokens=14, ignore_eos=True), "swift:skip_attention=1,threshold=0,tree=true"
    expected = host.generate(PROMPTS, params, method=method)
    outputs = device.generate(PROMPTS, params, method=method)
    assert [told(output) for output in outputs] == [told(output) for output in expected]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in host.generate(PROMPTS, params)]


@pytest.mark.parametrize("room", [1, 2, 6, 15])
def test_trees_stay_within_the_tokens_there_are_still_to_come(told: Callable[[Output], Any], room: int) -> None:
    """At the end of the context, where pages end too, and at `max_tokens`."""
    host, device = (engine(8.0, graphs=graphs) for graphs in (False, True))
    prompt = [(7 * i) % 500 + 3 for i in range(device.config.max_context - room)]
    method, end = f"{TREE},threshold=0", SamplingParams(max_tokens=99, ignore_eos=True)
    for given, params in ((prompt, end), (PROMPTS[0], replace(end, max_tokens=room))):
        output = device.generate(given, params, method=method)
        assert (len(output.token_ids), output.finish_reason) == (room, "length")
        assert told(output) == told(host.generate(given, params, method=method))
        assert output.token_ids == host.generate(given, params).token_ids


def test_accepted_paths_are_moved_across_pages(audit: Callable[[Engine], Any]) -> None:
    device, host = engine(8.0, graphs=True), engine(8.0, graphs=False)
    watched = audit(device)
    prompt = [(11 * i) % 500 + 3 for i in range(device._loaded()[1].page_size - 20)]
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    output = device.generate(prompt, params, method=f"{TREE},threshold=0")
    assert output.stats.accepted > output.stats.rounds / 4
    assert watched.reads > 0
    assert output.token_ids == host.generate(prompt, params).token_ids


def test_a_search_goes_on_while_trees_are_drafted_by_its_mask() -> None:
    device, host = engine(8.0, graphs=True), engine(8.0, graphs=False)
    method = "swift:window=8,search_budget=1,max_opt_iter=6,restart_drop=0,num_draft_tokens=3,threshold=0,tree=true"
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    output = device.generate(PROMPTS[0], params, method=method)
    assert output.token_ids == host.generate(PROMPTS[0], params).token_ids
    assert [name for name, _ in output.stats.phases] == ["accumulation", "acceleration"]
    assert len([event for event in output.stats.events if "score" in event]) == 6
    assert output.stats.graph_rounds == output.stats.rounds


@pytest.mark.parametrize("room", [1, 3, 8])
def test_trees_of_lookups_stay_within_the_tokens_there_are_still_to_come(
    told: Callable[[Output], Any], room: int
) -> None:
    host, device = (engine(8.0, graphs=graphs) for graphs in (False, True))
    prompt = [(7 * i) % 31 + 3 for i in range(device.config.max_context - room)]
    method, params = "lookup:choose=likeliest,tree=true", SamplingParams(max_tokens=99, ignore_eos=True)
    output = device.generate(prompt, params, method=method)
    assert (len(output.token_ids), output.stats.graph_rounds) == (room, output.stats.rounds)
    assert told(output) == told(host.generate(prompt, params, method=method))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sampled", [False, True])
@torch.inference_mode()
def test_a_round_of_a_tree_asks_the_host_nothing(questions: Any, sampled: bool) -> None:
    pytest.importorskip("triton")
    fields = synthetic_config("tiny-llama") | {"num_hidden_layers": 2, "vocab_size": 64}
    config = ModelConfig.parse(fields, "tiny-llama")
    model = Model(config, synthetic_weights(config, 0, torch.float32, 0.1), select("triton"))
    cache, full = model.new_cache(4), LayerPlan.full(2)
    recipes = [
        Recipe(full, full, 2, masked=True, confident=True, sampled=sampled, max_nodes=9),
        *([Recipe(full, full, 2, sampled=True, rejection=True, vocabulary=40, max_nodes=9)] if sampled else []),
    ]
    for recipe in recipes:
        state = State.empty(model, recipe, 2, 1)
        state.allow(torch.tensor([9, 0]))
        state.block_table[0, 0], state.mask[:2] = 1, True
        state.sampling.temperature.fill_(0.7)
        state.sampling.top_p.fill_(1.0)
        with questions:
            device_round(model, cache, state, recipe)
        assert questions.asked == []
        accepted, drafted, depth = state.report[0, 0, :3].tolist()
        assert 0 <= accepted <= depth <= 2
        assert depth < drafted <= 8
        assert (state.progress.left.tolist(), state.progress.length.tolist()) == ([8 - accepted, 0], [accepted + 1, 0])
        assert state.report[0, 1, :3].tolist() == [-1, 0, 0], "a place no sequence has does not run"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_kernels_grow_the_trees_of_the_torch_table(told: Callable[[Output], Any], temperature: float) -> None:
    pytest.importorskip("triton")
    fields = synthetic_config("tiny-llama") | {"num_hidden_layers": 3, "vocab_size": 64}
    config = ModelConfig.parse(fields, "tiny-llama")
    weights = synthetic_weights(config, 0, torch.float32, 0.3)
    params = SamplingParams(max_tokens=5, temperature=temperature, seed=1, ignore_eos=True)
    swift = "swift:skip_attention=1,num_draft_tokens=2,tree=true,threshold=0,max_nodes=12"
    prompts = [[5, 9, 11, 5, 9, 12, 4, 5, 9], [7]]
    for method in (swift, "lookup:choose=likeliest,tree=true,remember=40,num_draft_tokens=5"):
        seen: list[object] = []
        for backend, alone in (("torch", False), ("triton", True)):
            with Engine(config, weights, backend=backend, cache_tokens=512, graphs=alone) as table:
                chosen = f"{method},acceptance=rejection" if temperature else method
                seen.append([[told(o) for o in table.generate(prompts, params, method=chosen)] for _ in range(2)])
        assert seen[0] == seen[1]
