"""After a warm-up nothing is compiled, whatever requests come.

Run as a program this file makes the trials below, without a GPU and without the interpreter: Triton itself says what it
would compile (`bench/specialisations.py`), and a strict engine has to agree.
"""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from skipjack import CompilationError, Engine, RequestError, SamplingParams, SkipjackError
from skipjack.bench import gate
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights

CHAIN = "swift:skip_attention=1,num_draft_tokens=4,threshold=0"
EARLY = "swift:skip_attention=1,num_draft_tokens=5,threshold=1"
ADAPTER = "kangaroo:adapter=untrained,exit_layer=1,num_draft_tokens=4,threshold=0.2"
LONG = "layerskip:exit_layer=1,num_draft_tokens"
VOTES = "lookup:choose=likeliest,acceptance=rejection"
SEARCH = "swift:window=20,search_budget=1,max_opt_iter=3"
CYCLES = {"num_hidden_layers": 3, "num_thinking_layers": 2, "num_decoding_layers": 1}
FEWER = (
    "skipdecode:length=8,least=1",
    "calm:threshold=0.9,least=1",
    "calm:measure=softmax,threshold=0.05,interval=2",
    "adaskip:n=2,online=3,window=16",
)
FLEXIDEPTH = ("flexidepth", "flexidepth:kv=none")
ROUTED = {"num_hidden_layers": 4, "routing_layers": [2, 3]}
MINDSKIP = {"num_hidden_layers": 3, "is_mindskip": [False, True, True]}
# An odd vocabulary, so that no row of scores starts where the last one did.
SMALL = {"num_hidden_layers": 2, "vocab_size": 203}


@triton.jit
def foreign_kernel(x_ptr):
    """Nothing."""


@dataclass(frozen=True)
class Trial:
    """A warm-up for `methods` and then requests of every one of them; `own` is the engine's.

    With `common` the prompts begin with so many tokens, which the prefix cache has after the first.
    """

    shape: str
    own: str = "autoregressive"
    methods: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    sequences: int = 4
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    graphs: bool = True
    context: int = 256
    common: int = 0

    def engine(self, backend: str = "triton", **options: Any) -> Engine:
        config = ModelConfig.parse(synthetic_config(self.shape) | self.fields, self.shape)
        weights = synthetic_weights(config, 0, self.dtype, 0.3)
        given = {"method": self.own, "backend": backend, "graphs": self.graphs, "prefix_caching": self.common > 0}
        return Engine(config, weights, cache_tokens=16384, **given | options)


# Gates and up of these are asked ahead, as those of 1B are; those of the other trials are too large for it, as in 8B.
NARROW: dict[str, Any] = {"intermediate_size": 48}
TRIALS = {
    "plain": Trial("tiny-llama", fields=SMALL | {"num_attention_heads": 8, "num_key_value_heads": 8}, sequences=16),
    "rounds of the host": Trial("tiny-mistral", fields=SMALL, graphs=False, dtype=torch.float16, context=1024),
    "prefixes": Trial("tiny-llama", fields=SMALL, graphs=False, context=1024, common=600),
    "chains": Trial("tiny-llama", methods=(CHAIN,), fields=SMALL, sequences=8),
    "long chains": Trial("tiny-llama", methods=(f"{LONG}=17",), fields=SMALL, sequences=2, graphs=False),
    "one sequence": Trial("tiny-qwen3", methods=(f"{LONG}=9",), fields=SMALL, sequences=1),
    "drafts that end early": Trial("tiny-llama", methods=(EARLY, f"{EARLY},tree=true"), fields=SMALL),
    "reduced vocabulary": Trial("tiny-llama", methods=(f"{CHAIN},draft_vocab=64,adaptive=true",), fields=SMALL),
    "eight bits": Trial(
        "tiny-llama", own="quantized", methods=(f"{CHAIN},draft_weights=int8,tree=true,draft_vocab=64",), fields=SMALL
    ),
    "trees": Trial("tiny-mistral", methods=(f"{CHAIN},tree=true",), fields=SMALL),
    "rejection": Trial("tiny-llama", methods=(f"{CHAIN},acceptance=rejection",), fields=SMALL),
    "rejection of trees": Trial("tiny-llama", methods=(f"{CHAIN},tree=true,acceptance=rejection",), fields=SMALL),
    "lookup of the host": Trial("tiny-llama", methods=(f"{VOTES},tree=true",), fields=SMALL, graphs=False),
    "lookup on the device": Trial("tiny-llama", methods=("lookup", VOTES), fields=SMALL),
    "what lookups remember": Trial("tiny-llama", methods=(f"{VOTES},tree=true,remember=300",), fields=SMALL),
    "search": Trial("tiny-llama", methods=(SEARCH,), fields=SMALL | {"num_hidden_layers": 4}, sequences=1),
    "search by trees": Trial(
        "tiny-llama",
        methods=(f"{SEARCH},tree=true,max_nodes=20,draft_vocab=64",),
        fields=SMALL | NARROW | {"num_hidden_layers": 4},
        sequences=1,
    ),
    "confidence": Trial(
        "tiny-llama", methods=("conflayers:window=8",), fields=NARROW | {"num_hidden_layers": 4}, sequences=1
    ),
    "programmes": Trial(
        "tiny-llama", methods=("clasp", "knapspec:search_budget=1"), fields=NARROW | {"num_hidden_layers": 3}
    ),
    "exits": Trial("tiny-qwen2", methods=("del:search_budget=1",), fields={"num_hidden_layers": 3}),
    "adapters": Trial("tiny-llama", methods=(f"{ADAPTER},acceptance=rejection",), fields=SMALL),
    "adapters that rotate otherwise": Trial(
        "tiny-llama", methods=(ADAPTER,), fields=SMALL | {"rope_theta": 5e5}, sequences=2
    ),
    "auto": Trial("tiny-llama", own="auto:max_loss=1", fields=SMALL),
    "biases": Trial("tiny-bloom", methods=(CHAIN,), fields={"n_layer": 2, "vocab_size": 203}, dtype=torch.float32),
    "filled layers": Trial("tiny-llama", methods=("static:skip=1,kv=fill",), fields=SMALL),
    "fewer layers by and by": Trial("tiny-llama", methods=FEWER, fields=NARROW | {"num_hidden_layers": 3}),
    "fewer layers by the host": Trial(
        "tiny-llama", methods=FEWER, fields=NARROW | {"num_hidden_layers": 3}, sequences=2, graphs=False
    ),
    "merged layers": Trial("tiny-llama", own="laco:base=0,followers=1", fields={"num_hidden_layers": 3}),
    "cycles": Trial("tiny-dmtd", own="dmtd", methods=("dmtd", "dmtd:phase=absolute"), fields=CYCLES),
    "routed attention": Trial("tiny-mindskip", own="mindskip", fields=MINDSKIP),
    "routed layers": Trial("routed-tiny", own="flexidepth", methods=FLEXIDEPTH, fields=ROUTED),
}


def requests(trial: Trial) -> Iterator[tuple[list[list[int]], SamplingParams]]:
    """Batches and lengths around every boundary, and every way to choose a token; the same ones every time."""
    draw = random.Random(0)
    choices: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"presence_penalty": 0.5},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1},
    ]
    room = trial.context - trial.common
    lengths = (1, 3, 63, 64, 65, 127, 128, 129, room // 2, room - 3)
    for i in range(10):
        count = (1, trial.sequences, draw.randint(1, trial.sequences))[i % 3]
        owns = [[draw.randint(3, 99) for _ in range(draw.choice(lengths))] for _ in range(count)]
        prompts = [[7] * trial.common + own for own in owns]
        longest = max(map(len, prompts))
        tokens = min(trial.context - longest, (7, 40 if count == 1 else 9, 1, 9)[i % 4])
        stop = (draw.randint(3, 99),) if i % 4 == 3 else ()
        params: dict[str, Any] = {"max_tokens": tokens, "seed": i, "ignore_eos": True, "stop_token_ids": stop}
        yield prompts, SamplingParams(**params | choices[i % len(choices)])


def attempt(trial: Trial, seen: Any) -> dict[str, Any]:
    """What a trial came to: kernels the warm-up and the requests compiled, by Triton's count and the engine's."""
    with trial.engine(strict=True) as engine:
        seen.forget()
        warm = engine.warm_up(trial.methods, sequences=trial.sequences, context=trial.context)
        graphs = engine._open().graphs
        before, captured, later = len(seen.compiled), graphs.captured if graphs else 0, [0, 0]
        error, events, cached = None, 0, 0
        try:
            for prompts, params in requests(trial):
                plain = not params.reshapes_logits and params.logprobs is None
                for method in trial.methods or (trial.own,):
                    had = graphs.captured if graphs else 0
                    outputs = engine.generate(prompts, params, method=method)
                    events += len(outputs[0].stats.events)
                    cached += sum(output.stats.cached_tokens for output in outputs)
                    later[plain] += graphs.captured - had if graphs else 0
        except CompilationError as missed:
            error = str(missed)
        return {
            "warmed": before,
            "told": warm.compilations,
            "graphs": (warm.graphs, captured, *later),
            "later": seen.compiled[before:],
            "counted": engine.compilations,
            "error": error,
            "events": events,
            "cached": cached,
        }


def refusal(seen: Any) -> dict[str, Any]:
    """A strict engine that is warmed up for one sequence is asked for four."""
    trial = Trial("tiny-llama", methods=(CHAIN,), fields=SMALL)
    params, prompts = SamplingParams(max_tokens=8, ignore_eos=True), [[3, 4, 5]] * 4
    with trial.engine(strict=True) as engine:
        seen.forget()
        engine.warm_up([CHAIN], sequences=1)
        warmed = len(seen.compiled)
        try:
            engine.generate(prompts, params, method=CHAIN)
        except SkipjackError as refused:
            kind, message = type(refused).__name__, str(refused)
        else:
            kind = message = ""
        cache = engine._loaded()[1]
        after = len(engine.generate(prompts[0], params, method=CHAIN).token_ids)
        found = {"kind": kind, "message": message, "compiled": len(seen.compiled) - warmed, "after": after}
        found |= {"held": cache.total_pages - cache.free_pages}
        engine.warm_up([CHAIN], sequences=4)
        found["warmed"] = len(engine.generate(prompts, params, method=CHAIN))
    return found


def counting(seen: Any) -> dict[str, Any]:
    """An engine that is not strict, hooks of somebody else's, and a kernel of somebody else's."""
    theirs: list[str] = []

    def hook(**compilation: Any) -> None:
        theirs.append(compilation["fn"].name)

    runtime = triton.knobs.runtime
    trial = Trial("tiny-llama", methods=(CHAIN,), fields=SMALL)
    with trial.engine() as engine:
        seen.forget()
        engine.warm_up([CHAIN], sequences=1)
        left = [runtime.jit_cache_hook, runtime.jit_post_compile_hook]
        warmed = len(seen.compiled)
        runtime.jit_cache_hook = runtime.jit_post_compile_hook = hook
        stream = engine.stream([[3, 4, 5]] * 4, SamplingParams(max_tokens=8, ignore_eos=True), method=CHAIN)
        next(stream)
        between = [runtime.jit_cache_hook is hook, runtime.jit_post_compile_hook is hook]
        for _ in stream:
            pass
        ours = seen.compiled[warmed:]
        counted = engine.compilations
        with engine._watch:
            foreign_kernel[(1,)](torch.zeros(16))
        found = {"left": left, "between": between, "ours": ours, "theirs": theirs, "counted": counted}
        found |= {"foreign": seen.compiled[warmed + len(ours) :], "counted with it": engine.compilations}
    runtime.jit_cache_hook = runtime.jit_post_compile_hook = None
    return found


def neighbours(seen: Any) -> dict[str, Any]:
    """A strict engine that is warmed up, and a cold one of another dtype in another thread, round by round."""
    warm, cold = (
        Trial("tiny-llama", fields=SMALL, dtype=dtype).engine(strict=True) for dtype in (torch.bfloat16, torch.float32)
    )
    seen.forget()
    warm.warm_up(sequences=1)
    warmed, params = len(seen.compiled), SamplingParams(max_tokens=24, ignore_eos=True)
    answered: list[int] = []
    other = threading.Thread(target=lambda: answered.append(len(cold.generate([[3, 4, 5]] * 2, params)[0].token_ids)))
    other.start()
    while other.is_alive():
        warm.generate([3, 4, 5], params)
    other.join()
    found = {"warm": warm.compilations, "cold": cold.compilations, "later": len(seen.compiled) - warmed}
    found |= {"answered": answered}
    warm.close()
    cold.close()
    return found | {"hooks": [triton.knobs.runtime.jit_cache_hook, triton.knobs.runtime.jit_post_compile_hook]}


def same_tokens(seen: Any) -> list[bool]:
    """Whether the launchers' results really are what the requests go on with."""
    trial = Trial("tiny-llama", methods=(CHAIN, f"{CHAIN},tree=true"), fields=SMALL, dtype=torch.float32)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with trial.engine() as mine, trial.engine("torch") as oracle:
        prompts = [list(range(3, 80)), [5, 6, 7]]
        expected = [output.token_ids for output in oracle.generate(prompts, params)]
        return [
            [o.token_ids for o in mine.generate(prompts, params, method=method)] == expected for method in trial.methods
        ]


def compile_four_kernels(*, backwards: bool) -> None:
    """For Triton's cache on disk."""
    from skipjack.bench.gate_worker import record
    from skipjack.kernels.triton_ops import TRITON
    from skipjack.kernels.values import Norm

    record("90")
    x, weight = (torch.empty(rows, 64, dtype=torch.bfloat16, device="meta") for rows in (8, 32))
    norm, stored = Norm(x[0], None, 1e-5), TRITON.prepare(weight)
    launches = (
        lambda: TRITON.normalise(x, norm),
        lambda: TRITON.linear(x, stored, tile=8, norm=norm),
        lambda: TRITON.head(x, norm, stored, tile=8),
    )
    for run in reversed(launches) if backwards else launches:
        run()


EXTRAS: dict[str, Callable[[Any], Any]] = {
    "refusal": refusal,
    "counting": counting,
    "neighbours": neighbours,
    "same tokens": same_tokens,
}


def main(names: list[str]) -> None:
    if names[:1] == ["disk"]:
        compile_four_kernels(backwards="backwards" in names)
        return
    from skipjack.bench.specialisations import Specialisations

    seen = Specialisations(90)
    for name in names or [*TRIALS, *EXTRAS]:
        found = attempt(TRIALS[name], seen) if name in TRIALS else EXTRAS[name](seen)
        print(json.dumps({name: found}), flush=True)


def program(*names: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *names]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@cache
def found() -> dict[str, Any]:
    """What every trial came to, in one process."""
    lines = program(OMP_NUM_THREADS="1").splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


@pytest.mark.parametrize("name", TRIALS)
def test_nothing_is_compiled_after_a_warm_up(name: str) -> None:
    result = found()[name]
    assert result["error"] is None
    assert result["later"] == []
    assert result["counted"] == 0
    assert result["told"] == result["warmed"] > 10
    assert (result["cached"] > 0) == (TRIALS[name].common > 0)


@pytest.mark.parametrize("name", [name for name in TRIALS if "search" not in name])
def test_no_graph_is_captured_after_a_warm_up_but_those_with_penalties_or_logprobs(name: str) -> None:
    told, warmed, rare, plain = found()[name]["graphs"]
    assert (told, plain) == (warmed, 0)
    assert (told > 0) == TRIALS[name].graphs
    assert rare > 0 or name not in ("plain", "chains", "rejection", "cycles", "routed layers")


@pytest.mark.parametrize("name", ["search", "search by trees", "programmes", "exits"])
def test_there_was_a_search_that_could_have_compiled(name: str) -> None:
    assert found()[name]["events"]


def test_a_strict_engine_refuses_to_compile_and_says_what() -> None:
    result = found()["refusal"]
    assert result["kind"] == "CompilationError"
    assert result["message"].startswith("_qkv_rope_append_kernel: ")
    assert "ROWS=32" in result["message"]
    assert "x_ptr: *bf16%16" in result["message"]
    assert result["compiled"] == 0
    assert (result["after"], result["held"]) == (8, 0), "the next request is served, and no page is lost"
    assert result["warmed"] == 4


def test_compilations_are_counted_and_other_hooks_are_called() -> None:
    result = found()["counting"]
    assert result["ours"]
    assert result["counted"] == len(result["ours"])
    assert result["left"] == [None, None]
    assert result["between"] == [True, True]
    assert sorted(result["theirs"][: 2 * len(result["ours"])]) == sorted(2 * result["ours"])
    assert (result["foreign"], result["counted with it"]) == (["foreign_kernel"], result["counted"])


def test_engines_count_their_own_compilations() -> None:
    result = found()["neighbours"]
    assert (result["warm"], result["hooks"]) == (0, [None, None])
    assert result["cold"] == result["later"] > 10
    assert result["answered"] == [24]


def test_requests_go_on_with_the_results_of_the_torch_table() -> None:
    assert found()["same tokens"] == [True, True]


@pytest.mark.parametrize("version", gate.tritons())
def test_a_second_process_finds_the_kernels_on_disk_whatever_it_launches_first(version: str, tmp_path: Path) -> None:
    aside = gate.tritons()[version]
    path = {} if aside is None else {"PYTHONPATH": str(aside)}
    listings: list[dict[str, int]] = []
    for order in ((), ("backwards",)):
        program("disk", *order, TRITON_CACHE_DIR=str(tmp_path), **path)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        listings.append({str(path): path.stat().st_mtime_ns for path in files})
    assert sum(name.endswith(".cubin") for name in listings[0]) == 4
    assert listings[1] == listings[0]


def test_where_nothing_is_compiled_round_graphs_are_made_ready() -> None:
    with Trial("tiny-llama", methods=(CHAIN,), fields=SMALL).engine("torch") as engine:
        warm = engine.warm_up(CHAIN, sequences=3, context=200)
        assert (warm.compilations, warm.graphs) == (0, 2 * (2 * 3 + 1))
        assert engine.warmed_up == warm
        assert warm.seconds > 0
        engine.generate([[3, 4], [5]], SamplingParams(max_tokens=9), method=CHAIN)
        assert engine._open().graphs is not None
        assert engine._open().graphs.captured == warm.graphs


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"sequences": 0}, "sequences: expected an integer from 1 to 16, got 0"),
        ({"sequences": 17}, "sequences: expected an integer from 1 to 16, got 17"),
        ({"context": 0}, "context: expected an integer from 1 to 1024, got 0"),
        ({"context": 1025}, "context: expected an integer from 1 to 1024, got 1025"),
        ({"methods": ["nonsense"]}, "unknown method 'nonsense'"),
    ],
)
def test_a_warm_up_for_what_there_never_is_is_refused(asked: dict[str, Any], expected: str) -> None:
    with Trial("tiny-llama", fields=SMALL).engine("torch") as engine, pytest.raises(RequestError, match=expected):
        engine.warm_up(**asked)


if __name__ == "__main__":
    main(sys.argv[1:])
