"""The checks only a GPU can make, each a generator of findings."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from ..kernels.host import ints
from ..kernels.ops import TORCH, select
from ..loaders.config import ModelConfig
from ..loaders.demo import demo_folder
from ..loaders.synthetic import synthetic_config, synthetic_weights
from ..runtime.engine import Engine
from ..runtime.errors import SkipjackError
from ..runtime.methods.autoregressive import Autoregressive
from ..runtime.prefill import whole_prompts
from ..runtime.request import MOST_SEQUENCES, SEQUENCES, SamplingParams
from ..runtime.rows import one_sequence
from ..runtime.sequence import Sequence
from ..runtime.stream import Stream
from . import gpu_bits
from .gpu_setting import Finding, Setting
from .op_cases import CASES, Side

# Of a norm-wise relative error: a few roundings of the dtype, the smallest of which is 2**-9 in bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DECODE_ONLY = (
    "head",
    "sample, verify",
    "reshape_logits, logprobs",
    "lookup",
    "enter, extend, commit",
    "branch",
    "compact",
)
# Ways to choose tokens in captured rounds.
CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "min_tokens": 9, "logprobs": 3},
)
# Those whose choices are made from rounds that the host steers.
RECORDING = ("clasp", "knapspec", "del")
# Those that are also tried with more sequences together than an engine runs that is not told.
CROWDED = ("autoregressive", "swift:skip_attention=2+3,threshold=0.1,tree=true")
WARMED = ("autoregressive", "swift:skip_attention=2,num_draft_tokens=4,threshold=0")
SEARCH = "swift:window=20,search_budget=1,max_opt_iter=3"
# Drafts of a skip set, drafts whose rows a mask and a threshold stop, trees; tokens that leave early, and layers that
# are filled for them; and masks that kernels write in a pass.
LONG_RUN = (
    (None, "swift:skip_attention=2+3,num_draft_tokens=5,threshold=0"),
    (None, "swift:num_draft_tokens=5,threshold=1e-9,search_budget=1e-9"),
    (None, "lookup:choose=likeliest,tree=true,num_draft_tokens=12"),
    (None, "skipdecode:length=200"),
    (None, "calm:threshold=0.9,least=1"),
    ("routed-tiny", "flexidepth"),
    ("routed-tiny", "flexidepth:kv=none"),
    ("tiny-mindskip", "mindskip"),
    ("tiny-dmtd", "dmtd:phase=absolute"),
)


def ops(setting: Setting) -> Iterator[Finding]:
    """Every op against the torch table in float64."""
    triton = select("triton")
    for shape in setting.shapes:
        config = setting.config(shape)
        for dtype in setting.dtypes:
            mine = Side(triton, setting.device, dtype, dtype)
            oracle = Side(TORCH, torch.device("cpu"), dtype, torch.float64)
            for name in setting.cases:
                case = CASES[name]
                prompt = [] if setting.dry or name in DECODE_ONLY else [(70, triton.prefill_tile)]
                fast = [] if setting.dry else [(rows, None) for rows in (1, 40, *(n for n, _ in prompt))]
                few = [(rows, triton.decode_tile) for rows in ((9,) if setting.dry else (16, 40))]
                for rows, tile in [*few, *prompt, *fast]:
                    label = f"{name} {shape} {_name(dtype)} {rows} rows{' fast' if tile is None else ''}"
                    try:
                        worst = _worst(case(mine, config, rows, tile), case(oracle, config, rows, tile))
                    except Exception as error:
                        yield Finding("ops", label, False, f"{type(error).__name__}: {str(error)[:300]}")
                        if "CUDA" in str(error):
                            return  # Nothing on this device can be trusted after that.
                        continue
                    detail = f"{worst[1]}: relative error {worst[0]:.1e}"
                    yield Finding("ops", label, worst[0] < TOLERANCE[dtype], detail)


def invariance(setting: Setting) -> Iterator[Finding]:
    """Row i of a pass has the bits it has alone: the whole model, decode rows of one sequence."""
    for shape, dtype in setting.models():
        engine = engine_of(shape, dtype, setting)
        different = _rows_that_differ(engine, setting.rows)
        yield Finding(
            "rows", f"{shape} {_name(dtype)}", not different, f"row counts that differ: {different or 'none'}"
        )


def prompts(setting: Setting) -> Iterator[Finding]:
    """A token of a prompt has the bits it has in a longer one, whose blocks are wider, and beside other prompts."""
    for shape, dtype in setting.models():
        engine = engine_of(shape, dtype, setting)
        different = _prompts_that_differ(engine, setting.prompts)
        detail = f"prompt lengths that differ: {different or 'none'} of {setting.prompts}"
        yield Finding("prompts", f"{shape} {_name(dtype)}", not different, detail)
        beside = _prompts_beside_others_that_differ(engine, setting.prompts)
        detail = f"prompt lengths that differ in a pass of all: {beside or 'none'} of {setting.prompts}"
        yield Finding("prompts", f"{shape} {_name(dtype)}, together", not beside, detail)
        after = _prompts_after_a_copy_that_differ(engine, setting.prompts)
        detail = f"lengths copied that the rest differs after: {after or 'none'} of {setting.prompts[:-1]}"
        yield Finding("prompts", f"{shape} {_name(dtype)}, after a copy", not after, detail)


def exactness(setting: Setting) -> Iterator[Finding]:
    """SWIFT gives the tokens of plain decoding, greedy and sampled, alone and in a batch."""
    for shape, dtype in setting.models():
        yield _exact(engine_of(shape, dtype, setting), f"{shape} {_name(dtype)}", setting)


def demo(setting: Setting) -> Iterator[Finding]:
    """The same of real weights, where they are installed."""
    if setting.dry:
        yield Finding("demo", "exact", None, "not part of a dry run")
        return
    try:
        folder = demo_folder()
    except SkipjackError as error:
        yield Finding("demo", "exact", None, str(error))
        return
    with Engine.load(folder, device="cuda", cache_tokens=16384) as engine:
        yield replace(_exact(engine, "exact", setting), part="demo")


def graphs(setting: Setting) -> Iterator[Finding]:
    """Rounds captured as graphs give the tokens of those the host steers, also where requests share them.

    A dry run captures nothing.
    """
    for shape, method in setting.captured:
        config = ModelConfig.parse(synthetic_config(shape), shape)
        weights = synthetic_weights(config, 1, setting.dtypes[0], device=setting.device)
        backend = "torch" if setting.dry else "triton"
        host, device = (
            Engine(config, weights, method=method, backend=backend, graphs=on, max_sequences=most)
            for on, most in ((False, SEQUENCES), (True, MOST_SEQUENCES))
        )
        different = shared = rounds = captured = 0
        with host, device:
            for fields in CHOICES:
                params = SamplingParams(max_tokens=90, seed=5, ignore_eos=True, **fields)
                prompts = [[(7 * i + j) % 500 + 3 for j in range(4 + 5 * i)] for i in range(3)]
                outputs = host.generate(prompts, params)
                for expected, output in zip(outputs, device.generate(prompts, params), strict=True):
                    different += output.choices != expected.choices
                    rounds += output.stats.rounds
                    captured += output.stats.graph_rounds
                if method in CROWDED:
                    crowd = [[(7 * i + j) % 500 + 3 for j in range(1 + i % 9)] for i in range(5 if setting.dry else 40)]
                    few = replace(params, max_tokens=12)
                    found = zip(device.generate(crowd, few), host.generate(crowd, few), strict=True)
                    different += sum(one.token_ids != other.token_ids for one, other in found)
                if "rejection" not in method:
                    expected = [output.token_ids for output in outputs]
                    shared += _in_turn([device.stream(prompt, params) for prompt in prompts]) != expected
        detail = f"{captured} of {rounds} rounds alone, {different} continuations differ, {shared} shared runs do"
        alone = captured > 0 if method.startswith(RECORDING) else captured == rounds
        yield Finding("graphs", f"{shape} {method}", different == shared == 0 and alone, detail)


def _in_turn(streams: list[Stream]) -> list[list[int]]:
    """The tokens of streams that are read one after the other, a chunk each."""
    found = [list[int]() for _ in streams]
    while any(chunks := [next(stream, None) for stream in streams]):
        for tokens, chunk in zip(found, chunks, strict=True):
            tokens.extend(chunk.token_ids if chunk else ())
    return found


def races(setting: Setting) -> Iterator[Finding]:
    """The tokens of a long greedy run with dependent launch and without, one beside the other."""
    name = f"{setting.shapes[0]} {setting.long_run} tokens"
    with ThreadPoolExecutor(2) as both:
        on, off = both.map(partial(_long_run, setting), ("1", "0"))
    wrong = [f"SKIPJACK_PDL={dependent}: {problem}" for dependent, (_, problem) in (("1", on), ("0", off)) if problem]
    same = on[0] == off[0]
    detail = "; ".join(wrong) or f"dependent launch on and off: {'equal' if same else 'DIFFERENT'}"
    yield Finding("race", name, same and not wrong, detail)


def _long_run(setting: Setting, dependent: str) -> tuple[list[int], str]:
    """The tokens of `long_run` in a process with SKIPJACK_PDL, or why there are none."""
    command = [sys.executable, "-m", "skipjack.bench.gpu_check", "tokens", setting.shapes[0], str(setting.long_run)]
    command += ["--dry-run"] if setting.dry else []
    environment = os.environ | {"SKIPJACK_PDL": dependent}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return [], "no answer in 300 s"
    if done.returncode:
        return [], done.stderr.strip()[-300:] or "it failed"
    return json.loads(done.stdout.splitlines()[-1]), ""


def compilations(setting: Setting) -> Iterator[Finding]:
    """Kernels compiled by requests of all lengths and batches, after a warm-up, and what that took."""
    if setting.dry:
        yield Finding("compile", "after warm-up", None, "the interpreter compiles nothing")
        return
    engine = engine_of(setting.shapes[0], torch.bfloat16, setting)
    warm = engine.warm_up(WARMED, context=2048)
    _workload(engine, (1, 17, 64, 90, 333, 1000), batches=(1, 2, 4, 16))
    after = engine.compilations
    took = f"the warm-up took {warm.seconds:.1f} s for {warm.compilations} kernels and {warm.graphs} graphs"
    yield Finding("compile", "after warm-up", after == 0, f"{after} compiled; {took}", after)


def searched(setting: Setting) -> Iterator[Finding]:
    """Kernels compiled by a search for a skip set and by the rounds with what it finds, after a warm-up."""
    with engine_of("tiny-llama", torch.float32 if setting.dry else torch.bfloat16, setting) as engine:
        if not setting.dry:
            engine.warm_up(SEARCH, sequences=1, context=512)
        params = SamplingParams(max_tokens=4 if setting.dry else 300, ignore_eos=True)
        events = len(engine.generate(list(range(3, 40)), params, method=SEARCH).stats.events)
        after = engine.compilations
        held = None if setting.dry else after == 0 < events
        yield Finding("search", "after warm-up", held, f"{after} compiled, {events} events of the search", after)


PARTS: dict[str, Callable[[Setting], Iterator[Finding]]] = {
    "ops": ops,
    "rows": invariance,
    "prompts": prompts,
    "exact": exactness,
    "demo": demo,
    "race": races,
    "compile": compilations,
    "search": searched,
    "graphs": graphs,
    "settled": gpu_bits.settled,
    "widths": gpu_bits.widths,
    "order": gpu_bits.order,
}


def long_run(shape: str, count: int, setting: Setting) -> list[int]:
    """The tokens of greedy runs of `LONG_RUN`, of `shape` where it names none, so many in all."""
    params, tokens = SamplingParams(max_tokens=count // len(LONG_RUN), ignore_eos=True), list[int]()
    for own, methods in groupby(LONG_RUN, key=lambda pair: pair[0]):
        names = [name for _, name in methods]
        with engine_of(own or shape, setting.dtypes[0], setting, names[0] if own else Autoregressive.name) as engine:
            for name in names:
                tokens += engine.generate([1, 2, 3, 4, 5], params, method=name).token_ids
    return tokens


def engine_of(shape: str, dtype: torch.dtype, setting: Setting, method: str = Autoregressive.name) -> Engine:
    """An engine on the Triton table over random weights of a named shape."""
    config = setting.config(shape)
    weights = synthetic_weights(config, 0, dtype, device=setting.device)
    return Engine(config, weights, method=method, backend="triton", cache_tokens=min(config.max_context, 40000))


def _exact(engine: Engine, name: str, setting: Setting) -> Finding:
    length = 4 if setting.dry else 120
    prompts = [[(7 * i + j) % 500 + 3 for j in range(4 + 5 * i)] for i in range(2 if setting.dry else 5)]
    different = total = 0
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=length, temperature=temperature, seed=5, ignore_eos=True)
        plain = [engine.generate(prompt, params).token_ids for prompt in prompts]
        for k in (2,) if setting.dry else (2, 7):
            method = f"swift:skip_attention=2+4,skip_mlp=3,num_draft_tokens={k},threshold=0"
            together = engine.generate(prompts, params, method=method)
            different += sum(output.token_ids != ids for output, ids in zip(together, plain, strict=True))
            total += sum(len(ids) for ids in plain)
    return Finding("exact", name, different == 0, f"{total} tokens, {different} continuations differ")


def _rows_that_differ(engine: Engine, counts: tuple[int, ...]) -> list[int]:
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    rows = max(counts)
    token = [(11 * i) % 500 + 3 for i in range(rows)]
    with torch.inference_mode():
        pages = cache.reserve(rows)
        tile, device = model.ops.decode_tile, model.device
        alone = [model.logits(model.forward(one_sequence([t], i, pages, tile, device), cache, model.full))
                 for i, t in enumerate(token)]  # fmt: skip
        different: list[int] = []
        for count in counts:
            for first in {0, rows - count}:
                part = one_sequence(token[first : first + count], first, pages, tile, device)
                together = model.logits(model.forward(part, cache, model.full))
                if not torch.equal(together, torch.cat(alone[first : first + count])):
                    different.append(count)
        cache.release(pages)
    return sorted(set(different))


def _prompts_that_differ(engine: Engine, lengths: tuple[int, ...]) -> list[int]:
    """Those in whose pass the tokens of the shortest have other residual streams."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    text = [(11 * i) % 500 + 3 for i in range(max(lengths))]
    passes: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        pages = cache.reserve(max(lengths))
        for length in lengths:
            rows = one_sequence(text[:length], 0, pages, model.ops.prefill_tile, model.device)
            passes[length] = model.forward(rows, cache, model.full)[: min(lengths)]
        cache.release(pages)
    return [length for length, found in passes.items() if not torch.equal(found, passes[min(lengths)])]


def _prompts_beside_others_that_differ(engine: Engine, lengths: tuple[int, ...]) -> list[int]:
    """Those whose tokens have other residual streams in one pass with the others than alone."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    differ: list[int] = []
    with torch.inference_mode():
        made = [
            Sequence(
                i, 0, [(11 * j + i) % 500 + 3 for j in range(length)], SamplingParams(), 0, frozenset(), length, None
            )
            for i, length in enumerate(lengths)
        ]
        for sequence in made:
            cache.reserve(len(sequence.prompt), sequence.pages)
        rows, last = whole_prompts(model, made)
        together = model.forward(rows, cache, model.full)
        for sequence, end in zip(made, ints(last), strict=True):
            own, length = sequence.pages, len(sequence.prompt)
            alone = one_sequence(sequence.prompt, 0, own, model.ops.prefill_tile, model.device)
            if not torch.equal(together[end + 1 - length : end + 1], model.forward(alone, cache, model.full)):
                differ.append(length)
            cache.release(own)
    return differ


def _prompts_after_a_copy_that_differ(engine: Engine, lengths: tuple[int, ...]) -> list[int]:
    """Beginnings that were copied, as the prefix cache does, and then the rest of the longest prompt is another."""
    model, cache = engine._loaded()  # pyright: ignore[reportPrivateUsage]
    text, tile, differ = [(11 * i) % 500 + 3 for i in range(max(lengths))], model.ops.prefill_tile, list[int]()
    with torch.inference_mode(), cache.lent(len(text)) as source, cache.lent(len(text)) as target:
        whole = model.forward(one_sequence(text, 0, source, tile, model.device), cache, model.full)
        for length in sorted(lengths)[:-1]:
            cache.copy(source, target, length)
            rest = one_sequence(text[length:], length, target, tile, model.device)
            if not torch.equal(model.forward(rest, cache, model.full), whole[length:]):
                differ.append(length)
    return differ


def _workload(engine: Engine, lengths: tuple[int, ...], batches: tuple[int, ...]) -> None:
    for length in lengths:
        for temperature in (0.0, 0.7):
            params = SamplingParams(
                max_tokens=12, temperature=temperature, top_p=0.9, top_k=40, seed=1, ignore_eos=True
            )
            for batch in batches if length < 100 else (1,):
                prompts = [[3 + (i + j) % 400 for j in range(length)] for i in range(batch)]
                for method in WARMED:
                    engine.generate(prompts, params, method=method)


def _worst(got: Any, expected: Any) -> tuple[float, str]:
    """The largest relative error in the norm, and where; a NaN is infinitely wrong, an unequal integer too."""
    worst = (0.0, "all equal")
    for name, value in got.items():
        a, b = value.detach().cpu(), expected[name].detach().cpu()
        if not b.is_floating_point():
            error = 0.0 if torch.equal(a.long(), b.long()) else float("inf")
        else:
            error = float((a.double() - b.double()).norm() / b.double().norm())
            error = float("inf") if math.isnan(error) else error
        if error > worst[0]:
            worst = (error, name)
    return worst


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
