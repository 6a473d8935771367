"""Static pruning and ShortGPT: the published tokens and influences, and layers that are really left out."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from skipjack import Engine, LayerPlan, SamplingParams
from skipjack.kernels import ops
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.calibration import Calibration, read_texts
from skipjack.runtime.errors import RequestError
from skipjack.runtime.influence import block_influence, removal_order
from skipjack.runtime.model import Model
from skipjack.runtime.rows import one_sequence
from skipjack.runtime.stepwise import at_once

CASES = ["shortgpt-1", "shortgpt-2"]
PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]
FILLED = "static:skip=2+3+5,phase=prefill,kv=fill"


def spec(method: str, options: dict[str, object]) -> str:
    values = {k: "+".join(map(str, v)) if isinstance(v, list) else v for k, v in options.items()}
    return method + ":" + ",".join(f"{key}={value}" for key, value in values.items())


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_conformance_case(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())
    runs = [run for run in expected["runs"] if run["cli"]]
    with Engine.load(golden / case) as engine:
        for run in runs:
            params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
            output = engine.generate(run["prompt_ids"], params, method=spec(run["method"], run["options"]))
            assert output.token_ids == run["token_ids"], run["label"]
            assert output.stats.lossless == (run["method"] != "static")
    assert len(runs) == 5


@pytest.mark.parametrize("case", CASES)
def test_influence_and_removal_order_are_those_of_the_conformance_case(golden: Path, case: str, tmp_path: Path) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())["block_influence"]
    texts, window = [expected["calibration_ids"]], expected["stride"]
    with Engine.load(golden / case) as engine, torch.inference_mode():
        model, _ = engine._loaded()
        mean = at_once(block_influence(model, texts, window))
        total = at_once(block_influence(model, texts, window, official=True))
        assert mean.tolist() == pytest.approx(expected["bi_mean"], abs=1e-5)
        assert total.tolist() == pytest.approx(expected["official"]["bi_sum"], rel=1e-5)
        assert list(removal_order(mean)) == expected["removal_order"]
        assert list(removal_order(total)) == expected["official"]["removal_order"]
        path = tmp_path / "ids"
        path.write_text(f"{texts[0]}\n")
        for rule, order in (("mean", expected["removal_order"]), ("official", expected["official"]["removal_order"])):
            method = f"shortgpt:n=4,calibration={path},window={window},rule={rule}"
            (found,) = engine.generate([1, 2], SamplingParams(max_tokens=2), method=method).stats.events
            assert (found["kind"], found["removed"]) == ("influence", sorted(order[:4]))
            assert found["tokens"] == expected["tokens"]


def test_shortgpt_is_static_pruning_of_the_layers_it_names(synthetic: Callable[..., Engine]) -> None:
    engine, params = synthetic("tiny"), SamplingParams(max_tokens=12, ignore_eos=True)
    for options in ("", ",phase=prefill,kv=fill"):
        found = engine.generate(PROMPTS, params, method=f"shortgpt:n=3{options}")
        removed = found[0].stats.events[0]["removed"]
        assert len(removed) == 3
        by_hand = engine.generate(PROMPTS, params, method=f"static:skip={'+'.join(map(str, removed))}{options}")
        assert [output.token_ids for output in found] == [output.token_ids for output in by_hand]
    default = engine.generate(PROMPTS[0], params, method="shortgpt")
    assert len(default.stats.events[0]["removed"]) == 2
    assert default.stats.layers_kept == 6


def executed(engine: Engine, prompt: object, method: str, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Rows that ran through each sub-layer of a request, prompt and decoding apart; fills count by layer."""
    seen: Counter[tuple[str, int]] = Counter()
    step, fill = Model.step, Model.fill

    def spy(self, laid, cache, sublayer, x, *rest, **options):
        phase = "prompt" if laid.rows.tile == self.ops.prefill_tile else "decode"
        seen[phase, sublayer] += int((laid.rows.sequence >= 0).sum())
        step(self, laid, cache, sublayer, x, *rest, **options)

    def spy_fill(self, laid, cache, layers, x):
        for layer in layers:
            seen["fill", layer] += int((laid.rows.sequence >= 0).sum())
        seen["launches", 0] += 1
        fill(self, laid, cache, layers, x)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "step", spy)
        patch.setattr(Model, "fill", spy_fill)
        engine.generate(prompt, SamplingParams(max_tokens=5, ignore_eos=True), method=method)
    return seen


def test_layers_left_out_are_not_computed(synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, kept = synthetic("tiny"), {0, 1, 4, 6, 7}
    everywhere = {2 * layer + part for layer in kept for part in (0, 1)}
    both = executed(engine, PROMPTS[0], "static:skip=2+3+5", monkeypatch)
    assert both == {("prompt", s): 4 for s in everywhere} | {("decode", s): 4 for s in everywhere}
    prefill = executed(engine, PROMPTS[0], FILLED, monkeypatch)
    expected = {("prompt", s): 4 for s in everywhere} | {("decode", s): 4 for s in range(16)}
    assert prefill == expected | {("fill", layer): 4 for layer in (2, 3, 5)} | {("launches", 0): 2}
    stats = engine.generate(PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True), method=FILLED).stats
    assert stats.layers_per_token == (5, 8, 8, 8, 8)
    assert (stats.layers_kept, stats.executed_skips) == (8, 0)
    stats = engine.generate(PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True), method="static:skip=2+3+5").stats
    assert stats.layers_per_token == (5,) * 5
    assert (stats.layers_kept, stats.executed_skips) == (5, 24)


def test_fills_are_the_gaps_between_sub_layers_that_run() -> None:
    plan = LayerPlan.full(6).without(attention=[0, 1, 3, 5], mlp=[0, 3, 4, 5])
    plan = LayerPlan(plan.runs, plan.span, fill=True)
    assert plan.sublayers == (3, 4, 5, 8)
    assert plan.fills == {3: range(0, 2), 8: range(3, 4), 12: range(5, 6)}
    assert LayerPlan(plan.runs, (4, 8), fill=True).fills == {8: range(3, 4)}
    assert LayerPlan(plan.runs, plan.span).fills == {}


FAMILIES = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-smollm3", "tiny-bloom"]


@pytest.mark.parametrize(("shape", "backend"), [*((shape, "torch") for shape in FAMILIES), ("tiny-smollm3", "triton")])
def test_a_filled_layer_writes_what_it_would_have_written_had_it_run(shape: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    config = ModelConfig.parse(synthetic_config(shape), shape)
    model = Model(config, synthetic_weights(config, 3, torch.float32), ops.select(backend))
    filled, expected = model.new_cache(1), model.new_cache(1)
    tokens = 70 if backend == "torch" else 5
    pages = filled.reserve(tokens)
    assert expected.reserve(tokens) == pages
    rows = one_sequence([3] * tokens, 0, pages, model.ops.prefill_tile, model.device)
    passing = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(0))
    nothing = model.full.without(attention=[2, 3, 4], mlp=[2, 3, 4])
    with torch.inference_mode():
        left = model.forward(rows, filled, LayerPlan(nothing.runs, (4, 10), fill=True), hidden=passing)
        assert torch.equal(left, passing)
        for layer in (2, 3, 4):
            model.forward(rows, expected, LayerPlan(model.full.runs, (2 * layer, 2 * layer + 1)), hidden=passing)
    for ours, theirs in ((filled.keys, expected.keys), (filled.values, expected.values)):
        assert torch.equal(ours[2:5, pages], theirs[2:5, pages])
        assert ours[2:5, pages, :, :tokens].abs().amin(dim=(1, 2, 4)).all()


def test_holes_are_never_read(synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, params = synthetic("tiny"), SamplingParams(max_tokens=8, ignore_eos=True)
    method = "static:skip=2+3+5"
    expected = engine.generate(PROMPTS[2], params, method=method).token_ids
    _, cache = engine._loaded()
    reserve = type(cache).reserve

    def poisoned(self, tokens, into):
        pages = reserve(self, tokens, into)
        self.keys[:, pages], self.values[:, pages] = float("nan"), float("nan")
        for layer in (0, 1, 4, 6, 7):
            self.keys[layer, pages], self.values[layer, pages] = 0, 0
        return pages

    monkeypatch.setattr(type(cache), "reserve", poisoned)
    assert engine.generate(PROMPTS[2], params, method=method).token_ids == expected
    assert cache.keys[[2, 3, 5], 1:].isnan().any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["static:skip=2+3+5", FILLED, "static:skip=2+3+5,kv=fill"])
def test_batched_ids_are_those_of_each_prompt_alone(
    synthetic: Callable[..., Engine], method: str, temperature: float
) -> None:
    engine = synthetic("tiny", torch.bfloat16)
    params = SamplingParams(max_tokens=10, temperature=temperature, seed=3, ignore_eos=True)
    together = engine.generate(PROMPTS, params, method=method)
    alone = [engine.generate(prompt, params, method=method) for prompt in PROMPTS]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]


def test_a_prompt_that_skipped_layers_is_no_run_that_skipped_none(synthetic: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    output = synthetic().generate([5, 6, 7], params, method="static:skip=2+3,phase=prefill,kv=fill")
    assert output.stats.notes == ()
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    merged = Engine(config, synthetic_weights(config, 0, torch.float32), method="laco:base=2,followers=1")
    assert merged.generate([5, 6, 7], params).stats.notes == ()


def test_filling_what_nobody_reads_changes_no_token(synthetic: Callable[..., Engine]) -> None:
    engine, params = synthetic("tiny"), SamplingParams(max_tokens=10, ignore_eos=True)
    hole, filled = (
        engine.generate(PROMPTS[2], params, method=f"static:skip=2+3+5,kv={kv}").token_ids for kv in ("hole", "fill")
    )
    assert hole == filled
    assert hole != engine.generate(PROMPTS[2], params, method=FILLED).token_ids


def test_influence_by_hand_in_float64(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny", torch.float64)
    model, cache = engine._loaded()
    texts = [list(range(3, 90)), [7, 8, 9]]
    total = torch.zeros(8, dtype=torch.float64)
    with torch.inference_mode():
        for text in (texts[0][:40], texts[0][40:80], texts[0][80:], texts[1]):
            pages = cache.reserve(len(text))
            rows = one_sequence(text, 0, pages, model.ops.prefill_tile, model.device)
            for layer in range(8):
                before = model.forward(rows, cache, LayerPlan(model.full.runs, (0, 2 * layer)))
                after = model.forward(rows, cache, LayerPlan(model.full.runs, (0, 2 * layer + 2)))
                total[layer] += (1 - functional.cosine_similarity(before, after)).sum()
            cache.release(pages)
        found = at_once(block_influence(model, texts, 40))
    assert found.tolist() == pytest.approx((total / 90).tolist(), abs=1e-12)


def test_calibration_texts(demo: Engine, tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text('a plain line\n{"turns": ["first", "second"]}\n[1, 2]\n[not ids\n')
    assert read_texts(path, "x") == ["a plain line", "first", [1, 2], "[not ids"]
    assert demo.tokenizer is not None
    encode = demo.tokenizer.encode
    assert Calibration.read(str(path), "x").ids(demo.config, encode)[:3] == [
        encode("a plain line"),
        encode("first"),
        [1, 2],
    ]
    assert sum(len(text) for text in Calibration.read("", "x").ids(demo.config, encode)) > 300
    drawn = Calibration.read("", "x").ids(demo.config, None)
    assert drawn == Calibration.read("", "x").ids(demo.config, None)
    assert len({token for text in drawn for token in text}) > 300
    with pytest.raises(RequestError, match=r"x: .*texts: expected lists of token ids, as the model has no tokenizer"):
        Calibration.read(str(path), "x").ids(demo.config, None)
    path.write_text("[1, 999999]\n")
    with pytest.raises(RequestError, match="token 999999 is outside the vocabulary of 49152"):
        Calibration.read(str(path), "x").ids(demo.config, None)
    for content in ("", "\n", '{"turns": []}\n', "{broken\n", "[null]\n"):
        path.write_text(content)
        with pytest.raises(
            RequestError, match=r"x: .*texts(, line 1: expected a text, .*, found|: expected at least one text)"
        ):
            read_texts(path, "x")
    with pytest.raises(RequestError, match=r"x: cannot read .*nothing: No such file"):
        read_texts(tmp_path / "nothing", "x")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("static", "static: option skip expects layers joined with [+], got none"),
        ("static:skip=8", "static: option skip expects layers from 0 to 7, got 8"),
        ("static:skip=1,phase=decode", "static: option phase expects both or prefill, got 'decode'"),
        ("static:skip=1,kv=own", "static: option kv expects hole or fill, got 'own'"),
        ("static:skip=1,phase=prefill", "static: phase=prefill expects kv=fill, got kv=hole: decoding at full depth"),
        ("shortgpt:n=8", "shortgpt: option n expects 0 to 7, got 8"),
        ("shortgpt:phase=prefill", "shortgpt: phase=prefill expects kv=fill"),
        ("shortgpt:window=0", "shortgpt: option window expects 1 to 1024, got 0"),
        ("shortgpt:rule=sum", "shortgpt: option rule expects mean or official, got 'sum'"),
        ("shortgpt:calibration=nowhere", "shortgpt: option calibration: cannot read nowhere: No such file"),
    ],
)
def test_options_are_checked(synthetic: Callable[..., Engine], method: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        synthetic("tiny").generate(PROMPTS[0], method=method)
