"""What the capture of a CUDA graph forbids, looked for without a GPU.

Rounds of the device run over tensors that have shapes and a device of their own but hold nothing: a value that the host
asks for, a shape that follows from values, and memory of the host fail, as they would in a capture. Kernels are not
launched; what they are given is looked at.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter

from skipjack import SamplingParams
from skipjack.bench.gpu_parts import CHOICES
from skipjack.bench.gpu_setting import CAPTURED
from skipjack.kernels import launch
from skipjack.kernels.ops import select
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import model as model_module
from skipjack.runtime.cache import KVCache
from skipjack.runtime.depths import cuts
from skipjack.runtime.influence import Change
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.adaskip import AdaSkip
from skipjack.runtime.methods.kangaroo import Kangaroo
from skipjack.runtime.model import Model
from skipjack.runtime.recipe import Recipe
from skipjack.runtime.round import State, device_round, device_steps
from skipjack.runtime.sequence import Sequence
from skipjack.runtime.stepwise import at_once

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are taken for launched in the interpreter")

NOWHERE = torch.device("meta")
# Beside what gpu-check captures: models whose passes differ, and what is skipped or drafted from otherwise.
MORE = [
    ("tiny-mistral", "swift:skip_mlp=1,num_draft_tokens=3,tree=true"),
    ("tiny-qwen3", "swift:skip_mlp=1,num_draft_tokens=3,draft_vocab=64"),
    ("tiny-bloom", "layerskip:exit_layer=1,num_draft_tokens=2,acceptance=rejection"),
    ("tiny-smollm3", "layerskip:exit_layer=1,verify=false"),
    ("tiny-smollm3", "kangaroo:adapter=untrained,exit_layer=1,num_draft_tokens=3"),
    ("tiny-mistral", "calm:least=1,interval=2"),
    ("tiny-bloom", "skipdecode:warm_up=2,least=2"),
    ("tiny-bloom", "adaskip:n=5,phase=decode"),
    ("tiny", "static:skip=1+2,kv=fill"),
    ("tiny-dmtd", "dmtd:prefill=cyclic,horizon=3,phase=absolute,history=shadow"),
]
# Known only once an engine is prepared: a keep-set, and a model that has been merged; both decode by one plan.
FITTED = {"shortgpt", "laco"}
CASES = [*((shape, method) for shape, methods in CAPTURED.items() for method in methods), *MORE]


class Forbidden(Exception):
    """A capture would have failed here, or would have frozen what was true then."""


class Capture(TorchDispatchMode):
    """Fails where a value is asked for, a shape follows from values, numbers are drawn, or a tensor is of the host."""

    ASKING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = operator._schema.name, [*tensors((args, kwargs))]
        # These are of one shape unless a mask says otherwise.
        indexing = name.startswith("aten::index")
        masked = indexing and any(one.dtype in (torch.bool, torch.uint8) for one in tensors(args[1]))
        if masked or (not indexing and any(tag in operator.tags for tag in self.ASKING)):
            raise Forbidden(name)
        result = operator(*args, **(kwargs or {}))
        if any(one.device != NOWHERE for one in (*given, *tensors(result))):
            raise Forbidden(f"{name}: memory of the host")
        return result


class Literals(TorchFunctionMode):
    """Fails where a tensor is made of the host's numbers, which no operator shows for one that holds nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor):
            raise Forbidden(function.__name__)
        return function(*args, **(kwargs or {}))


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Kernels run nowhere, by the rules of an H200; the tensors of the host that one may be given are listed here."""
    pinned: list[Tensor] = []

    def launched(executor: Any, *args: Any, **named: Any) -> None:
        assert all(extent > 0 for extent in executor.grid), executor.fn
        for one in tensors((args, named)):
            if one.device != NOWHERE and not any(one is known for known in pinned):
                raise Forbidden(f"{executor.fn.__name__}: memory of the host")

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(launch, "architecture", lambda: 90)
    monkeypatch.setattr(launch, "_nvidia", lambda: True)
    monkeypatch.setattr(model_module, "fingerprint", lambda weights: "")
    return pinned


@contextmanager
def captured() -> Iterator[None]:
    # Not in inference mode, where operators that are made of others arrive whole.
    with torch.no_grad(), Literals(), Capture():
        yield


@cache
def config_of(shape: str) -> ModelConfig:
    return ModelConfig.parse(synthetic_config(shape), shape)


@cache
def weights_of(shape: str) -> Any:
    made = synthetic_weights(config_of(shape), 0, torch.bfloat16)
    parts = {field.name: getattr(made, field.name) for field in fields(made)}
    return replace(made, **{name: part.to(NOWHERE) for name, part in parts.items() if isinstance(part, Tensor)})


def recipes_of(model: Model, method: str) -> Iterator[Recipe]:
    """Every recipe that the rounds of a method may have, however tokens are chosen, and those of masks."""
    config = model.config
    made = registry.parse(method).build(config)
    if isinstance(made, Kangaroo):
        at_once(made.prepare(model, None))  # Its recipes have the adapter.
    if isinstance(made, AdaSkip):
        made.learn(Change(torch.linspace(0, 1, 2 * config.num_layers), torch.ones(2 * config.num_layers)), NOWHERE)
    for fields_ in CHOICES:
        params = SamplingParams(max_tokens=20, **fields_)
        sequence = Sequence(0, 0, [5], params, 0, frozenset([3]), 64, None)
        for recipe in made.recipes([sequence]):
            for cut in cuts(recipe):
                chosen = cut.choosing([sequence], config.vocab_size)
                yield chosen
                if chosen.any_set is not None:
                    yield chosen.any_set


def run(model: Model, cache: KVCache, state: State, recipe: Recipe) -> None:
    if recipe.steps is None:
        device_round(model, cache, state, recipe)
    else:
        device_steps(model, cache, state, recipe.steps, recipe.sampled)


@pytest.mark.parametrize(("shape", "method"), CASES)
def test_a_round_of_the_device_can_be_captured(shape: str, method: str, unlaunched: list[Tensor]) -> None:
    model = Model(config_of(shape), weights_of(shape), select("triton"))
    cache, recipes = model.new_cache(4), {*recipes_of(model, method)}
    assert recipes
    for recipe, sequences in product(recipes, (1, 4)):
        state = State.empty(model, recipe, sequences, 2)
        unlaunched[:] = [state.report]
        with torch.no_grad():
            run(model, cache, state, recipe)  # As the one that compiles: what is made once is there now.
        with captured():
            run(model, cache, state, recipe)


def test_every_method_is_captured() -> None:
    names = {registry.parse(method).name for _, method in CASES}
    assert names | FITTED == set(registry.names())


@pytest.mark.parametrize(
    "breach",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: int(x.sum()),
        lambda x: torch.equal(x, x),
        torch.nonzero,
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x),
        lambda x: x + torch.arange(4),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.where(x > 0, x, torch.zeros(4, dtype=torch.int64)),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.as_tensor(2, device=x.device),
        lambda x: x.copy_(torch.empty(4, dtype=torch.int64)),
        lambda x: torch.empty(4).to(x.device),
        lambda x: x.cpu(),
        lambda x: torch.randint(4, (4,), device=x.device),
    ],
)
def test_what_a_capture_forbids_is_found(breach: Callable[[Tensor], Any]) -> None:
    # Of what holds nothing some questions are errors of PyTorch's own.
    with captured(), pytest.raises((Forbidden, RuntimeError)):
        breach(torch.zeros(4, dtype=torch.int64, device=NOWHERE))


def test_a_kernel_that_is_given_memory_of_the_host_is_found() -> None:
    where = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(Forbidden):
        select("triton").row_map(where)


def test_what_rounds_are_made_of_is_let_through() -> None:
    with captured():
        x = torch.zeros(4, 2, device=NOWHERE)
        each = torch.arange(4, device=NOWHERE)
        x[each, each % 2] = x[:, 0].clamp(min=1)
        torch.where(x > 0, 5, x).repeat_interleave(2, dim=0).topk(1)
