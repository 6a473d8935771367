import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Triton reads this when a kernel is defined, so it stands before the first import of one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from skipjack import Engine
from skipjack.bench import interpreter
from skipjack.kernels.ops import TORCH, Ops
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import depths
from skipjack.runtime.request import Output

interpreter.mend()


# Their many tests look at what one long process has found: a worker that took some of them would run another.
_FIRST = ("test_warm_up.py", "test_gate.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name not in _FIRST)


def _from_environment(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of conformance cases."""
    return _from_environment("SKIPJACK_GOLDEN")


@pytest.fixture(scope="session")
def prompts_file() -> Path:
    """A JSON-lines file of prompts with the fields question_id, category and turns."""
    return _from_environment("SKIPJACK_PROMPTS")


@pytest.fixture(scope="session")
def synthetic() -> Callable[..., Engine]:
    """Engines over small random models, one for each choice of the arguments, shared by the tests."""

    @cache
    def engine(
        shape: str = "tiny",
        dtype: torch.dtype = torch.float32,
        late_scale: float = 0.3,
        vocab: int | None = None,
        **options: Any,
    ) -> Engine:
        fields = synthetic_config(shape) | ({"vocab_size": vocab} if vocab else {})
        config = ModelConfig.parse(fields, shape)
        return Engine(config, synthetic_weights(config, 0, dtype, late_scale), **options)

    return engine


@pytest.fixture(scope="session")
def engine_of() -> Callable[..., Engine]:
    """A small engine of a test's own, with rounds of the host or, with `graphs`, of the device."""

    def of(graphs: bool, shape: str = "tiny", dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
        config = ModelConfig.parse(synthetic_config(shape), shape)
        return Engine(config, synthetic_weights(config, 0, dtype, 0.1), graphs=graphs, **options)

    return of


@pytest.fixture(scope="module", params=[False, True], ids=["host", "device"])
def engine(request: pytest.FixtureRequest, engine_of: Callable[..., Engine]) -> Engine:
    """An engine that the tests of a module share."""
    return engine_of(request.param)


@pytest.fixture(params=["torch", "compiled"])
def table(request: pytest.FixtureRequest) -> Ops:
    """Either op table of the CPU; the compiled one where numba is installed."""
    if request.param == "torch":
        return TORCH
    pytest.importorskip("numba", reason="numba is not installed")
    from skipjack.kernels.cpu.compiled import COMPILED

    return COMPILED


@pytest.fixture(params=["triton", "torch", "compiled"])
def enter(request: pytest.FixtureRequest, poison: Callable[[ModuleType], None]) -> Callable[..., Any]:
    """The op that lays out the rows of a pass, of every table that runs here."""
    from skipjack.kernels.reference import rounds as reference_rounds

    if request.param == "torch":
        return reference_rounds.enter
    if request.param == "triton":
        from skipjack.kernels.enter import enter

        return enter
    if torch.cuda.is_available():
        pytest.skip("the compiled table is of the CPU")
    pytest.importorskip("numba", reason="numba is not installed")
    from skipjack.kernels.cpu import enter as cpu_enter

    poison(cpu_enter)
    return cpu_enter.enter


def _units() -> list[str]:
    try:
        from skipjack.kernels.cpu import matrix_unit
    except ImportError:
        return ["pairs"]
    return ["unit", "pairs"] if matrix_unit.permitted() else ["pairs"]


@pytest.fixture(params=_units())
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products of bfloat16 by the processor's matrix unit, where there is one, and without it."""
    if request.param == "pairs" and "unit" in _units():
        monkeypatch.setattr("skipjack.kernels.cpu.matrix_unit.permitted", lambda: False)
    return request.param


@pytest.fixture(scope="session")
def demo() -> Engine:
    """The packaged model, in its own dtype."""
    pytest.importorskip("gguf", reason="the demo model's packages are not installed")
    return Engine.load("demo")


class Audit:
    """An engine's op table that knows which slots every layer has written, and fails where another is read.

    It sees operations that are called one by one, and has them called so where they would be joined.
    `ran` lists the sub-layers that were run, in order, each with the number of rows it ran for; `reads` counts slots
    read. A page that is reserved anew holds nothing; a fork and the compaction of a tree carry what they copy.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        model, kv = engine._loaded()
        self.ran: list[tuple[int, int]] = []
        self.reads = 0
        # The layers of those that have slots in the cache's pages beside the model.
        self.annexes: list[int] = []
        self.written = torch.zeros(kv.keys.shape[0], kv.keys.shape[1], kv.page_size, dtype=torch.bool)
        self._size = kv.page_size
        self._table, self._reserve, self._fork, self._copy = model.ops, kv.reserve, kv.forked, kv.copy
        self._layers = {kv.keys[i].data_ptr(): i for i in range(len(kv.keys))}
        self._mlps = {id(layer.up): i for i, layer in enumerate(model.layers)}
        self._passes: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
        self._real = torch.empty(0, dtype=torch.bool)
        watched = ("qkv_rope_append", "attend", "fill_kv", "compact", "linear")
        ops = replace(model.ops, index=self._index, **{name: self._watch(name) for name in watched})
        monkeypatch.setattr(model, "ops", ops)
        monkeypatch.setattr(model, "joined", None)
        monkeypatch.setattr(kv, "reserve", self._reserved)
        monkeypatch.setattr(kv, "forked", self._forked)
        monkeypatch.setattr(kv, "copy", self._copied)

    def _layer(self, keys: Any) -> int:
        """The number of a layer by its keys; those of an annex come after the model's own."""
        layer = self._layers.setdefault(keys.data_ptr(), len(self.written))
        if layer == len(self.written):
            self.annexes.append(layer)
            self.written = torch.cat([self.written, torch.zeros_like(self.written[:1])])
        return layer

    def _watch(self, name: str) -> Callable[..., Any]:
        op, note = getattr(self._table, name), getattr(self, f"_{name}")
        takes = signature(op)

        def watched(*args: Any, **options: Any) -> Any:
            given = takes.bind(*args, **options)
            given.apply_defaults()
            note(**given.arguments)
            return op(*args, **options)

        return watched

    def _index(self, *args: Any, **options: Any) -> Any:
        laid = self._table.index(*args, **options)
        given = signature(self._table.index).bind(*args, **options)
        given.apply_defaults()
        self._passes[laid], self._real = given.arguments, given.arguments["sequence"] >= 0
        return laid

    def _qkv_rope_append(self, keys: Any, slots: Any, active: Any, write: Any, **_: Any) -> None:
        layer, rows = self._layer(keys), slice(None) if write is None else write
        self.written[layer, slots.page[rows], slots.offset[rows]] = True
        self._real = slots.page > 0
        self._note(2 * layer, active)

    def _linear(self, weight: Any, active: Any, **_: Any) -> None:
        if id(weight) in self._mlps:
            self._note(2 * self._mlps[id(weight)] + 1, active)

    def _note(self, sublayer: int, active: Any) -> None:
        self.ran.append((sublayer, int((self._real if active is None else self._real & active).sum())))

    def _fill_kv(self, rows: Any, keys: Any, slots: Any, **_: Any) -> None:
        first = self._layers[keys.data_ptr()]
        for layer, count in enumerate(rows.count.tolist()):
            row = rows.row[layer, :count].long()
            self.written[first + layer, slots.page[row], slots.offset[row]] = True

    def _attend(self, keys: Any, index: Any, window: Any, active: Any, **_: Any) -> None:
        layer, laid = self._layer(keys), self._passes[index]
        tree, real = laid["tree"], laid["sequence"] >= 0
        for row in torch.nonzero(real if active is None else real & active).flatten().tolist():
            at = int(laid["position"][row])
            slot = torch.arange(0 if window is None else max(0, at - window + 1), at + 1)
            if tree is not None:
                depth = slot - tree.length[row]
                slot = torch.where(depth < 0, slot, tree.slot[row, depth.clamp(min=0)])
            page = laid["block_table"][laid["sequence"][row], slot // self._size]
            seen = self.written[layer, page, slot % self._size]
            self.reads += len(slot)
            assert seen.all(), f"layer {layer} reads slot {slot[~seen][0]}, which was never written there"

    def _compact(self, block_table: Any, path: Any, accepted: Any, length: Any, **_: Any) -> None:
        written = self.written.clone()
        for row, count in enumerate(accepted.tolist()):
            for depth in range(count + 1):
                here, there = int(length[row] + path[row, depth]), int(length[row]) + depth
                source, target = (block_table[row, slot // self._size] for slot in (here, there))
                self.written[:, target, there % self._size] = written[:, source, here % self._size]

    def _reserved(self, tokens: int, into: list[int] | None = None) -> list[int]:
        pages = self._reserve(tokens, into)
        self.written[:, pages] = False
        return pages

    @contextmanager
    def _forked(self, pages: list[int], length: int, tokens: int) -> Iterator[list[int]]:
        with self._fork(pages, length, tokens) as child:
            full, part = divmod(length, self._size)
            if part:
                self.written[:, child[full], :part] = self.written[:, pages[full], :part]
            yield child

    def _copied(self, source: list[int], target: list[int], tokens: int) -> None:
        self._copy(source, target, tokens)
        for slot in range(tokens):
            here, there = (pages[slot // self._size] for pages in (source, target))
            self.written[:, there, slot % self._size] = self.written[:, here, slot % self._size]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], Audit]:
    """Watch an engine until the test ends: `audit(engine)` fails a pass that reads a hole."""
    return lambda engine: Audit(engine, monkeypatch)


def _interrupted(work: Callable[[], Any], *functions: Any) -> Iterator[None]:
    """Do `work` with a KeyboardInterrupt at the first line of `functions` that it comes to, then at the second, …

    Between two lines is where the handler of a signal may raise. Yields after each.
    """
    codes = {inspect.unwrap(function).__code__ for function in functions}
    lines = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code not in codes:
            return None
        if event == "line":
            lines += 1
            if lines == cut:
                raise KeyboardInterrupt
        return trace

    for cut in itertools.count(1):
        lines, usual = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(usual)
        if lines < cut:
            assert cut > 10
            return
        yield


@pytest.fixture
def interrupted() -> Callable[..., Iterator[None]]:
    """`for line in interrupted(work, *functions)`: after each interrupt of `work`, at every line of functions."""
    return _interrupted


class Questions(TorchFunctionMode):
    """Notes what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
            self.asked.append(name)
        if name in ("__getitem__", "__setitem__", "index_put_") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for part in (args[1] if isinstance(args[1], tuple) else (args[1],))
        ):
            self.asked.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def questions() -> Questions:
    """A context that notes in `asked` what would make the host wait for a GPU."""
    return Questions()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Makes what a module's launchers allocate NaN, True or −1, so that what a kernel does not write is seen."""

    class Torch(ModuleType):
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
            filling = torch.nan if dtype.is_floating_point else True if dtype == torch.bool else -1
            return torch.empty(shape, dtype=dtype, device=device).fill_(filling)

        def empty_like(self, like: Tensor) -> Tensor:
            return self.empty(like.shape, like.dtype, like.device)

    return lambda module: monkeypatch.setattr(module, "torch", Torch("torch"))


@pytest.fixture
def whole_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of the device draft as far as the host's, however many of them there were."""
    monkeypatch.setattr(depths, "WINDOW", 10**9)


@pytest.fixture(scope="session")
def told() -> Callable[[Output], tuple[object, ...]]:
    """What rounds on the device and rounds the host steers must agree in."""

    def of(output: Output) -> tuple[object, ...]:
        stats = output.stats
        return (
            output.token_ids,
            output.finish_reason,
            stats.rounds,
            stats.drafted,
            stats.accepted,
            stats.bonus,
            stats.drafted_per_position,
            stats.accepted_per_position,
            stats.executed_skips,
            stats.layers_per_token,
            stats.weight_passes,
        )

    return of
