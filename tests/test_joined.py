"""Sub-layers in one call against the same ones operation by operation, bit for bit, and against float64."""

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="numba is not installed")

from skipjack import Engine, SamplingParams
from skipjack.kernels.cpu import joined, openmp
from skipjack.kernels.cpu.compiled import COMPILED
from skipjack.kernels.ops import TORCH
from skipjack.kernels.values import Tree
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import Weights
from skipjack.runtime.cache import KVCache
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.request import Output
from skipjack.runtime.rows import Rows, one_sequence

BIASES = {"attention_bias": True, "mlp_bias": True}
SMALL = {"num_hidden_layers": 4, "head_dim": 32, "hidden_size": 96, "intermediate_size": 80}
FAMILIES = {
    "llama": ("tiny-llama", SMALL),
    "llama, biases, wide heads": ("tiny-llama", SMALL | BIASES | {"head_dim": 48, "intermediate_size": 176}),
    "mistral, window": ("tiny-mistral", SMALL),
    "qwen2, some windows": (
        "tiny-qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "qwen3": ("tiny-qwen3", SMALL | {"head_dim": 64}),
    "smollm3, some rotations": ("tiny-smollm3", SMALL),
    "bloom": ("tiny-bloom", {"n_layer": 4, "hidden_size": 96, "n_head": 3}),
}  # fmt: skip


def weights_of(family: str, dtype: torch.dtype) -> tuple[ModelConfig, Weights]:
    shape, fields = FAMILIES[family]
    config = ModelConfig.parse(synthetic_config(shape) | fields, shape)
    weights = synthetic_weights(config, 0, dtype, 0.8)
    generator = torch.Generator().manual_seed(3)
    for name in ("qkv_bias", "output_bias", "up_bias", "down_bias", "attention_norm_bias", "mlp_norm_bias"):
        tensor = getattr(weights, name)
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return config, weights


def model_of(family: str, dtype: torch.dtype, ops: Any = COMPILED) -> Model:
    config, weights = weights_of(family, dtype)
    return Model(config, weights, ops)


def batch(width: int, tree: bool) -> Rows:
    """Rows of two sequences after 150 and 70 tokens and one of none; the second may be a tree."""
    ahead = [150 + i for i in range(width)]
    position = torch.tensor([*ahead, 0, 70, 71, 71, 72])
    sequence = torch.tensor([0] * width + [-1] + [1] * 4)
    slot = torch.tensor([*ahead, 0, 70, 71, 72, 73])
    paths = [[at] for at in ahead] + [[0], [70], [70, 71], [70, 72], [70, 72, 73]]
    filled = torch.tensor([path + [10**9] * (3 - len(path)) for path in paths])
    length = torch.tensor([*ahead, 0, 70, 70, 70, 70])
    table = torch.arange(1, 9).view(2, 4)
    token = torch.arange(7, 7 + len(position))
    if not tree:
        return Rows(token[:-2], position[:-2], sequence[:-2], table, 8)
    return Rows(token, position, sequence, table, 8, slot=slot, tree=Tree(length, filled))


def filled(model: Model) -> KVCache:
    cache = model.new_cache(8)
    cache.reserve(8 * cache.page_size)
    generator = torch.Generator().manual_seed(5)
    for part in (cache.keys, cache.values):
        part.copy_(torch.randn(part.shape, generator=generator))
    return cache


def run(model: Model, rows: Rows, plan: LayerPlan, streams: bool) -> list[Tensor]:
    cache, kept = filled(model), [] if streams else None
    hidden = model.forward(rows, cache, plan, streams=kept)
    return [hidden, cache.keys, cache.values, *(kept or [])]


def one_by_one(model: Model, *given: Any) -> list[Tensor]:
    joined, model.joined = model.joined, None
    try:
        return run(model, *given)
    finally:
        model.joined = joined


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_sublayers_have_the_bits_of_single_operations(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    assert model.joined is not None
    full = model.full
    plans = full, full.without(attention=[1], mlp=[2, 3]), full.early_exit(1), full.without(range(4), range(4))
    for width, tree, streams in ((1, False, False), (8, True, True), (37, False, True)):
        for plan in plans:
            given = batch(width, tree), plan, streams
            got, expected = run(model, *given), one_by_one(model, *given)
            assert len(got) == len(expected) == 3 + streams * (len(plan.sublayers) + 1)
            assert all(map(torch.equal, got, expected))
            assert not got[0].isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_sublayers_are_right(family: str) -> None:
    config, weights = weights_of(family, torch.float32)
    wide = {name: part.double() for name, part in vars(weights).items() if isinstance(part, Tensor)}
    model, oracle = Model(config, weights, COMPILED), Model(config, replace(weights, **wide), TORCH)
    assert oracle.joined is None
    for tree in (False, True):
        got = run(model, batch(5, tree), model.full, True)
        expected = run(oracle, batch(5, tree), model.full, True)
        real = batch(5, tree).sequence >= 0
        for mine, other in zip(got[3:], expected[3:], strict=True):
            assert (mine.double() - other)[real].norm() < 1e-5 * other[real].norm()


def test_a_stream_that_is_not_contiguous_is_changed_in_place() -> None:
    model = model_of("llama", torch.float32)
    rows = batch(4, False)
    with torch.inference_mode():
        cache = filled(model)
        laid = model.lay(rows, cache)
        x = model.embed(laid)
        apart = torch.cat([x, x], dim=1)[:, : x.shape[1]]
        model.run(laid, cache, model.full, x)
        model.run(laid, filled(model), model.full, apart)
    assert torch.equal(apart, x)


@pytest.mark.usefixtures("unit")
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threads = model_of("qwen3", torch.bfloat16), torch.get_num_threads()
    given = batch(8, True), model.full, True
    with monkeypatch.context() as patch:
        patch.setattr(openmp, "team", lambda: 0)
        alone = run(model, *given)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(model, *given), alone))
    finally:
        torch.set_num_threads(threads)


def test_a_pass_without_memory_says_so_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", torch.float32)
    given = batch(8, False), model.full, True
    expected, whole = run(model, *given), joined.through

    def through(arguments: int, team: int) -> None:
        ctypes.c_int64.from_address(arguments + 8 * 5).value = 1 << 44
        whole(arguments, team)

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(joined, "through", through)
            with pytest.raises(MemoryError):
                run(model, *given)
        assert all(map(torch.equal, run(model, *given), expected))


def test_what_is_not_compiled_is_not_joined() -> None:
    assert model_of("llama", torch.float16).joined is None
    assert model_of("llama", torch.float64).joined is None
    assert model_of("llama", torch.float32, TORCH).joined is None
    for shape in ("tiny-llama", "routed-tiny"):
        config = ModelConfig.parse(synthetic_config(shape), shape)
        assert Model(config, synthetic_weights(config, 0, torch.float32), COMPILED).joined is None


def test_a_prompt_is_joined_too() -> None:
    model = model_of("mistral, window", torch.bfloat16)
    tokens = torch.randint(3, 500, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    rows = one_sequence(tokens, 0, list(range(1, 6)), COMPILED.prefill_tile, model.device, prompt=300)
    got, expected = run(model, rows, model.full, False), one_by_one(model, rows, model.full, False)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        "skipdecode:most=7,least=2,length=9",
        "calm:threshold=0.95,least=2",
        "calm:threshold=0.9,least=1,interval=3",
        "calm:threshold=0.05,measure=softmax,least=1",
        "unified:speedup=2",
        "static:skip=2+5,kv=fill",
    ],
)
def test_lossy_methods_have_the_same_tokens_by_one_call_as_by_many(
    monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    """Their steps take other ways where a pass without a mask is one call: alone, in step with others, and apart."""
    config = ModelConfig.parse(synthetic_config("tiny-llama") | SMALL | {"num_hidden_layers": 8}, "tiny-llama")
    weights = synthetic_weights(config, 0, dtype, 0.3)
    prompts = [[5, 9, 200, 31], [7] * 3, list(range(20, 31)), [400, 3, 3, 17, 250, 8]]
    params = SamplingParams(max_tokens=14, stop_token_ids=range(0, 512, 13))
    with Engine(config, weights, max_sequences=3) as whole, Engine(config, weights, max_sequences=3) as apart:
        assert whole._loaded()[0].joined is not None
        monkeypatch.setattr(apart._loaded()[0], "joined", None)
        expected = [told(apart.generate(prompt, params, method=method)) for prompt in prompts]
        assert [told(whole.generate(prompt, params, method=method)) for prompt in prompts] == expected
        assert [told(output) for output in whole.generate(prompts, params, method=method)] == expected


def told(output: Output) -> tuple[list[int], tuple[float, ...], int]:
    return output.token_ids, output.stats.layers_per_token, output.stats.executed_skips
