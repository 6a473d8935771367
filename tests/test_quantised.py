"""Drafts in eight bits: weights against what rounding allows, passes against dequantised ones, texts against plain."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH, Ops, select
from skipjack.kernels.reference import packed
from skipjack.kernels.values import Matrix, Norm
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import Weights
from skipjack.runtime import quantised as quantised_module
from skipjack.runtime.costs import Costs
from skipjack.runtime.errors import CapacityError, RequestError
from skipjack.runtime.methods import auto, registry
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.quantised import quantise, quantised
from skipjack.runtime.rows import one_sequence

DTYPES = (torch.float32, torch.bfloat16)
RTOL = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-6}
PROMPTS = [[5, 6, 7, 5], [9], [3] * 70]
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
SHARP = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8, top_p=0.9, seed=11)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(weight: Tensor) -> Tensor:
    """What a weight [N, K] in eight bits stands for, float64; a test below holds `rounded` to what rounding is."""
    data, scale = packed.rounded(weight)
    return data.double() * scale.double()[:, None]


def dequantised(weights: Weights) -> Weights:
    def of(tensor: Tensor) -> Tensor:
        return by_hand(tensor.flatten(0, -2)).view(tensor.shape).to(tensor.dtype)

    fields = {name: of(getattr(weights, name)) for name in ("qkv", "output", "up", "down", "head")}
    return replace(weights, **fields)


def tables() -> list[Ops]:
    return list({id(table): table for table in (TORCH, select("torch"))}.values())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_a_weight_is_rounded_to_the_nearest_of_255_steps(dtype: torch.dtype) -> None:
    weight = randn(37, 51, dtype=dtype)
    weight[3] = 0
    weight[4, 7] = -100
    data, scale = packed.rounded(weight)
    assert data.dtype == torch.int8
    assert scale.dtype == torch.float32
    error = (data.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    assert torch.equal(data.int().abs().amax(dim=1) == 127, scale > 0), "all of the range is used"
    assert scale[3] == 0
    assert not data[3].any()
    assert data[4, 7] == -127
    assert -128 not in data


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.enter.__module__)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("width", "columns"), [(16, 4), (96, 64), (144, 66), (112, 576), (48, 16), (40, 33)])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 10, 25])
def test_a_product_is_that_with_the_weight_by_hand(
    table: Ops, dtype: torch.dtype, width: int, columns: int, rows: int
) -> None:
    x, weight = randn(rows, columns, dtype=dtype), randn(width, columns, dtype=dtype, seed=1)
    bias, residual = randn(width, dtype=dtype, seed=2), randn(rows, width, dtype=dtype, seed=3)
    light = table.quantise(table.prepare(weight))
    got = table.linear(x, light, tile=8, bias=bias, residual=residual.clone())
    expected = x.double() @ by_hand(weight).T + bias.double() + residual.double()
    assert (got.double() - expected).norm() / expected.norm() < RTOL[dtype]
    alone = [
        table.linear(x[i : i + 1], light, tile=8, bias=bias, residual=residual[i : i + 1].clone()) for i in range(rows)
    ]
    assert table is TORCH or light.data.dim() < 4 or torch.equal(torch.cat(alone), got), (
        "a row has the bits it has alone"
    )


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.enter.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [16, 48, 80, 176])
def test_gates_keep_their_own_scales(table: Ops, dtype: torch.dtype, inner: int) -> None:
    """Panels of gates and of what they gate lie in turn: each row must find its own scale."""
    x, weight = randn(5, 64, dtype=dtype), randn(2 * inner, 64, dtype=dtype, seed=1)
    weight *= torch.arange(1, 2 * inner + 1).to(dtype)[:, None] / inner
    norm = Norm(randn(64, dtype=dtype, seed=2), None, 1e-5)
    light = table.quantise(table.prepare_gated(weight))
    normed = x.double() * (x.double().square().mean(dim=1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    gate, up = (normed.to(dtype).double() @ by_hand(weight).T).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    got = table.linear(x, light, tile=8, norm=norm, activation="silu_gate")
    assert (got.double() - expected).norm() / expected.norm() < 3 * RTOL[dtype]
    both = table.linear(x, light, tile=8, norm=norm)
    whole = torch.cat([gate, up], dim=1)
    assert (both.double() - whole).norm() / whole.norm() < 2 * RTOL[dtype], "in the order of its rows"


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.enter.__module__)
@pytest.mark.parametrize("count", [16, 21, 64])
def test_some_rows_of_a_light_weight_are_a_light_weight(table: Ops, count: int) -> None:
    weight, x = randn(144, 64, dtype=torch.float32), randn(3, 64, dtype=torch.float32, seed=1)
    rows = torch.randperm(144, generator=torch.Generator().manual_seed(2))[:count].sort().values
    part = table.take_rows(table.quantise(table.prepare(weight)), rows)
    assert part.scale is not None
    assert (part.rows, part.columns) == (count, 64)
    expected = x.double() @ by_hand(weight[rows]).T
    got = table.linear(x, part, tile=8)
    assert (got.double() - expected).norm() / expected.norm() < 1e-6


def test_eight_bits_take_a_byte() -> None:
    table = select("torch")
    light = table.quantise(table.prepare(randn(960, 576, dtype=torch.bfloat16)))
    assert light.data.nbytes == 960 * 576


def made(shape: str = "tiny-llama", dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[ModelConfig, Weights]:
    config = ModelConfig.parse(synthetic_config(shape) | fields, shape)
    return config, synthetic_weights(config, 0, dtype, 0.8)


def streams(model: Model, plan: LayerPlan) -> Tensor:
    cache = model.new_cache(4)
    rows = one_sequence(list(range(3, 12)), 0, cache.reserve(9), model.ops.decode_tile, model.device)
    return model.logits(model.forward(rows, cache, plan))


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen2", "tiny-bloom"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_pass_is_that_of_the_model_by_hand(shape: str, dtype: torch.dtype) -> None:
    config, weights = made(shape, dtype)
    for table in tables():
        model = Model(config, weights, table)
        light = quantised(model)
        by_hand_too = Model(config, dequantised(weights), TORCH)
        plan = model.full.without((1,), (2,))
        got, expected = streams(light, plan).double(), streams(by_hand_too, plan).double()
        own = streams(model, plan).double()
        error = (got - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)
        if dtype == torch.float32:
            assert error < 0.01 * (own - expected).norm() / expected.norm(), "eight bits are seen"
        light.joined = None
        if table is not TORCH:
            assert torch.equal(streams(light, plan).double(), got), "one call or many"


def test_the_copy_is_one_and_goes_with_its_model() -> None:
    model = Model(*made(), select("torch"))
    light = quantised(model)
    assert quantised(model) is light
    assert light is not model
    assert not any(True for _ in quantise(model)), "nothing to do"
    assert model.layers[0].down.scale is None
    assert light.layers[0].down.scale is not None
    assert light.layers[0].attention_norm is model.layers[0].attention_norm
    gone = ref(model), ref(light)
    del model, light
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None


def test_two_who_make_it_a_step_at_a_time_come_to_one() -> None:
    model = Model(*made(), select("torch"))
    first, second = quantise(model), quantise(model)
    for steps in (first, second, first):
        next(steps)
    list(second)
    light = quantised(model)
    list(first)
    assert quantised(model) is light


def test_want_of_memory_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 5

    def scarce(weight: Matrix) -> Matrix:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return packed.quantise(weight)

    model = Model(*made(), replace(TORCH, quantise=scarce))
    with pytest.raises(CapacityError, match=r"draft_weights: the memory of the cpu ran out .*cache_tokens"):
        quantised(model)
    assert model not in quantised_module._MADE
    left = 10**6
    assert quantised(model).head.scale is not None


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("tree", [False, True])
def test_the_first_draft_is_what_the_copy_says_and_nothing_else(graphs: bool, tree: bool, whole_drafts: None) -> None:
    """A copy whose head says the token after the one it means: its drafts are seen to be its own, and all are wrong."""
    config, weights = made()
    by_hand_too = dequantised(weights)
    said = Engine(config, replace(by_hand_too, head=by_hand_too.head.roll(1, 0)))
    drafts: list[list[int]] = []
    engine = Engine(config, weights, graphs=graphs)
    model = engine._loaded()[0]
    own, verify = model.ops, model.ops.verify

    def kept(chosen: Tensor, tokens: Tensor, length: Tensor, *rest: Any, **named: Any) -> Any:
        drafts.append(tokens[0, : int(length[0])].tolist())
        return verify(chosen, tokens, length, *rest, **named)

    def wrong(matrix: Matrix) -> Matrix:
        return own.quantise(own.prepare(weights.head.roll(1, 0)) if matrix is model.head else matrix)

    model.ops = replace(own, verify=kept, quantise=wrong)
    plain = engine.generate(PROMPTS[0], GREEDY)
    drafts.clear()
    how = "skip_ratio=0,threshold=0,tree=true,max_nodes=5" if tree else "skip_ratio=0,threshold=0,num_draft_tokens=5"
    output = engine.generate(PROMPTS[0], GREEDY, method=f"swift:{how},draft_weights=int8")
    assert output.token_ids == plain.token_ids
    first = [*PROMPTS[0], plain.token_ids[0]]
    expected = said.generate(first, replace(GREEDY, max_tokens=5)).token_ids
    assert drafts[0][:1] == expected[:1] if tree else drafts[0] == expected
    assert expected[0] == (plain.token_ids[1] + 1) % config.vocab_size, "or this tells the two from nothing"


METHODS = [
    "quantized",
    "quantized:skip_attention=1,skip_mlp=2,num_draft_tokens=4,threshold=0.2,draft_vocab=64",
    "quantized:acceptance=rejection",
    "swift:draft_weights=int8,skip_attention=1,tree=true,threshold=0",
    "swift:draft_weights=int8,skip_ratio=0",
    "swift:draft_weights=int8,search_budget=1,threshold=0.1",
    "clasp:draft_weights=int8,interval=4,search_budget=1,threshold=0",
    "conflayers:draft_weights=int8,interval=4,search_budget=1,window=8,threshold=0",
    "auto:draft_weights=int8,max_loss=1",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_are_those_of_plain_decoding(method: str, graphs: bool, engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(graphs)
    for params in (GREEDY, SHARP):
        if "rejection" in method and params is SHARP:
            continue
        plain = [engine.generate(prompt, params) for prompt in PROMPTS]
        for outputs in (
            engine.generate(PROMPTS, params, method=method),
            [engine.generate(PROMPTS[0], params, method=method)],
        ):
            for expected, output in zip(plain, outputs, strict=False):
                assert output.token_ids == expected.token_ids
                assert output.stats.lossless
                assert output.stats.drafted, "something was drafted"


def test_drafts_in_eight_bits_are_mostly_accepted(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny-llama")
    stats = engine.generate(PROMPTS[2], GREEDY, method="quantized").stats
    assert stats.accepted / stats.drafted > 0.5
    assert stats.layers_kept == stats.layers


def test_the_copy_is_made_before_the_cache_takes_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from skipjack.runtime import engine as engine_module

    order: list[str] = []
    size = engine_module.cache_size
    monkeypatch.setattr(engine_module, "cache_size", lambda *args: (order.append("cache"), size(*args))[1])
    made_by = engine_module.quantised
    monkeypatch.setattr(engine_module, "quantised", lambda model: (order.append("copy"), made_by(model))[1])
    Engine(*made(), method="swift:draft_weights=int8,skip_attention=1").close()
    assert order == ["copy", "cache"]
    order.clear()
    Engine(*made(), method="swift:skip_attention=1").close()
    assert order == ["cache"]


def test_a_draft_without_eight_bits_makes_no_copy() -> None:
    with Engine(*made()) as engine:
        model = engine._loaded()[0]
        engine.generate(PROMPTS[0], GREEDY, method="swift:skip_attention=1")
        assert model not in quantised_module._MADE
        engine.generate(PROMPTS[0], GREEDY, method="quantized")
        assert model in quantised_module._MADE


def test_a_draft_costs_what_its_own_passes_took() -> None:
    own = Costs(4, full=1.0, tiles=((8, 0.1),), per_tile=0.5, fixed=0.2)
    light = Costs(4, full=0.3, tiles=((8, 0.05),), per_tile=0.4, fixed=0.1)
    both, plan = replace(own, drafter=light), LayerPlan.full(2)
    assert both.verify(8) == own.verify(8)
    assert both.draft(plan, 1) == light.draft(plan, 1) == pytest.approx(0.35)
    assert replace(both, pace=2.0).draft(plan, 1) == pytest.approx(0.7), "what slows the one slows the other"


@pytest.mark.parametrize("graphs", [False, True])
def test_auto_drafts_in_eight_bits_by_all_layers_and_searches_nothing(
    graphs: bool, engine_of: Callable[..., Engine]
) -> None:
    method = auto.Auto(registry.parse("auto:draft_weights=int8").options, 4)
    assert method.quantised
    assert not method._swift.plan.skipped
    assert method._swift.phase() == "acceleration"
    assert [way.name for way in method._stretches.ways] == ["plain", "lookup", "skip set"]
    engine = engine_of(graphs)
    output = engine.generate(PROMPTS[2], replace(GREEDY, max_tokens=100), method="auto:draft_weights=int8,max_loss=1")
    assert not [event for event in output.stats.events if event["kind"] not in ("decision",)]


def test_auto_drafts_in_eight_bits_from_the_start_and_leaves_what_is_never_accepted() -> None:
    """The cost model says that they pay: 19 of 20 tokens are expected to be right, and then none of them is."""
    method = auto.Auto(registry.parse("auto:draft_weights=int8,max_loss=0").options, 4)
    light = Costs(8, full=0.5, tiles=((8, 0.0),), per_tile=1.0, fixed=0.1)
    costs = Costs(8, full=1.0, tiles=((8, 0.1),), per_tile=1.0, fixed=0.2, drafter=light)
    method._choose(method.choices(costs, 1, 100))
    assert (method._choice.name, method._why) == ("skip set", "predicted fastest")
    assert method._choice.drafted > 3
    assert method._choice.loss < 0
    own = auto.Auto(registry.parse("auto:max_loss=0").options, 4)
    own._choose(own.choices(replace(costs, drafter=None), 1, 100))
    assert own._choice.name == "plain", "of layers left out nobody knows before"
    for _ in range(20):
        method._skips.observe(7, 0)
    method._choose(method.choices(costs, 1, 100))
    assert method._choice.name == "plain"


def test_another_number_of_bits_is_refused() -> None:
    with pytest.raises(RequestError, match="option draft_weights expects own or int8, got 'int4'"):
        registry.parse("swift:draft_weights=int4")
