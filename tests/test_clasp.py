"""CLaSp: the layer sets of the golden cases, the programme by a literal oracle, and no token changed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config
from skipjack.runtime import speculate as rounds
from skipjack.runtime.cache import KVCache
from skipjack.runtime.decode import prefill
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.clasp import Clasp, Options, layers
from skipjack.runtime.model import Model, Streams
from skipjack.runtime.programme import Programme, Token, Unit
from skipjack.runtime.rows import one_sequence
from skipjack.runtime.sequence import Sequence

CONFIG = ModelConfig.parse(synthetic_config("tiny"), "tiny")
PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]


def recorded(model: Model, cache: KVCache, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
    """Pages that hold `tokens`, and their residual streams [2L + 1, R, H]."""
    pages, streams = cache.reserve(len(tokens)), Streams()
    rows = one_sequence(tokens, 0, pages, TORCH.prefill_tile, model.device)
    model.forward(rows, cache, model.full, streams=streams)
    return pages, torch.stack(streams)


def solve(programme: Programme, model: Model, cache: KVCache) -> Programme:
    while not programme.finished:
        programme.advance(model, cache)
    return programme


@pytest.mark.parametrize("case", ["clasp-1", "clasp-2"])
@torch.inference_mode()
def test_layer_sets_of_the_golden_cases(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())["layer_selection"]
    engine = Engine.load(golden / case, dtype="float32")
    model, cache = engine._loaded()
    pages, streams = recorded(model, cache, expected["token_ids"])
    before = cache.keys[:, pages].clone()
    for place in expected["positions"]:
        token = Token(pages, place["position"], streams[:, place["position"]])
        for entry in place["sets"]:
            units = layers(model.config.num_layers, entry["keep_first_and_last"])
            found = solve(Programme(units, entry["max_skip"], [token]), model, cache).states[-1]
            assert [sublayer // 2 for sublayer in found.skipped[::2]] == entry["skip"]
            assert found.score == pytest.approx(entry["final_cosine"], abs=1e-4)
    assert torch.equal(cache.keys[:, pages], before), "the sequence's own cache stays as it is"
    assert cache.free_pages == cache.total_pages - len(pages)


@pytest.mark.parametrize("case", ["clasp-1", "clasp-2"])
def test_tokens_of_the_golden_cases(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())
    engine = Engine.load(golden / case, dtype="float32")
    for run in expected["runs"]:
        if run["method"] == "clasp":
            method = "clasp:" + ",".join(f"{key}={value}" for key, value in run["options"].items())
            params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
            output = engine.generate(run["prompt_ids"], params, method=method)
            assert output.token_ids == run["token_ids"]
            assert output.stats.drafted > 0


def literal(
    model: Model, cache: KVCache, tokens: list[Token], ids: dict[int, list[int]], units: list[Unit], budget: int
) -> dict[int, tuple[int, ...]]:
    """The recurrence of the docstring, one state and one row at a time, each token on a copy of its sequence."""
    copies = [recorded(model, cache, ids[id(token.pages)][: token.position + 1])[0] for token in tokens]

    def run(unit: Unit, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        for token, pages, x in zip(tokens, copies, hidden, strict=True):
            laid = model.lay(one_sequence([0], token.position, pages, TORCH.decode_tile, model.device), cache)
            y = torch.nn.functional.pad(x[None], (0, 0, 0, len(laid.rows) - 1))
            for sublayer in unit.sublayers:
                model.step(laid, cache, sublayer, y)
            out.append(y[0])
        return out

    def closeness(hidden: list[torch.Tensor], boundary: int) -> float:
        pairs = [(h.double(), token.streams[boundary].double()) for h, token in zip(hidden, tokens, strict=True)]
        return sum(float(h @ x / (h.norm() * x.norm())) for h, x in pairs)

    g = {0: ([token.streams[0] for token in tokens], ())}
    for unit in units:
        end, new = unit.sublayers[-1] + 1, {}
        for j in range(1, budget + 1):
            choices = [(run(unit, g[j][0]), g[j][1])] if j in g else []
            if not unit.fixed and j - unit.weight in g:
                hidden, skipped = g[j - unit.weight]
                choices.insert(0, (hidden, skipped + unit.sublayers))
            if choices:
                new[j] = max(choices, key=lambda choice: closeness(choice[0], end))
        g = {0: ([token.streams[end] for token in tokens], ())} | new
    for pages in copies:
        cache.release(pages)
    return {j: skipped for j, (_, skipped) in g.items()}


@pytest.mark.parametrize("shape", ["tiny", "tiny-mistral", "tiny-bloom"])
@torch.inference_mode()
def test_the_programme_is_the_literal_recurrence(
    synthetic: Callable[..., Engine], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = synthetic(shape)._loaded()
    texts = [list(range(30, 70)), list(range(200, 207))]
    (first, x), (second, y) = [recorded(model, cache, text) for text in texts]
    tokens = [Token(first, 39, x[:, 39]), Token(second, 6, y[:, 6]), Token(first, 20, x[:, 20])]
    ids = {id(first): texts[0], id(second): texts[1]}
    units = [Unit((i,), 1 + i % 2, i in (0, 1, 14, 15)) for i in range(16)]
    monkeypatch.setattr("skipjack.runtime.programme.MAX_ROWS", 7)
    found = solve(Programme(units, 5, tokens), model, cache).states
    assert {state.weight: state.skipped for state in found} == literal(model, cache, tokens, ids, units, 5)
    whole = layers(8, False)
    found = solve(Programme(whole, 3, tokens), model, cache).states
    assert {state.weight: state.skipped for state in found} == literal(model, cache, tokens, ids, whole, 3)
    for pages in (first, second):
        cache.release(pages)
    assert cache.free_pages == cache.total_pages


@pytest.mark.parametrize(
    ("options", "temperature", "dtype"),
    [
        ("num_draft_tokens=1,threshold=0", 1.0, torch.float32),
        ("num_draft_tokens=8,interval=2,search_budget=1,threshold=0.1", 0.0, torch.bfloat16),
        ("num_draft_tokens=3,interval=2,search_budget=1,threshold=0.1", 1.0, torch.bfloat16),
        ("skip=4,keep_outer=true", 0.0, torch.float32),
        ("acceptance=rejection", 0.0, torch.float32),
    ],
)
def test_tokens_are_those_of_plain_decoding(
    synthetic: Callable[..., Engine], options: str, temperature: float, dtype: torch.dtype
) -> None:
    engine = synthetic("tiny", dtype, 0.1)
    cache = engine._loaded()[1]
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=3, ignore_eos=True)
    together = engine.generate(PROMPTS, params, method=f"clasp:{options}")
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert output.token_ids == engine.generate(prompt, params).token_ids
        assert output.stats.lossless
    assert together[0].stats.drafted > 0
    assert cache.free_pages == cache.total_pages


class Ticks:
    """A clock that moves on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_later_optimisations_wait_for_the_interval_and_the_budget(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticks()
    monkeypatch.setattr(rounds, "perf_counter", clock)
    engine = synthetic("tiny", torch.float32, 0.1)
    model, cache = engine._loaded()

    def decode(method: Clasp) -> list[int]:
        """The rounds after which the set was chosen."""
        params = SamplingParams(max_tokens=130, ignore_eos=True)
        sequence = Sequence(0, 0, [5, 6, 7], params, 0, frozenset(), model.config.max_context, None)
        sequence.pages = cache.reserve(sequence.max_length)
        prefill(model, cache, sequence, method)
        chosen: list[int] = []
        while sequence.finish_reason is None:
            known = len(method.events)
            rounds.speculate(model, cache, [sequence], method)
            if len(method.events) > known:
                chosen.append(sequence.counters.rounds)
        cache.release(sequence.pages)
        return chosen

    options = {"num_draft_tokens": 1, "threshold": 0.0}
    with torch.inference_mode():
        # A round takes two ticks and an optimisation one.
        assert decode(Clasp(Options(interval=10, search_budget=1.0, **options), 8, clock))[:3] == [1, 12, 23]
        assert decode(Clasp(Options(interval=10, search_budget=0.025, **options), 8, clock))[:3] == [1, 41, 61]
        assert decode(Clasp(Options(interval=10, search_budget=0.0, **options), 8, clock)) == [1]


def test_without_a_free_page_it_decodes_on(golden: Path) -> None:
    engine = Engine.load(golden / "clasp-1", dtype="float32")
    cache = engine._loaded()[1]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    expected = engine.generate([5, 6, 7], params).token_ids
    taken = cache.reserve((cache.free_pages - 1) * cache.page_size)
    output = engine.generate([5, 6, 7], params, method="clasp")
    assert output.token_ids == expected
    assert output.stats.drafted == 0
    cache.release(taken)
    assert engine.generate([5, 6, 7], params, method="clasp").stats.drafted > 0


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="skip"):
        registry.parse("clasp:skip=7,keep_outer=true").build(CONFIG)
    with pytest.raises(RequestError, match="interval"):
        registry.parse("clasp:interval=0")
    with pytest.raises(RequestError, match="acceptance"):
        registry.parse("clasp:acceptance=maybe")
    assert registry.parse("clasp").build(CONFIG).plan.skipped == 0
