"""LayerSkip: the published counts, one cache for both passes, and no token changed."""

import json
from pathlib import Path

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config
from skipjack.loaders.weights import load_weights
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.layerskip import LayerSkip, Options
from skipjack.runtime.model import Model
from skipjack.runtime.rows import Chains, one_sequence
from skipjack.runtime.sequence import Sequence
from skipjack.runtime.speculate import speculate

PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]


@pytest.mark.parametrize("case", ["layerskip-1", "layerskip-2"])
def test_drafted_and_accepted_counts_are_those_of_the_authors_code(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())
    config = ModelConfig.load(golden / case)
    model = Model(config, load_weights(golden / case, config, torch.float32), TORCH)
    cache = model.new_cache(2)
    for run in expected["runs"]:
        if run["options"].get("num_draft_tokens") in (2, 4) and "drafted" in run:
            prompt, params = run["prompt_ids"], SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
            sequence = Sequence(0, 0, prompt, params, 0, frozenset(), config.max_context, None)
            sequence.pages = cache.reserve(sequence.max_length)
            # Theirs drafts from the prompt; our engine chooses the first token with the prompt's own pass.
            rows = one_sequence(prompt[:-1], 0, sequence.pages, TORCH.prefill_tile, model.device)
            model.forward(rows, cache, model.full)
            method = LayerSkip(Options(**run["options"]), config.num_layers)
            while sequence.finish_reason is None:
                speculate(model, cache, [sequence], method)
            cache.release(sequence.pages)
            assert sequence.tokens == prompt + run["token_ids"]
            assert (sequence.counters.drafted, sequence.counters.accepted) == (run["drafted"], run["accepted"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("options", ["exit_layer=1", "exit_layer=5,num_draft_tokens=3", "threshold=0.3", "reuse=false"])
def test_tokens_are_those_of_plain_decoding(synthetic, options: str, temperature: float, dtype: torch.dtype) -> None:
    engine = synthetic("tiny", dtype, 0.1)
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=3, ignore_eos=True)
    together = engine.generate(PROMPTS, params, method=f"layerskip:{options}")
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert output.token_ids == engine.generate(prompt, params).token_ids
        assert output.stats.lossless


def passes(engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, int], int]]:
    """The (span, real rows) of every pass of a short request after its prompt."""
    seen: list[tuple[tuple[int, int], int]] = []
    forward = Model.forward

    def spy(self, rows, cache, plan, hidden=None, **options):
        laid = rows.spread() if isinstance(rows, Chains) else rows
        seen.append((plan.span, int((laid.sequence >= 0).sum())))
        return forward(self, rows, cache, plan, hidden, **options)

    monkeypatch.setattr(Model, "forward", spy)
    engine.generate(PROMPTS[0], SamplingParams(max_tokens=6, ignore_eos=True), method=method)
    return seen[1:]


def test_verification_reuses_what_the_draft_computed(synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    first = passes(synthetic("tiny"), "layerskip:exit_layer=3,num_draft_tokens=2", monkeypatch)[:4]
    assert first == [((0, 6), 1), ((0, 6), 1), ((0, 6), 1), ((6, 16), 3)]


def test_without_reuse_verification_is_a_full_pass(synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "layerskip:exit_layer=3,num_draft_tokens=2,reuse=false"
    assert passes(synthetic("tiny"), method, monkeypatch)[:3] == [((0, 6), 1), ((0, 6), 1), ((0, 16), 3)]


def test_early_exit_is_labelled_lossy_and_runs_no_late_layer(synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = synthetic("tiny")
    method = "layerskip:exit_layer=2,verify=false"
    assert set(passes(engine, method, monkeypatch)) == {((0, 4), 1)}
    output = engine.generate(PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True), method=method)
    assert not output.stats.lossless
    assert output.stats.layers_kept == 2
    assert output.stats.executed_skips == 4 * 12


def test_the_prompt_meets_the_head_once(synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    predict = Model.predict
    monkeypatch.setattr(Model, "predict", lambda self, x, **how: rows.append(len(x)) or predict(self, x, **how))
    synthetic("tiny").generate(list(range(3, 300)), SamplingParams(max_tokens=1), method="layerskip")
    assert rows == [1]


def test_one_token_and_stop_strings(demo: Engine) -> None:
    prompt, method = "The capital of France is", "layerskip:exit_layer=20,num_draft_tokens=4"
    one = SamplingParams(max_tokens=1)
    assert demo.generate(prompt, one, method=method).token_ids == demo.generate(prompt, one).token_ids
    plain = demo.generate(prompt, SamplingParams(max_tokens=24, ignore_eos=True)).text
    assert plain is not None
    stop = SamplingParams(max_tokens=24, stop=(plain[8:20],), ignore_eos=True)
    assert demo.generate(prompt, stop, method=method).text == plain[:8]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("layerskip:exit_layer=8", "exit_layer expects 1 to 7, got 8"),
        ("layerskip:exit_layer=0", "exit_layer expects 1 to 512, got 0"),
        ("layerskip:exit_layer=one", "exit_layer expects an integer, got 'one'"),
        ("layerskip:num_draft_tokens=0", "num_draft_tokens expects 1 to 64"),
        ("layerskip:reuse=maybe", "reuse expects true or false, got 'maybe'"),
    ],
)
def test_options_are_checked(synthetic, method: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        synthetic("tiny").generate(PROMPTS[0], method=method)


def test_two_thirds_of_the_layers_is_the_default_exit() -> None:
    assert LayerSkip(Options(), 30).plan.span == (0, 40)
    assert LayerSkip(Options(), 2).plan.span == (0, 2)
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    assert registry.parse("layerskip:verify=False").build(config).lossless is False
