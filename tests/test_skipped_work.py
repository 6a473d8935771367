"""Work that is skipped is not done: products, attention and bytes on the CPU, and every load of the Triton kernels."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skipjack import Engine, SamplingParams
from skipjack.bench.forced_routes import forced, layer_bytes
from skipjack.kernels.ops import TORCH
from skipjack.kernels.reference import dense, packed
from skipjack.kernels.values import Matrix, Split
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.cache import KVCache
from skipjack.runtime.model import Model
from skipjack.runtime.routes import Routes
from skipjack.runtime.rows import one_sequence

LAYERS, ROUTED = 4, (2, 3)
SKIPPED = {"attention keys", "encoder", "adapter up", "adapter down"}
RAN = {"attention keys", "encoder", "queries", "output", "up", "down"}


def model(ops: Any, dtype: torch.dtype = torch.float32) -> Model:
    fields = synthetic_config("routed-tiny") | {"num_hidden_layers": LAYERS, "routing_layers": list(ROUTED)}
    config = ModelConfig.parse(fields, "routed-tiny")
    return Model(config, synthetic_weights(config, 0, dtype, 0.3), ops)


def matrices(model: Model, layer: int) -> dict[str, Matrix]:
    """A layer's weights by name; the queries apart only where they lie apart."""
    own = model.layers[layer]
    named = {"output": own.output, "up": own.up, "down": own.down}
    if isinstance(own.qkv, Split):
        named |= {"queries": own.qkv.upper, "attention keys": own.qkv.lower}
    routed = model.routed.get(layer)
    if routed is not None:
        named |= {"encoder": routed.router.encoder}
        named |= {"adapter up": routed.adapter_up, "adapter down": routed.adapter_down}
    return named


def run(model: Model, tokens: list[int], skipped: tuple[int, ...] | None, tile: int = 8) -> tuple[Tensor, Routes]:
    """One pass over the tokens of a sequence; `skipped` layers are skipped by all and the others by none."""
    cache, routes = model.new_cache(2), Routes()
    rows = one_sequence(tokens, 0, cache.reserve(len(tokens)), tile, model.device)
    with torch.inference_mode():
        if skipped is None:
            return model.forward(rows, cache, model.full, routes=routes), routes
        with forced(model, skipped):
            return model.forward(rows, cache, model.full, routes=routes), routes


class Products:
    """Every product of the torch table, by weight: rows it was computed for; and calls of attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: Counter[int] = Counter()
        self.bytes = self.attention = 0
        product, attention = packed.product, dense._attention

        def counted(x: Tensor, weight: Matrix, *rest: Any) -> Tensor:
            self.rows[id(weight)] += x.shape[0]
            self.bytes += weight.rows * weight.columns * x.itemsize
            return product(x, weight, *rest)

        def attended(*arguments: Any, **options: Any) -> Any:
            self.attention += 1
            return attention(*arguments, **options)

        monkeypatch.setattr(packed, "product", counted)
        monkeypatch.setattr(dense, "_attention", attended)

    def forget(self) -> None:
        """What is tried with a new model is not the work of a pass."""
        self.rows.clear()
        self.bytes = self.attention = 0


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return Products(monkeypatch)


@pytest.mark.parametrize("skipped", [(), (3,), (2, 3)])
def test_a_skipped_layer_costs_its_keys_router_and_adapter_alone(products: Products, skipped: tuple[int, ...]) -> None:
    routed = model(TORCH)
    tile = routed.tile(1)
    products.forget()
    run(routed, [5], skipped)
    for layer in ROUTED:
        done = {name for name, weight in matrices(routed, layer).items() if products.rows[id(weight)]}
        assert done == (SKIPPED if layer in skipped else RAN)
        assert {products.rows[id(matrices(routed, layer)[name])] for name in done} == {tile}
    assert products.attention == LAYERS - len(skipped)


def test_bytes_fall_as_the_bench_says(products: Products) -> None:
    routed = model(TORCH)
    routed.tile(1)
    read = []
    for skipped in ((), (2,), (2, 3)):
        before = products.bytes
        run(routed, [5], skipped)
        read.append(products.bytes - before)
    ran, left = layer_bytes(routed.config, 4)
    assert read[0] - read[1] == read[1] - read[2] == ran - left > 0
    assert left < ran / 3


def test_only_the_rows_that_run_are_computed(products: Products) -> None:
    routed = model(TORCH)
    tokens = [(7 * i) % 500 + 3 for i in range(100)]
    tile = routed.tile(len(tokens))
    assert tile is not None
    products.forget()
    _, routes = run(routed, tokens, None)
    for layer, route in routes.items():
        named = matrices(routed, layer)
        ran, skipped = (-(-int(mask.sum()) // tile) * tile for mask in (route.run, route.skip))
        assert 8 < ran < 96
        for name in ("queries", "output", "up", "down"):
            assert products.rows[id(named[name])] == ran
        for name in ("adapter up", "adapter down"):
            assert products.rows[id(named[name])] == skipped
        for name in ("attention keys", "encoder"):
            assert products.rows[id(named[name])] == -(-100 // tile) * tile


def test_keys_do_not_depend_on_who_runs() -> None:
    routed, tokens = model(TORCH, torch.bfloat16), [5, 9, 77, 31, 8, 2]
    written = []
    for skipped in ((), (2,)):
        cache = routed.new_cache(1)
        rows = one_sequence(tokens, 0, cache.reserve(6), 8, routed.device)
        with forced(routed, skipped):
            routed.forward(rows, cache, routed.full)
        written.append((cache.keys[2].clone(), cache.values[2].clone()))
    assert torch.equal(written[0][0], written[1][0])
    assert torch.equal(written[0][1], written[1][1])
    assert written[0][0].any()


def test_without_keys_of_skipped_tokens_a_layer_keeps_those_that_run_in_order() -> None:
    routed, tokens = model(TORCH), [(7 * i) % 500 + 3 for i in range(40)]
    both: list[KVCache] = []
    for kept in (None, torch.zeros(2, 1, dtype=torch.int64)):
        cache, routes = routed.new_cache(1), Routes()
        rows = one_sequence(tokens, 0, cache.reserve(40), 8, routed.device)
        routed.forward(rows, cache, routed.full, routes=routes, kept=kept)
        both.append(cache)
        if kept is not None:
            assert kept[:, 0].tolist() == [int(route.run.sum()) for route in routes.values()]
            count = int(kept[0, 0])
            assert 0 < count < 40
            assert torch.equal(cache.keys[2, 1, :, :count], both[0].keys[2, 1, :, :40][:, routes[2].run])
            assert not cache.keys[2, 1, :, count:].any()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The addresses that kernels load from in Triton's interpreter, masked lanes left out."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    addresses: list[np.ndarray] = []
    load = interpreter.InterpreterBuilder.create_masked_load

    def noted(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses.append(np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", noted)
    return addresses


def touched(addresses: list[np.ndarray], tensor: Tensor) -> int:
    """How many elements of the tensor's memory were loaded."""
    low = tensor.data_ptr()
    high = low + tensor.numel() * tensor.itemsize
    return len(np.unique(np.concatenate([a[(a >= low) & (a < high)] for a in addresses])))


def interpreted() -> Model:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("loads are watched in the interpreter")
    from skipjack.kernels.triton_ops import TRITON

    return model(TRITON)


def test_kernels_load_nothing_of_a_layer_no_row_runs(loaded: list[np.ndarray]) -> None:
    routed = interpreted()
    cache = routed.new_cache(1)
    rows = one_sequence([5, 9], 0, cache.reserve(2), 8, routed.device)
    with forced(routed, (3,)):
        routed.forward(rows, cache, routed.full)
    queries = routed.config.num_heads * routed.config.head_dim
    for layer in ROUTED:
        ran, own = layer != 3, matrices(routed, layer)
        projection = routed.layers[layer].qkv
        assert isinstance(projection, Matrix)
        assert touched(loaded, projection.data[:queries]) == (projection.data[:queries].numel() if ran else 0)
        assert touched(loaded, projection.data[queries:]) == projection.data[queries:].numel()
        for name in ("output", "up", "down"):
            assert touched(loaded, own[name].data) == (own[name].data.numel() if ran else 0), name
        for name in ("adapter up", "adapter down"):
            assert bool(touched(loaded, own[name].data)) != ran, name
        for cached in (cache.keys, cache.values):
            assert bool(touched(loaded, cached[layer])) == ran
            assert cached[layer, 1, :, :2].any()


def test_poison_in_what_is_skipped_reaches_nothing() -> None:
    routed = interpreted()
    clean, _ = run(routed, [5, 9, 12], (2,))
    queries = routed.config.num_heads * routed.config.head_dim
    layer = routed.layers[2]
    assert isinstance(layer.qkv, Matrix)
    for data in (layer.qkv.data[:queries], layer.output.data, layer.up.data, layer.down.data):
        data.fill_(torch.nan)
    poisoned, _ = run(routed, [5, 9, 12], (2,))
    assert torch.equal(poisoned, clean)
    assert run(routed, [5, 9, 12], ())[0].isnan().any()


class HostReads(TorchDispatchMode):
    """Counts the places where the host would wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [False, True])
def test_a_routed_pass_on_the_kernels_reads_nothing_on_the_host(kept: bool) -> None:
    routed = interpreted()
    cache, routes = routed.new_cache(1), Routes()
    rows = one_sequence([5, 9, 12], 0, cache.reserve(3), 8, routed.device)
    counts = torch.zeros(2, 1, dtype=torch.int64) if kept else None
    with torch.inference_mode(), HostReads() as mode:
        routed.forward(rows, cache, routed.full, routes=routes, kept=counts)
    assert len(routes) == 2
    assert not mode.found
    with HostReads() as mode:
        int(rows.token[0])
    assert mode.found


@pytest.mark.parametrize("kv", ["own", "none"])
def test_the_kernels_give_the_tokens_and_layers_of_the_torch_table(kv: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    params, results = SamplingParams(max_tokens=3, ignore_eos=True), []
    prompts = [[5, 9, 11, 130], [7, 8, 9, 10, 11]][: 2 if kv == "own" else 1]
    fields = synthetic_config("routed-tiny") | {"num_hidden_layers": LAYERS, "routing_layers": list(ROUTED)}
    config = ModelConfig.parse(fields, "routed-tiny")
    for backend in ("triton", "torch"):
        weights = synthetic_weights(config, 0, torch.float32, 0.3)
        engine = Engine(config, weights, method=f"flexidepth:kv={kv}", backend=backend, cache_tokens=512)
        outputs = engine.generate(prompts, params)
        results.append([(o.token_ids, o.stats.layers_per_token, o.stats.executed_skips) for o in outputs])
    assert results[0] == results[1]
