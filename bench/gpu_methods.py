"""Targets that other commands of `skipjack bench` measure, each run in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from .gpu_setting import Finding, Setting
from .gpu_speed import Found
from .step import Figure
from .targets import DRAFTS, FRACTIONS, Measurement

SKIPJACK = "from skipjack.runtime.commands.cli import main; main()"
# The lines of `bench peers` that have targets, by how the peer's name begins.
PEERS = {"T12": "transformers static cache", "T13": "torch.compile loop"}
# What reading weights alone would allow DMTD with cycles of four tokens on the shape of Qwen3-4B.
DMTD_BOUND = 2.11
# Rounds have targets on one shape; of the other some are made so that something is seen of it.
ROUNDS = {"1b": ("--tokens", "256", "--repeats", "4"), "8b": ("--tokens", "64", "--repeats", "1")}
# On real weights: what drafts from the text, what picks, what learns which layers to skip, and what reads fewer bytes.
REAL = ("lookup", "lookup:choose=likeliest,tree=true,num_draft_tokens=12", "auto", "swift", "quantized")
Result = Mapping[str, Any]


def drafts(setting: Setting) -> Found:
    """T8 to T11, by `bench decode` with forced acceptance."""
    for label, shape in setting.named(DRAFTS).items():
        tiny = ["--context", "16", "--rows", "2", "--rate", "0.5", "--draft", "2", "--pairs", "1", "--repeats", "1"]
        full = ["--rows", "8", "--rate", "0.5", "--rate", "0.8", "--rate", "0.9", "--draft", "4", *ROUNDS[label]]
        arguments = ["decode", f"synthetic:{shape}:0.3", *([*tiny, "--tokens", "4"] if setting.dry else full)]
        result, problem = _bench(arguments, 240)
        if not setting.dry:
            yield from figures_of_decode(shape, result)
        yield from of_decode(label, result, problem)


def figures_of_decode(shape: str, result: Result) -> Iterator[Figure]:
    """What the measurements of `of_decode` were made of: passes, and rounds with what their parts take alone."""
    for one in result.get("passes", ()):
        time = one["seconds"]
        name, share = f"{one['kind']}, {one['layers']} layers", one["share"]
        yield Figure(name, shape, one["rows"], time["median"], time["p10"], time["p90"], one["bytes"], 0, share)
    for one in result.get("rounds", ()):
        time, micro = one["seconds"], 1e6
        plain, speed = micro * one["plain"]["median"], one["speed"]["median"]
        note = (
            f"draft {micro * one['draft']:.1f} µs, verification {micro * one['verify']:.1f}; "
            f"a token of plain decoding {plain:.1f} µs, {one['mean_length']:.2f} tokens a round, of {one['rounds']}; "
            f"speed {speed:.3f}, possible {one['possible']:.3f}"
        )
        name = f"round of {one['method'].partition(':')[0]}, {one['k']} drafts, {one['rate']} accepted"
        yield Figure(name, shape, one["k"] + 1, time["median"], time["p10"], time["p90"], 0, 0, None, note)


def of_decode(label: str, result: Result, problem: str) -> Iterator[Measurement]:
    """Draft passes against their ideal and their line; glue and distance to the ideal of the worst rounds."""
    passes = [one for one in result.get("passes", ()) if one["kind"] == "draft"]
    layers = max((one["layers"] for one in passes), default=0)
    for fraction in FRACTIONS:
        found = next((one["ideal"] for one in passes if one["layers"] == round(fraction * layers)), None)
        yield Measurement("T8", f"{label} f={fraction}", found, problem)
    yield Measurement("T9", label, result["line"]["r2"] if result else None, problem)
    if label == "1b":
        rounds = result.get("rounds", ())
        yield Measurement("T10", "glue", max((one["glue"] for one in rounds), default=None), problem)
        yield Measurement("T11", label, min((one["of_possible"] for one in rounds), default=None), problem)


def peers(setting: Setting) -> Found:
    """T12 and T13 at the small shapes."""
    yield from _peers(setting, {"135m": 200, "1b": 210})


def large_peers(setting: Setting) -> Found:
    """T12 and T13 at the shape of Llama-3.1-8B, which alone fills a part's time."""
    yield from _peers(setting, {"8b": 400})


def _peers(setting: Setting, seconds: Mapping[str, int]) -> Found:
    for label, shape in setting.named(tuple(seconds)).items():
        tiny = ["--dtype", "float32", "--max-tokens", "4", "--compile-mode", "eager", "--device", "cpu"]
        full = ["--dtype", "bfloat16", "--max-tokens", "128", "--cache-tokens", "4096"]
        model = ["peers", f"synthetic:{shape}:0.3", "--per-category", "1", "--category", "writing"]
        model += [part for start in PEERS.values() for part in ("--peer", start)]
        yield from of_peers(label, *_bench([*model, *(tiny if setting.dry else full)], seconds[label]))


def of_peers(label: str, result: Result, problem: str) -> Iterator[Measurement]:
    """The ratios of the two peers that have targets."""
    for target, start in PEERS.items():
        line = next((line for line in result.get("summary", ()) if line["peer"].startswith(start)), None)
        if line is None:
            yield Measurement(target, label, None, problem or f"no peer {start}")
        elif line["unavailable"]:
            yield Measurement(target, label, None, line["unavailable"])
        else:
            yield Measurement(target, label, line["ratio"], line["peer"])


def routed(setting: Setting) -> Found:
    """T15: `bench forced` with half of the routed layers skipped."""
    shape, skipped, tokens = ("tiny-llama", 2, 3) if setting.dry else ("8b", 8, 64)
    arguments = ["forced", f"synthetic:routed-{shape}:0.3", "--skipped", str(skipped), "--tokens", str(tokens)]
    result, problem = _bench([*arguments, "--pairs", "1" if setting.dry else "5"], 200)
    rows = [row for row in result.get("rows", ()) if row["bytes_saved"]]
    value = median(row["time_saved"] / row["bytes_saved"] for row in rows) if rows else None
    yield Measurement("T15", "8b batch 1", value, problem)


def cycles(setting: Setting) -> Found:
    """T16: `bench dmtd` with cycles of four tokens."""
    shape, tokens, pairs = ("tiny-dmtd", "5", "1") if setting.dry else ("4b-dmtd", "97", "5")
    arguments = ["dmtd", f"synthetic:{shape}:1", "--horizon", "4", "--max-tokens", tokens, "--pairs", pairs]
    result, problem = _bench(arguments, 150)
    lines = result.get("lines", ())
    yield Measurement("T16", "4b", lines[0]["speed"] / DMTD_BOUND if lines else None, problem)


def real(setting: Setting) -> Iterator[Finding | Figure]:
    """`bench methods` on the packaged model: whether texts are plain decoding's, and what each method's speed is."""
    tiny = ["synthetic:tiny-llama:0.3", "--max-tokens", "4", "--category", "writing", "--dtype", "float32"]
    full = ["demo", "--max-tokens", "128", "--dtype", "bfloat16", "--cache-tokens", "4096"]
    arguments = [*(tiny if setting.dry else full), "--per-category", "1" if setting.dry else "3"]
    methods = [part for method in REAL for part in ("--method", method)]
    yield from of_methods(*_bench(["methods", *arguments, *methods], 400))


def of_methods(result: Result, problem: str) -> Iterator[Finding | Figure]:
    """Each method in each category, no speed beside texts that differ; and why there is not all, if there is not."""
    for line in result.get("summary", ()):
        name, same = f"{line['method']} {line['category']}", line["identical"] == line["prompts"]
        texts = f"{line['identical']} of {line['prompts']} texts are plain decoding's"
        speed = f"speed ÷ plain {line['speed']:.2f} ({line['speed_p10']:.2f}–{line['speed_p90']:.2f})"
        yield Finding("real", name, same, texts, line["tokens"])
        note = f"{speed}, {line['mean_acceptance_length']:.2f} tokens a round"
        if same:
            yield Figure(name, result["model"], 0, None, None, None, 0, 0, None, note)
    if problem:
        yield Finding("real", "methods", None, problem)


def _bench(arguments: list[str], seconds: int) -> tuple[Result, str]:
    """The result file of a `skipjack bench` command, as far as it came, and why it came no further."""
    with TemporaryDirectory(prefix="skipjack-") as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-c", SKIPJACK, "bench", *arguments, "--output", str(output)]
        problem = ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
            if done.returncode or not output.is_file():
                problem = f"bench {arguments[0]}: {' '.join(done.stderr.split())[-300:] or 'no result'}"
        except subprocess.TimeoutExpired:
            problem = f"bench {arguments[0]}: no answer in {seconds} s"
        return json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}, problem
