"""What is on the device and what on the host, where both are a CPU.

Tensors made with `DEVICE`, and what follows from them, count as the device's; all others are of the host. An operator
that is given both would fail on a GPU. Searches, prompts, rounds that the host steers and what it puts into those of
the device are run so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton", reason="Triton is not installed")

from skipjack import Engine, SamplingParams
from skipjack.bench.gpu_setting import CAPTURED
from skipjack.kernels.ops import TORCH, Ops
from skipjack.kernels.values import Matrix
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import choices
from skipjack.runtime.graphs import Graphs

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
# Of no use here, or of a table's own.
BARE = ("describe", "pads", "filled", "join")
MORE = [
    ("tiny", "static:skip=2,kv=fill"),
    ("tiny", "layerskip:exit_layer=3,verify=false"),
    ("tiny-mistral", "swift:skip_mlp=1,num_draft_tokens=3,draft_vocab=64,tree=true"),
    ("tiny-bloom", "swift:skip_mlp=1,num_draft_tokens=3"),
    ("tiny-smollm3", "kangaroo:adapter=untrained,exit_layer=1,num_draft_tokens=3"),
]
# What `Calls` does otherwise than PyTorch.
CHANGED = {Tensor.device.__get__, torch.tensor, torch.as_tensor, Tensor.cpu, Tensor.to}
CHOICE: dict[str, Any] = {"temperature": 0.8, "repetition_penalty": 1.2, "min_tokens": 5, "logprobs": 3}


class Mixed(Exception):
    """An operator was given tensors of the device and of the host."""


class Places:
    """Whose memory is the device's."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def has(self, tensor: Tensor) -> bool:
        """Packed weights, whose memory PyTorch does not show, are the device's."""
        if tensor.layout != torch.strided:
            return True
        found = self._known.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def put(self, tree: Any, place: torch.device = DEVICE) -> None:
        for tensor in tensors(tree):
            if tensor.layout == torch.strided:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._known.pop(reference.cdata, None)
                if place == DEVICE:
                    self._known[reference.cdata] = reference


class Operators(TorchDispatchMode):
    """Fails where an operator mixes; what it makes is where its operands are, or where it was asked to be."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = operator._schema.name, kwargs or {}
        result, given = operator(*args, **kwargs), [*tensors((args, kwargs))]
        # What is copied may be anywhere, and so may numbers and indices.
        if name == "aten::copy_":
            return result
        if (asked := kwargs.get("device")) is not None:
            self._places.put(result, asked)
            return result
        here = [one for one in given if self._places.has(one)]
        operands = [args[0]] if name.startswith("aten::index") else given
        if here and any(one.dim() and not self._places.has(one) for one in tensors(operands)):
            raise Mixed(name)
        if here:
            self._places.put(result)
        return result


class Calls(TorchFunctionMode):
    """Tensors say where they are, and go where they are sent, which on a CPU would be no step at all."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in CHANGED:
            return function(*args, **kwargs)
        if function == Tensor.device.__get__:
            return DEVICE if self._places.has(args[0]) else HOST
        if function in (torch.tensor, torch.as_tensor):
            made = function(*args, **kwargs)
            self._places.put(made, torch.device(kwargs.get("device") or HOST))
            return made
        if function == Tensor.cpu:
            return self._sent(args[0], HOST)
        given = (*args[1:], *kwargs.values())
        if (place := next((one for one in given if isinstance(one, (torch.device, str))), None)) is None:
            return function(*args, **kwargs)
        dtype = next((one for one in given if isinstance(one, torch.dtype)), args[0].dtype)
        return self._sent(args[0].to(dtype), torch.device(place))

    def _sent(self, tensor: Tensor, place: torch.device) -> Tensor:
        made = tensor.clone()
        self._places.put(made, place)
        return made


def tensors(tree: Any) -> Iterator[Tensor]:
    """Those in tuples, lists, dictionaries and weights; PyTorch's own walk takes longer than the operators."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for one in tree:
            yield from tensors(one)
    elif isinstance(tree, dict):
        yield from tensors([*tree.values()])
    elif isinstance(tree, Matrix):
        yield from tensors([tree.data, tree.scale])


def on_the_device(places: Places) -> Ops:
    """The torch table, whose ops are not looked into: kernels on a GPU, which take what is there."""

    def run(name: str, op: Callable[..., Any], *args: Any, **options: Any) -> Any:
        # The device writes its reports into memory of the host.
        handed = (*args[:5], *args[6:]) if name == "commit" else args
        if any(one.dim() and not places.has(one) for one in tensors((handed, options))):
            raise Mixed(name)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            result = op(*args, **options)
        places.put(result)
        return result

    names = [field.name for field in fields(Ops) if callable(getattr(TORCH, field.name)) and field.name not in BARE]
    return replace(TORCH, **{name: partial(run, name, getattr(TORCH, name)) for name in names})


@contextmanager
def placed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    places = Places()
    table = on_the_device(places)
    monkeypatch.setattr(choices, "table_of", lambda *_: table)
    # Another thread would not be looked at.
    monkeypatch.setattr(Graphs, "expect", lambda *_: True)
    with Calls(places), Operators(places):
        yield places


def engine(shape: str, method: str, places: Places, *, graphs: bool) -> Engine:
    config = ModelConfig.parse(synthetic_config(shape), shape)
    weights = synthetic_weights(config, 1, torch.float32)
    places.put([getattr(weights, field.name) for field in fields(weights)])
    return Engine(config, weights, method=method, backend="torch", graphs=graphs, cache_tokens=2048)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("shape", "method"), [*((shape, name) for shape, names in CAPTURED.items() for name in names), *MORE]
)
def test_the_device_and_the_host_never_meet_in_an_operator(
    shape: str, method: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = any(option in method for option in ("window", "interval", "del", "auto"))
    prompts = [[(7 * i + j) % 500 + 3 for j in range(4 + 5 * i)] for i in range(2)]
    with placed(monkeypatch) as places, engine(shape, method, places, graphs=graphs) as own:
        assert own._loaded()[0].device == DEVICE
        for choice in ({}, CHOICE):
            params = SamplingParams(max_tokens=30 if searches else 8, seed=5, ignore_eos=True, **choice)
            assert len(own.generate(prompts, params)) == len(prompts)
        if graphs:
            streams = [own.stream(prompt, params) for prompt in prompts]
            while [chunk for stream in streams if (chunk := next(stream, None))]:
                pass


@pytest.mark.parametrize(
    "breach",
    [
        lambda x: x + torch.arange(4),
        lambda x: torch.cat([x, torch.zeros(4, dtype=torch.int64)]),
        lambda x: torch.where(x > 0, x.cpu(), 0),
        lambda x: (x + 1)[:2] + x.to("cpu")[:2],
        lambda x: x * torch.tensor([1, 2, 3, 4], device=HOST),
        lambda x: torch.stack([x, torch.tensor([1, 2, 3, 4])]),
    ],
)
def test_an_operator_that_is_given_both_is_found(
    breach: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch), pytest.raises(Mixed):
        breach(torch.zeros(4, dtype=torch.int64, device=DEVICE))


def test_an_op_that_is_given_memory_of_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with placed(monkeypatch) as places, pytest.raises(Mixed, match="row_map"):
        on_the_device(places).row_map(torch.ones(2, 3, dtype=torch.bool))


def test_what_is_sent_and_what_follows_from_it_is_where_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with placed(monkeypatch):
        x = torch.tensor([1, 2, 3]).to(DEVICE)
        assert (x[None] * 2).device == torch.zeros_like(x).device == x.new_zeros(2).device == DEVICE
        assert x.cpu().device == torch.arange(3).device == torch.tensor(x.tolist()).device == HOST
        assert (x.cpu() + torch.arange(3)).tolist() == [1, 3, 5]
        x.copy_(torch.arange(3))
        assert (x + torch.tensor(1)).device == DEVICE
