"""Fast numerics: no tiles, the same formulas, outputs that say so, texts equal in float64."""

import json
from functools import cache

import pytest
import torch
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH, select
from skipjack.kernels.reference import dense, packed
from skipjack.kernels.reference import routes as reference_routes
from skipjack.kernels.values import Norm, Router, Tree
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.commands.cli import run
from skipjack.runtime.commands.options import Numerics
from skipjack.runtime.costs import calibrate
from skipjack.runtime.errors import RequestError
from skipjack.runtime.stepwise import at_once

PAGE = 16
METHODS = (
    "autoregressive",
    "swift:skip_attention=1+3,skip_mlp=2,num_draft_tokens=4,threshold=0",
    "swift:skip_attention=1,num_draft_tokens=6,tree=true",
    "layerskip:exit_layer=2",
    "kangaroo:adapter=untrained,exit_layer=2,threshold=0.1",
    "clasp",
    "conflayers:window=4",
    "knapspec",
    "del",
    "lookup",
    "auto",
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def engine(numerics: str) -> Engine:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    return Engine(config, synthetic_weights(config, 0, torch.float64, 0.3), numerics=numerics)


def test_fast_tables_have_no_tiles_and_the_same_operations() -> None:
    exact, fast = select("torch"), select("torch", "fast")
    assert (fast.numerics, fast.decode_tile, fast.prefill_tile) == ("fast", None, None)
    assert (exact.numerics, exact.decode_tile) == ("exact", TORCH.decode_tile)
    assert fast.linear is exact.linear
    assert [TORCH.tile_of(rows) for rows in (1, 63, 64)] == [8, 8, 64]
    assert fast.tile_of(64) is None


@pytest.mark.parametrize("rows", [1, 3, 8, 11, 70])
def test_products_without_a_tile_compute_the_rows_there_are(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, norm = randn(rows, 24), randn(40, 24, seed=1), Norm(randn(24, seed=2), None, 1e-5)
    matrix, residual, seen = dense.prepare(weight), randn(rows, 40, seed=3), list[int]()
    product = packed.product

    def counted(x: Tensor, *rest: object) -> Tensor:
        seen.append(len(x))
        return product(x, *rest)

    monkeypatch.setattr(packed, "product", counted)
    normed = dense.normalise(x, norm)
    expected = normed @ weight.T + residual
    assert torch.allclose(dense.linear(x, matrix, tile=None, norm=norm, residual=residual), expected)
    active = torch.arange(rows) % 2 == 0
    dense.head(x, norm, matrix, tile=None, active=active)
    router = Router(matrix, torch.ones(40, dtype=x.dtype), randn(40, seed=4))
    exact, fast = (reference_routes.route(x, norm, router, tile=tile).weight for tile in (8, None))
    assert torch.allclose(exact, fast)
    assert seen == [rows, int(active.sum()), *[8] * (-(-rows // 8)), rows]


@pytest.mark.parametrize("window", [None, 5])
def test_attention_without_a_tile_is_the_formula(window: int | None) -> None:
    heads, kv_heads, width, counts, last = 4, 2, 8, [1, 5, 21], [3, 40, 39]
    keys, values = randn(9, kv_heads, PAGE, width), randn(9, kv_heads, PAGE, width, seed=1)
    table = torch.tensor([[1, 0, 0], [2, 5, 7], [3, 4, 8]])
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    position = torch.cat([torch.arange(end - n + 1, end + 1) for n, end in zip(counts, last, strict=True)])
    q = randn(len(position), heads, width, seed=2)
    index = TORCH.index(sequence, position, table, page_size=PAGE, tile=None)
    got = dense.attend(q, keys, values, index, scale=0.3, window=window).view(-1, heads, width)
    for row, (s, at) in enumerate(zip(sequence.tolist(), position.tolist(), strict=True)):
        seen = torch.arange(max(0, at + 1 - window) if window else 0, at + 1)
        k, v = (cache[table[s, seen // PAGE], :, seen % PAGE] for cache in (keys, values))
        for head in range(heads):
            weight = torch.softmax(k[:, head // 2] @ q[row, head] * 0.3, 0)
            assert torch.allclose(got[row, head], weight @ v[:, head // 2])


def test_a_tree_without_a_tile_reads_the_keys_of_its_paths() -> None:
    keys, values, table = randn(4, 1, PAGE, 8), randn(4, 1, PAGE, 8, seed=1), torch.tensor([[1, 2]])
    length, slot = torch.full((3,), 14), torch.tensor([[14, 14], [14, 15], [14, 16]])
    sequence, position, q = torch.zeros(3, dtype=torch.int64), torch.tensor([14, 15, 15]), randn(3, 2, 8, seed=2)
    index = TORCH.index(sequence, position, table, page_size=PAGE, tile=None, tree=Tree(length, slot))
    exact = TORCH.index(sequence, position, table, page_size=PAGE, tile=8, tree=Tree(length, slot))
    got, expected = (dense.attend(q, keys, values, chosen, scale=0.3) for chosen in (index, exact))
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("method", METHODS)
def test_in_float64_rounding_is_too_small_to_change_a_text(method: str) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [[5, 6, 7], [9, 8, 9, 8, 9], list(range(20, 90))]
    expected = engine("exact").generate(prompts, params)
    got = engine("fast").generate(prompts, params, method=method)
    assert [output.token_ids for output in got] == [output.token_ids for output in expected]


def test_outputs_promise_no_equal_bits() -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    exact, fast = (engine(numerics).generate([5, 6], params, method=METHODS[1]).stats for numerics in ("exact", "fast"))
    assert (engine("fast").numerics, fast.numerics, fast.lossless) == ("fast", "fast", False)
    assert (engine("exact").numerics, exact.numerics, exact.lossless, exact.notes) == ("exact", "exact", True, ())
    assert len(fast.notes) == 1
    assert "almost equally likely" in fast.notes[0]
    lossy = engine("fast").generate([5, 6], params, method="unified:speedup=2").stats
    assert (lossy.lossless, [note for note in lossy.notes if "numerics" in note]) == (False, [])


def test_numerics_of_another_name_are_refused() -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    with pytest.raises(RequestError, match="numerics: expected one of exact, fast, got 'quick'"):
        Engine(config, synthetic_weights(config, 0, torch.float32), numerics="quick")
    with pytest.raises(RequestError, match="numerics"):
        Engine.load("nowhere", numerics="")


def test_costs_are_measured_without_a_tile() -> None:
    model, _ = engine("fast")._loaded()
    costs = at_once(calibrate(model))
    assert costs.verify(1) <= costs.verify(9)
    assert costs.full > 0


@pytest.mark.parametrize("numerics", Numerics)
def test_the_command_line_takes_them_and_says_so(
    numerics: Numerics, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(model: str, **options: object) -> Engine:
        config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
        return Engine(config, synthetic_weights(config, 0, torch.float32), numerics=str(options["numerics"]))

    monkeypatch.setattr(Engine, "load", load)
    arguments = ["generate", "demo", "--prompt-ids", "3,4", "--max-tokens", "3", "--numerics", numerics.value, "--json"]
    assert run(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["numerics"], answer["lossless"]) == (numerics.value, numerics is Numerics.EXACT)
    assert run([*arguments, "--numerics", "quick"]) == 2


def test_the_demo_model_reads_a_short_prompt_in_one_pass(demo: Engine) -> None:
    fast = Engine.load("demo", numerics="fast", dtype="float32")
    output = fast.generate("The capital of France is", SamplingParams(max_tokens=8))
    assert output.text == demo.generate("The capital of France is", SamplingParams(max_tokens=8)).text


def test_rounds_on_the_device_need_no_tile() -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    prompts = [[5, 6, 7], [9, 8, 9, 8, 9]]
    expected = [output.token_ids for output in engine("exact").generate(prompts, params)]
    with Engine(config, synthetic_weights(config, 0, torch.float64, 0.3), numerics="fast", graphs=True) as device:
        for method in METHODS[:2]:
            outputs = device.generate(prompts, params, method=method)
            assert [output.token_ids for output in outputs] == expected
            assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs)


@pytest.mark.parametrize(
    ("temperature", "acceptance", "said"), [(0.8, "rejection", 1), (0, "rejection", 0), (0.8, "coupled", 0)]
)
def test_draws_by_rejection_say_that_they_are_not_those_of_the_seed(
    temperature: float, acceptance: str, said: int
) -> None:
    params = SamplingParams(max_tokens=8, temperature=temperature, seed=1, ignore_eos=True)
    method = f"swift:skip_attention=1,search_budget=0,acceptance={acceptance}"
    stats = engine("exact").generate([5, 6, 7], params, method=method).stats
    assert stats.lossless
    assert ["rejection sampling" in note for note in stats.notes] == [True] * said


def test_rounds_without_a_draft_draw_what_the_seed_does() -> None:
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1, ignore_eos=True)
    output = engine("exact").generate([5, 6, 7], params, method="swift:skip_ratio=0,acceptance=rejection")
    assert output.token_ids == engine("exact").generate([5, 6, 7], params).token_ids
    assert not any("rejection sampling" in note for note in output.stats.notes)
