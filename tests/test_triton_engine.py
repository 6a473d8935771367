"""The whole engine on the hand-written kernels, in Triton's interpreter: the ids are those of the torch table."""

import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="Triton is not installed")

from skipjack import Engine, SamplingParams
from skipjack.kernels import ops
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.errors import RequestError

PROMPTS = [[5, 9, 11, 130], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]
SWIFT = "swift:skip_attention=1,skip_mlp=2,num_draft_tokens=2,threshold=0"


@cache
def engine(shape: str, backend: str, dtype: torch.dtype = torch.float32) -> Engine:
    layers = "n_layer" if "bloom" in shape else "num_hidden_layers"
    config = ModelConfig.parse(synthetic_config(shape) | {layers: 4, "vocab_size": 200}, shape)
    return Engine(config, synthetic_weights(config, 3, dtype, 0.3), backend=backend, cache_tokens=2048)


def ids(shape: str, backend: str, prompt: Any, params: SamplingParams, method: str = "autoregressive") -> Any:
    outputs = engine(shape, backend).generate(prompt, params, method=method)
    return [output.token_ids for output in outputs] if isinstance(outputs, list) else outputs.token_ids


@pytest.mark.parametrize(
    "shape", ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-smollm3", "tiny-bloom"]
)
def test_every_family_gives_the_ids_of_the_torch_table(shape: str) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    prompt = [(7 * i) % 190 + 3 for i in range(66)]
    assert ids(shape, "triton", prompt, params) == ids(shape, "torch", prompt, params)


def test_greedy_speculation_in_a_batch_gives_the_ids_of_plain_decoding_and_of_torch() -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    together = ids("tiny-llama", "triton", PROMPTS, params, SWIFT)
    assert together == [ids("tiny-llama", "triton", prompt, params) for prompt in PROMPTS]
    assert together == ids("tiny-llama", "torch", PROMPTS, params, SWIFT)


LIGHT = [
    "quantized:num_draft_tokens=2",
    "quantized:num_draft_tokens=2,skip_attention=1,draft_vocab=64,acceptance=rejection",
    f"{SWIFT},tree=true,max_nodes=5,draft_weights=int8",
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    ("shape", "method"), [*zip(("tiny-llama", "tiny-qwen3", "tiny-bloom"), LIGHT, strict=True)], ids=LIGHT
)
def test_drafts_in_eight_bits_give_the_ids_of_plain_decoding(shape: str, method: str, graphs: bool) -> None:
    """And where all of the model drafts, most of what it drafts is accepted."""
    params, source = SamplingParams(max_tokens=7, ignore_eos=True), engine(shape, "triton")
    weights = synthetic_weights(source.config, 3, torch.float32, 0.3)
    with Engine(source.config, weights, backend="triton", graphs=graphs, cache_tokens=2048) as drafting:
        outputs = drafting.generate(PROMPTS, params, method=method)
    assert [output.token_ids for output in outputs] == ids(shape, "triton", PROMPTS, params)
    counts = [(o.stats.rounds, o.stats.graph_rounds, o.stats.drafted, o.stats.accepted) for o in outputs]
    rounds, of_device, drafted, accepted = map(sum, zip(*counts, strict=True))
    assert of_device == (rounds if graphs else 0)
    assert drafted > 0
    assert "skip" in method or accepted >= 0.7 * drafted


def test_sampled_drafts_in_eight_bits_are_those_of_torch() -> None:
    params = SamplingParams(max_tokens=5, temperature=0.8, seed=5, ignore_eos=True)
    mine, theirs = (
        engine("tiny-qwen3", name).generate(PROMPTS, params, method=LIGHT[1]) for name in ("triton", "torch")
    )
    assert [output.token_ids for output in mine] == [output.token_ids for output in theirs]
    counts = [(output.stats.drafted, output.stats.accepted) for output in mine]
    assert counts == [(output.stats.drafted, output.stats.accepted) for output in theirs]
    assert sum(drafted for drafted, _ in counts) > 0


@pytest.mark.parametrize("method", ["autoregressive", SWIFT])
def test_fast_numerics_on_the_kernels_give_the_ids_of_torch(method: str) -> None:
    config = ModelConfig.parse(
        synthetic_config("tiny-llama") | {"num_hidden_layers": 4, "vocab_size": 200}, "tiny-llama"
    )
    weights, params = synthetic_weights(config, 3, torch.float32, 0.3), SamplingParams(max_tokens=6, ignore_eos=True)
    with Engine(config, weights, backend="triton", numerics="fast", cache_tokens=2048) as fast:
        outputs = fast.generate(PROMPTS, params, method=method)
    assert [output.token_ids for output in outputs] == ids("tiny-llama", "torch", PROMPTS, params)
    assert {(output.stats.numerics, output.stats.lossless) for output in outputs} == {("fast", False)}


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-smollm3"])
def test_drafts_of_an_adapter_give_the_ids_of_plain_decoding_and_the_drafts_of_torch(shape: str) -> None:
    """Of a model that rotates as the adapter, and of one that does not."""
    method, params = (
        "kangaroo:adapter=untrained,exit_layer=2,threshold=0.02",
        SamplingParams(max_tokens=6, ignore_eos=True),
    )
    mine, theirs = (engine(shape, name).generate(PROMPTS, params, method=method) for name in ("triton", "torch"))
    assert [output.token_ids for output in mine] == ids(shape, "triton", PROMPTS, params)
    counts = [(output.stats.drafted, output.stats.accepted) for output in mine]
    assert counts == [(output.stats.drafted, output.stats.accepted) for output in theirs]
    assert all(drafted > 0 for drafted, _ in counts)


def test_sampled_speculation_gives_the_ids_of_plain_sampling_and_of_torch() -> None:
    params = SamplingParams(
        max_tokens=6, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=2**63 + 5, ignore_eos=True
    )
    drafted = ids("tiny-qwen3", "triton", PROMPTS[0], params, SWIFT)
    assert drafted == ids("tiny-qwen3", "triton", PROMPTS[0], params)
    assert drafted == ids("tiny-qwen3", "torch", PROMPTS[0], params, SWIFT)


def test_sequences_that_skip_different_attention_give_the_ids_of_torch() -> None:
    routed = synthetic_config("tiny-mindskip") | {"num_hidden_layers": 3, "is_mindskip": [False, True, True]}
    config = ModelConfig.parse(routed | {"vocab_size": 200}, "tiny-mindskip")
    weights, outputs = synthetic_weights(config, 1, torch.float32), list[Any]()
    for backend in ("triton", "torch"):
        with Engine(config, weights, backend=backend, method="mindskip", cache_tokens=1024) as skipping:
            outputs.append(skipping.generate(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True)))
    decided = [[output.stats.events[0]["skip_attention"] for output in request] for request in outputs]
    assert decided[0] == decided[1]
    assert decided[0][0] != decided[0][1], "the rows of the batch must differ for this test to say something"
    assert [output.token_ids for output in outputs[0]] == [output.token_ids for output in outputs[1]]


def test_search_for_a_skip_set_runs_on_the_kernels() -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    method = "swift:window=4,search_budget=1,max_opt_iter=1,num_draft_tokens=1,threshold=0"
    searched = engine("tiny-llama", "triton").generate(PROMPTS[0], params, method=method)
    assert searched.stats.events
    assert searched.token_ids == ids("tiny-llama", "torch", PROMPTS[0], params)


def test_the_backend_in_use_is_visible() -> None:
    output = engine("tiny-llama", "triton").generate(PROMPTS[0], SamplingParams(max_tokens=1))
    assert output.stats.backend.startswith("triton (")
    assert "interpreted" in output.stats.backend
    assert engine("tiny-llama", "torch").backend.startswith("torch (")


def test_asking_for_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipjack.kernels.launch.INTERPRETED", False)
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    with pytest.raises(RequestError, match="backend: triton cannot run on cpu: Triton needs a CUDA device"):
        Engine(config, synthetic_weights(config, 0, torch.float32), backend="triton")
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="Triton is not installed"):
        Engine(config, synthetic_weights(config, 0, torch.float32), backend="triton")


@pytest.mark.parametrize("backend", ["cuda", "Triton", ""])
def test_an_unknown_backend_is_refused(backend: str) -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    with pytest.raises(RequestError, match="backend: expected one of auto, torch, triton"):
        Engine(config, synthetic_weights(config, 0, torch.float32), backend=backend)


class Factories(TorchFunctionMode):
    """Notes every tensor that the runtime makes without saying where: on a GPU it would land on the host."""

    MAKERS = (torch.tensor, torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.rand, torch.randn)

    def __init__(self) -> None:
        super().__init__()
        self.homeless: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.MAKERS and "device" not in (kwargs or {}):
            caller = sys._getframe(1)
            if "/runtime/" in caller.f_code.co_filename:
                self.homeless.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return func(*args, **(kwargs or {}))


def test_every_tensor_of_a_run_is_made_on_a_named_device() -> None:
    params = SamplingParams(max_tokens=24, temperature=0.7, repetition_penalty=1.1, presence_penalty=0.1, logprobs=2)
    method = "swift:window=8,search_budget=1,max_opt_iter=2"
    with Factories() as mode:
        engine("tiny-llama", "torch").generate(PROMPTS, params, method=method)
        engine("tiny-llama", "torch").generate(PROMPTS, SamplingParams(max_tokens=4), method=SWIFT)
    assert not mode.homeless
