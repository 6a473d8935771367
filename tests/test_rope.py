"""The rope scalings yarn and dynamic against transformers; dynamic rows are the same in every batch and draft."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from skipjack import Engine, LayerPlan, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.runtime.influence import block_influence
from skipjack.runtime.merging import Similarity
from skipjack.runtime.prefill import text_rows
from skipjack.runtime.rope import RotaryTable, dynamic_frequencies, inverse_frequencies
from skipjack.runtime.stepwise import at_once
from skipjack.runtime.tune import tune_swift

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

SIZES = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
LENGTHS = {"intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
PROMPTS = [list(range(20, 90)), [5, 9, 200, 31], [7, 400, 3] * 18]


def both(rope: dict[str, object], theta: float, **fields: object) -> tuple[ModelConfig, object]:
    """Our reading of a configuration and transformers'."""
    config = SIZES | LENGTHS | fields | {"rope_parameters": rope | {"rope_theta": theta}}
    return ModelConfig.parse(config, "config.json"), transformers.LlamaConfig(**config)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 0.7},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"mscale": 0.707},
        {"beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"beta_fast": 3, "beta_slow": 3},
        {"factor": 1.0},
        {"original_max_position_embeddings": 8},
        {"original_max_position_embeddings": None},
    ],
    ids=str,
)
def test_yarn_is_that_of_transformers(extra: dict[str, object], theta: float) -> None:
    rope = {key: value for key, value in (YARN | extra).items() if value is not None}
    config, oracle = both(rope, theta)
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](oracle)
    ours = inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
    assert config.rope_scaling.attention_factor == pytest.approx(scale, rel=1e-12)
    assert config.max_context == max(4096, int(rope["factor"] * rope.get("original_max_position_embeddings", 4096)))
    turned = RotaryTable(config, torch.device("cpu")).rows(torch.tensor([0]), 0).cos
    torch.testing.assert_close(turned, torch.full_like(turned, scale))


@pytest.mark.parametrize("length", [1, 4096, 4097, 5000, 16384])
def test_dynamic_is_that_of_transformers(length: int) -> None:
    config, oracle = both(DYNAMIC, 1e4)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](oracle, seq_len=length)
    ours = dynamic_frequencies(config.rope_theta, config.head_dim, config.rope_scaling, torch.tensor([length]))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert config.max_context == 4 * 4096


def dynamic_fields(shape: str) -> dict[str, object]:
    """A shape whose original context is 64 positions and whose served one is 256."""
    return synthetic_config(shape) | {"max_position_embeddings": 64, "rope_scaling": DYNAMIC}


@pytest.fixture(scope="module")
def stretched() -> Engine:
    config = ModelConfig.parse(dynamic_fields("tiny"), "config.json")
    return Engine(config, synthetic_weights(config, 0, torch.float32, 0.3))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Any]]:
    """A model whose context is stretched, in ours and in transformers."""
    folder = tmp_path_factory.mktemp("stretched") / "m"
    write_synthetic(folder, "tiny-llama", 0, 0.3)
    (folder / "config.json").write_text(json.dumps(dynamic_fields("tiny-llama")))
    with Engine.load(folder) as engine:
        yield engine, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def decoded(oracle: Any, prompt: list[int], given: list[int]) -> torch.Tensor:
    """Its logits after every token, float32 [prompt + given, V]: a prompt read at once, then a token at a time."""
    step = oracle(torch.tensor([prompt]), use_cache=True)
    logits = [step.logits[0]]
    for token in given:
        step = oracle(torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits[0])
    return torch.cat(logits)


def test_texts_beyond_the_original_context_score_as_in_transformers(loaded: tuple[Engine, Any]) -> None:
    """Its cached decoding: a prompt turns by its own length, each later token by the length it makes."""
    engine, oracle = loaded
    given = [3, 400, 7, 7, 250, 8, 91, 2, 44, 101, 12, 13, 0, 500, 77]
    scores = engine.score(PROMPTS, [given] * 3, method="autoregressive")
    for prompt, scored in zip(PROMPTS, scores, strict=True):
        logits = decoded(oracle, prompt, given[:-1])[len(prompt) - 1 :]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(given)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.logprobs), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@torch.inference_mode()
def test_one_pass_over_a_text_turns_it_as_it_was_generated(loaded: tuple[Engine, Any], prompt: list[int]) -> None:
    engine, oracle = loaded
    model, cache = engine._loaded()
    given = [(13 * i) % 500 + 3 for i in range(70)]
    expected = decoded(oracle, prompt, given)
    pages = cache.reserve(len(prompt + given))
    parts = text_rows(model, prompt + given, len(prompt), pages)
    hidden = torch.cat([model.forward(rows, cache, model.full) for rows in parts])
    torch.testing.assert_close(model.logits(hidden), expected, atol=2e-3, rtol=0)
    cache.release(pages)


def test_the_whole_model_matches_its_own_text_when_a_set_is_sought(
    stretched: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipjack.runtime.search.initial_plan", LayerPlan.full)
    found = tune_swift(
        stretched,
        [list(range(100, 100 + length)) for length in (30, 90, 150, 220)],
        window=24,
        skip_ratio=0.3,
        candidates=1,
        seconds=0,
        seed=0,
        stop=lambda: False,
        report=lambda done, best: None,
    )
    assert found.score == 1.0


@torch.inference_mode()
def test_a_set_is_scored_on_what_was_generated_alone(stretched: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that is nearly full has room for few tokens, and the prompt's are nobody's."""
    monkeypatch.setattr("skipjack.runtime.search.initial_plan", LayerPlan.full)
    full = stretched.config.max_context
    texts = [[(7 * i) % 500 + 3 for i in range(full - room)] for room in (1, 2, 9)]
    fields = {"skip_ratio": 0.3, "candidates": 1, "seconds": 0, "seed": 0}
    found = tune_swift(stretched, texts, window=24, stop=lambda: False, report=lambda done, best: None, **fields)
    assert found.score == 1.0


@torch.inference_mode()
def test_calibration_texts_turn_as_prompts(loaded: tuple[Engine, Any]) -> None:
    engine, oracle = loaded
    model = engine._loaded()[0]
    text = [(11 * i) % 500 + 3 for i in range(200)]
    streams = oracle(torch.tensor([text]), output_hidden_states=True).hidden_states
    expected = [
        float((1 - functional.cosine_similarity(a[0].double(), b[0].double(), dim=-1)).sum())
        for a, b in pairwise(streams)
    ]
    influence = at_once(block_influence(model, [text], 256, official=True))
    torch.testing.assert_close(influence, torch.tensor(expected, dtype=torch.float64), atol=2e-4, rtol=0)
    cache = model.new_cache(4)
    torch.testing.assert_close(Similarity._read(model, cache, text), streams[-1][0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "method",
    [
        "lookup",
        "swift:skip_attention=4+5,skip_mlp=5,threshold=0",
        "swift:skip_attention=4+5,tree=true",
        "layerskip:exit_layer=5",
        "kangaroo:adapter=untrained,exit_layer=5",
        "unified:speedup=1",
    ],
)
def test_drafts_and_batches_change_no_token(stretched: Engine, method: str) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    together = stretched.generate(PROMPTS, params, method=method)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert output.token_ids == stretched.generate(prompt, params).token_ids


def test_a_row_never_changes_when_the_table_grows() -> None:
    config = ModelConfig.parse(dynamic_fields("tiny"), "config.json")
    table, position = RotaryTable(config, torch.device("cpu")), torch.tensor([3, 63, 64, 199])
    before, prompt = table.rows(position, 200), table.rows(position, 200, prompt=200)
    table.rows(position, 5000)
    for old, new in ((before, table.rows(position, 200)), (prompt, table.rows(position, 200, prompt=200))):
        assert torch.equal(old.cos, new.cos)
        assert torch.equal(old.sin, new.sin)
    assert not torch.equal(before.cos[1], prompt.cos[1])
    assert torch.equal(before.cos[3], prompt.cos[3])


def test_prompts_longer_than_a_chunk_turn_as_one(monkeypatch: pytest.MonkeyPatch, stretched: Engine) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    prompt = list(range(100, 220))
    whole = stretched.generate(prompt, params).token_ids
    monkeypatch.setattr("skipjack.runtime.prefill.PREFILL_CHUNK", 64)
    assert stretched.generate(prompt, params).token_ids == whole
