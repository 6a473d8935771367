"""DEL: the same text, rates measured at every exit, and the choice the formula makes."""

from collections.abc import Callable

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.dynamic_exit import DynamicExit, Options, best
from skipjack.runtime.rows import one_sequence

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 90))]


@pytest.mark.parametrize("reuse", ["true", "false"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_tokens_are_those_of_plain_decoding(
    synthetic: Callable[..., Engine], reuse: str, temperature: float
) -> None:
    engine = synthetic("tiny", torch.bfloat16, 0.1)
    params = SamplingParams(max_tokens=50, temperature=temperature, seed=5, ignore_eos=True)
    plain = engine.generate(PROMPTS, params)
    outputs = engine.generate(PROMPTS, params, method=f"del:reuse={reuse},search_budget=0.3")
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert sum(output.stats.accepted for output in outputs) > 0


def test_rates_are_how_often_an_early_exit_says_what_the_full_model_says(synthetic: Callable[..., Engine]) -> None:
    """One sequence, every round measured: as many tokens as weigh the same, against one pass through each exit."""
    engine, count = synthetic("tiny", torch.float32, 0.2), 20
    spec = "del:search_budget=1.0,num_draft_tokens=1"
    method = engine._method(registry.parse(spec))
    assert isinstance(method, DynamicExit)
    method._budget.round(1e9, recorded=False)  # Every later round is paid for.
    model, cache = engine._loaded()
    seen: list[torch.Tensor] = []
    learn = method._learn
    method._learn = lambda agrees, sure: (seen.append(agrees), learn(agrees, sure))[1]
    output = engine.generate(PROMPTS[0], SamplingParams(max_tokens=count, ignore_eos=True), method=spec)
    tokens = [*PROMPTS[0], *output.token_ids]
    with torch.inference_mode():
        pages = cache.reserve(len(tokens))
        for layer in range(1, 8):
            rows = one_sequence(tokens[:-1], 0, pages, model.ops.prefill_tile, model.device)
            said = model.predict(model.forward(rows, cache, model.full.early_exit(layer))).token
            right = said[len(PROMPTS[0]) :] == torch.tensor(output.token_ids[1:])
            assert [bool(agrees[layer - 1]) for agrees in seen[: len(right)]] == right[: len(seen)].tolist()
        cache.release(pages)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_the_threshold_lies_halfway_however_rare_one_kind_is(rate: float) -> None:
    """Two exits, one of which agrees as often as not, are sure by 0.9 where they agree and by 0.5 where they do not."""
    method = DynamicExit(Options(), 3)
    draws = torch.rand(60, 2, generator=torch.Generator().manual_seed(1)) < torch.tensor([rate, 0.5])
    for agrees in draws:
        method._learn(agrees, torch.where(agrees, 0.9, 0.5))
    for method._exit in (1, 2):
        assert method.threshold == pytest.approx(0.7)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rates = torch.rand(11, generator=torch.Generator().manual_seed(seed)).sort().values
    layer, k = best(rates, 12, 6)
    value = {
        (exit_layer, length): sum(float(rates[exit_layer - 1]) ** i for i in range(length + 1))
        / (12 - exit_layer + (length + 1) * exit_layer)
        for exit_layer in range(1, 12)
        for length in range(7)
    }
    assert value[layer, k] == pytest.approx(max(value.values()))


def test_hopeless_exits_draft_nothing() -> None:
    assert best(torch.zeros(7), 8, 7)[1] == 0
    assert best(torch.tensor([0.99] * 7), 8, 7) == (1, 7)
