"""ConfLayers: confidence by transformers' modules, sets by the formula written out, and when one is replaced."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.weights import load_weights
from skipjack.runtime.batch import Tally
from skipjack.runtime.confidence import confidence
from skipjack.runtime.errors import CapacityError
from skipjack.runtime.methods import conflayers
from skipjack.runtime.methods.conflayers import ConfLayers, Options, low
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.rows import one_sequence

transformers = pytest.importorskip("transformers")

LAYERS = 12


@torch.inference_mode()
def test_confidence_is_that_of_the_outputs_of_the_modules_of_transformers(tmp_path: Path) -> None:
    shape = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 5}
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    ).eval()
    for parameter in peer.parameters():
        parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    peer.save_pretrained(tmp_path)
    said: list[list[Tensor]] = []
    for layer in peer.model.layers:
        outputs: list[Tensor] = []
        layer.self_attn.register_forward_hook(lambda _, __, out, keep=outputs: keep.append(out[0]))
        layer.mlp.register_forward_hook(lambda _, __, out, keep=outputs: keep.append(out))
        said.append(outputs)
    tokens, window = [Random(3).randrange(131) for _ in range(300)], 20
    peer(torch.tensor([tokens[:-1]]))
    expected = [certainty(out[0, -window:].double()) for outputs in said for out in outputs]

    config = ModelConfig.load(tmp_path)
    model = Model(config, load_weights(tmp_path, config, torch.float32), TORCH)
    cache = model.new_cache(8)
    pages = cache.reserve(len(tokens))
    model.forward(one_sequence(tokens[:-1], 0, pages, TORCH.prefill_tile, model.device), cache, model.full)
    kept, free = cache.keys[:, pages].clone(), cache.free_pages
    assert confidence(model, cache, pages, tokens, window) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(cache.keys[:, pages], kept), "the sequence's own cache stays as it is"
    assert cache.free_pages == free


def certainty(output: Tensor) -> float:
    """1 − entropy ÷ its maximum, averaged over tokens."""
    total = 0.0
    for row in output.tolist():
        weights = [math.exp(value) for value in row]
        chances = [weight / sum(weights) for weight in weights]
        total += 1 + sum(p * math.log(p) for p in chances) / math.log(len(row))
    return total / len(output)


def written_out(confidences: list[float], spread: float) -> list[int]:
    """The rule of §3, an entry at a time."""
    n = len(confidences)
    mean = sum(confidences) / n
    deviation = math.sqrt(sum((c - mean) ** 2 for c in confidences) / n)
    z = [(c - mean) / (deviation + 1e-6) for c in confidences]

    def slope(f: list[float]) -> list[float]:
        inner = [(f[i + 1] - f[i - 1]) / 2 for i in range(1, n - 1)]
        return [f[1] - f[0], *inner, f[-1] - f[-2]]

    bend = slope(slope(z))
    low, high = min(bend), max(bend)
    unit = [(b - low) / (high - low) for b in bend]
    middle = sum(unit) / n
    scale = min(0.5 / (max(unit) - middle), 0.5 / (middle - min(unit)))
    skipped = []
    for i in range(n):
        window = 2 + int(5 * (0.5 + scale * (unit[i] - middle)) * (i + 1) / (n + 2))
        others = [z[j] for j in range(max(0, i - window // 2), min(n, i + window // 2 + 1)) if j != i]
        about = sum(others) / len(others)
        threshold = about - spread * math.sqrt(sum((other - about) ** 2 for other in others) / len(others))
        if z[i] < threshold:
            skipped.append(i + 1)
    return skipped


@pytest.mark.parametrize("spread", [0.0, 0.25, 1.0])
def test_layers_below_their_neighbours_are_skipped(spread: float) -> None:
    random, sizes = Random(7), set()
    for _ in range(300):
        confidences = [random.random() * (1 + 5 * (random.random() < 0.2)) for _ in range(random.randrange(4, 60))]
        found = low(confidences, spread)
        assert found == written_out(confidences, spread)
        sizes.add(len(found))
    assert len(sizes) > 10


def test_a_flat_curve_has_nothing_to_skip() -> None:
    assert low([0.5] * 10, 0.0) == []
    assert low([0.1, 0.9], 0.0) == [1]
    # The curve bends alike everywhere: a layer has one neighbour on either side.
    assert low([0.1, 0.5, 0.8], 0.0) == [1]


class Rounds:
    """A method that is told of rounds: their confidences are those of `curves`, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: float) -> None:
        self.made = ConfLayers(Options(**{"search_budget": 1.0, "interval": 6, **options}), LAYERS)
        self.asked = 0
        random = Random(1)
        self.curves = [[random.random() for _ in range(2 * LAYERS)] for _ in range(50)]
        monkeypatch.setattr(conflayers, "confidence", self._confidence)

    def _confidence(self, *_: object) -> list[float]:
        self.asked += 1
        return self.curves[self.asked - 1]

    def round(self, accepted: int = 2, drafted: int = 5, generated: int = 99) -> LayerPlan:
        sequence = SimpleNamespace(generated=generated, pages=[], tokens=[])
        tally = Tally([sequence], [drafted], [drafted], [accepted], [accepted + 1], 1.0, 1.0)
        self.made.count(SimpleNamespace(mark=lambda *_: nullcontext()), None, tally)
        return self.made.plan

    def expected(self, asked: int) -> LayerPlan:
        said = self.curves[asked - 1]
        both = [said[2 * i] + said[2 * i + 1] for i in range(1, LAYERS - 1)]
        skipped = low(both, self.made._options.spread)
        return LayerPlan.full(LAYERS).without(skipped, skipped)


def test_a_set_is_taken_once_the_window_has_come_and_replaced_after_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch, skip_ratio=0.0)
    assert rounds.made.plan == conflayers.initial_plan(LAYERS)
    assert rounds.round(generated=32) == conflayers.initial_plan(LAYERS)
    assert rounds.round(generated=33) == rounds.expected(1)
    for _ in range(5):
        assert rounds.round() == rounds.expected(1)
    assert rounds.round() == rounds.expected(2)
    for _ in range(2):
        assert rounds.round(accepted=0) == rounds.expected(2)
    assert rounds.round(accepted=0) == rounds.expected(3), "half the rounds are enough to see that little is accepted"


def test_a_set_that_skips_too_little_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch, skip_ratio=1.0)
    for asked in range(1, 8):
        assert rounds.round() == rounds.expected(asked)


def test_the_best_of_all_sets_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch, skip_ratio=0.0, max_opt_iter=4)
    for accepted in (0, 2, 3, 1):  # Of the initial set, which is not judged, and of those after it.
        for _ in range(6 if rounds.asked else 1):
            assert rounds.made.phase() == "accumulation"
            rounds.round(accepted)
    assert rounds.made.phase() == "acceleration"
    assert rounds.made.plan == rounds.expected(2)
    assert [event["kind"] for event in rounds.made.tell()] == ["confidence"] * 3 + ["final"]
    for _ in range(20):
        rounds.round(0)
    assert rounds.asked == 4


def test_a_set_that_is_good_enough_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch, skip_ratio=0.0, max_score=0.9)
    rounds.round()
    for _ in range(6):
        rounds.round(accepted=5)
    assert rounds.made.phase() == "acceleration"
    assert (rounds.made.plan, rounds.asked) == (rounds.expected(1), 1)


def test_the_search_keeps_to_its_budget_and_waits_for_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, clock = Rounds(monkeypatch, skip_ratio=1.0, search_budget=0.1), iter(range(1000))
    monkeypatch.setattr(conflayers, "perf_counter", lambda: next(clock) * 1.0)
    for _ in range(101):
        rounds.round()
    # A round earns 0.2 s and a set costs 1 s.
    assert 20 <= rounds.asked <= 22

    def full(*_: object) -> list[float]:
        raise CapacityError("no page")

    monkeypatch.setattr(conflayers, "confidence", full)
    plan = rounds.made.plan
    for _ in range(10):
        assert rounds.round() == plan


@pytest.mark.parametrize("options", ["", "tree=true,", "acceptance=rejection,"])
def test_the_tokens_are_those_of_plain_decoding(synthetic: Callable[..., Engine], options: str) -> None:
    engine = synthetic("tiny", torch.float32, 0.1)
    prompts = [[5, 9, 11, 300], [7], list(range(20, 50))]
    method = f"conflayers:{options}window=8,interval=4,search_budget=1,threshold=0.1"
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    plain, outputs = engine.generate(prompts, params), engine.generate(prompts, params, method=method)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    events = [event for output in outputs for event in output.stats.events]
    assert {event["kind"] for event in events} == {"confidence"}
    assert sum(output.stats.drafted for output in outputs) > 0


def test_with_nothing_to_skip_rounds_are_plain_and_it_is_told(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflayers, "low", lambda *_: [])
    engine, params = synthetic("tiny", torch.float32, 0.1), SamplingParams(max_tokens=60, ignore_eos=True)
    output = engine.generate([5, 9], params, method="conflayers:window=8,search_budget=1,max_opt_iter=1")
    assert output.token_ids == engine.generate([5, 9], params).token_ids
    assert output.stats.layers_kept == output.stats.layers
    assert output.stats.notes == (conflayers.NOTHING_TO_SKIP,)
