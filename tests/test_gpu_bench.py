"""Targets, what a measurement decides, and the parts of bench/gpu.sh as far as no GPU is needed."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from typer.testing import CliRunner

from skipjack.bench import (
    gpu,
    gpu_bits,
    gpu_check,
    gpu_methods,
    gpu_parts,
    gpu_rounds,
    gpu_speed,
    op_cases,
    rotation,
    sampled,
    targets,
)
from skipjack.bench.gpu_methods import figures_of_decode, of_decode, of_methods, of_peers
from skipjack.bench.gpu_setting import CAPTURED, DRY, GPU, Finding, Setting
from skipjack.bench.gpu_speed import of_steps
from skipjack.bench.step import Figure
from skipjack.bench.targets import Measurement, best, judge, of
from skipjack.kernels import attention_rules, launch
from skipjack.kernels.ops import select
from skipjack.kernels.product_rules import RUN, WIDE_WEIGHT
from skipjack.runtime.batch import Batch
from skipjack.runtime.cache import KVCache
from skipjack.runtime.methods.policy import PlannedSteps
from skipjack.runtime.model import Model
from skipjack.runtime.request import SamplingParams

ROOT = Path(__file__).parent.parent


def test_the_table_is_whole_and_its_levels_rise() -> None:
    assert list(dict.fromkeys(t.id for t in targets.TARGETS)) == [f"T{i}" for i in range(1, 19)]
    assert len({t.key for t in targets.TARGETS}) == len(targets.TARGETS)
    for target in targets.TARGETS:
        levels = [target.must, target.target, target.moonshot]
        assert levels == sorted(levels, reverse=not target.higher), target.key
    decided = {id for part in gpu.PARTS.values() for id in part.ids}
    assert decided == {t.id for t in targets.TARGETS}


@pytest.mark.parametrize(
    ("id", "case", "value", "passed", "result"),
    [
        ("T2", "8b", 0.92, [True, True, False], "target"),
        ("T2", "8b", 0.86, [False, False, False], "falls short"),
        ("T1", "1b", 6e-6, [True, True, True], "moonshot"),
        ("T1", "1b", 12e-6, [True, False, False], "must"),
        ("T18", "engine", 0, [True, True, True], "moonshot"),
        ("T18", "engine", 1, [False, False, False], "falls short"),
        ("T14", "exact", 0.9999, [False, False, False], "falls short"),
        ("T10", "glue", None, [None, None, None], "not measured"),
    ],
)
def test_a_measurement_decides_three_levels(
    id: str, case: str, value: float | None, passed: list[bool | None], result: str
) -> None:
    chosen = [target for target in of([id]) if target.case == case]
    rows = judge(chosen, [Measurement(id, case, value)])
    assert [row.level for row in rows] == ["must", "target", "moonshot"]
    assert [row.passed for row in rows] == passed
    assert {row.measured for row in rows} == {value}
    assert best({row.level: row.passed for row in rows}) == result


def test_what_was_not_measured_is_not_passed_and_what_has_no_target_is_an_error() -> None:
    assert {row.passed for row in judge(of(["T1", "T14"]), [])} == {None}
    with pytest.raises(KeyError):
        judge(of(["T1"]), [Measurement("T2", "8b", 1.0)])


def test_steps_give_bubble_shares_and_ratios() -> None:
    def figure(name: str, rows: int, median: float, share: float | None = None) -> Figure:
        return Figure(name, "" if "band" in name else "1b", rows, median, None, None, 4_000_000_000, 0, share)

    found = [figure("copy bandwidth", 0, 4e12), figure("step", 1, 1.16e-3, 0.86)]
    found += [figure("step", 8, 1.276e-3), figure("step", 16, 1.45e-3)]
    found += [figure(name, 1, 1e-5, share) for name, share in (("up", 0.9), ("down", 0.8), ("head", 0.7))]
    values = {(m.id, m.case): m.value for m in of_steps("1b", 16, found)}
    assert values == pytest.approx(
        {
            ("T1", "1b"): 1e-5,
            ("T3", "1b"): 0.86,
            ("T5", "1b up"): 0.9,
            ("T5", "1b down"): 0.8,
            ("T5", "1b head"): 0.7,
            ("T6", "1b"): 1.1,
            ("T7", "1b"): 1.25,
        }
    )


def test_figures_of_passes_and_rounds_stand_beside_their_measurements() -> None:
    spread = {"median": 2e-3, "p10": 1e-3, "p90": 3e-3}
    one = {"kind": "draft", "layers": 8, "rows": 1, "seconds": spread, "bytes": 1000, "share": 0.9}
    own = {"method": "swift:a=1", "rate": 0.8, "k": 4, "rounds": 20, "mean_length": 3.2, "seconds": spread}
    own |= {"draft": 4e-4, "verify": 8e-4, "plain": spread, "speed": spread, "possible": 1.5}
    draft, turn = figures_of_decode("1b", {"passes": [one], "rounds": [own]})
    assert (draft.name, draft.shape, draft.rows, draft.median, draft.share) == ("draft, 8 layers", "1b", 1, 2e-3, 0.9)
    assert (turn.name, turn.rows, turn.p90) == ("round of swift, 4 drafts, 0.8 accepted", 5, 3e-3)
    assert turn.note.startswith("draft 400.0 µs, verification 800.0; a token of plain decoding 2000.0 µs, 3.20 tokens")


def test_result_files_of_other_benches_are_read() -> None:
    draft = [{"kind": "draft", "layers": n, "ideal": 1 + n / 100} for n in (0, 4, 8, 12, 16)]
    rounds = [{"glue": 0.03, "of_possible": 0.9}, {"glue": 0.01, "of_possible": 0.95}]
    passes = [{"kind": "verify", "layers": 16, "ideal": None}, *draft]
    result = {"passes": passes, "line": {"r2": 0.9985}, "rounds": rounds}
    values = {(m.id, m.case): m.value for m in of_decode("1b", result, "")}
    assert values == {
        ("T8", "1b f=0.25"): 1.04,
        ("T8", "1b f=0.5"): 1.08,
        ("T8", "1b f=0.75"): 1.12,
        ("T9", "1b"): 0.9985,
        ("T10", "glue"): 0.03,
        ("T11", "1b"): 0.9,
    }
    assert list(figures_of_decode("1b", {})) == []
    missing = list(of_decode("1b", {}, "no such command"))
    assert {(m.value, m.note) for m in missing} == {(None, "no such command")}
    line = {"peer": "transformers static cache + compile", "unavailable": None, "ratio": 1.7}
    loop = {"peer": "torch.compile loop (max-autotune)", "unavailable": "out of memory", "ratio": 0.0}
    static, compiled = of_peers("1b", {"summary": [line, loop]}, "")
    assert (static.value, compiled.value, compiled.note) == (1.7, None, "out of memory")


def test_methods_on_real_weights_are_checked_before_their_speed_is_told() -> None:
    line = {"method": "lookup", "category": "rag", "prompts": 3, "identical": 3, "tokens": 384, "speed": 1.5}
    line |= {"speed_p10": 1.25, "speed_p90": 1.75, "mean_acceptance_length": 1.64}
    found = list(of_methods({"model": "demo", "summary": [line, line | {"identical": 2}]}, ""))
    same, speed, other = found
    assert isinstance(same, Finding)
    assert isinstance(other, Finding)
    assert isinstance(speed, Figure)
    assert (same.passed, other.passed, same.count) == (True, False, 384)
    assert speed.note == "speed ÷ plain 1.50 (1.25–1.75), 1.64 tokens a round"
    (missing,) = of_methods({}, "no weights")
    assert (missing.passed, missing.detail) == (None, "no weights")
    *kept, late = of_methods({"model": "demo", "summary": [line]}, "no answer in 400 s")
    assert len(kept) == 2
    assert isinstance(late, Finding)
    assert (late.passed, late.detail) == (None, "no answer in 400 s")


def test_no_speed_beside_a_text_that_differs() -> None:
    line = {"method": "auto", "category": "all", "prompts": 3, "tokens": 384, "identical": 2, "speed": 1.5}
    spread = {"speed_p10": 1.25, "speed_p90": 1.75, "mean_acceptance_length": 1.64}
    (found, why) = of_methods({"model": "demo", "summary": [line | spread]}, "bench methods: NOT IDENTICAL")
    assert (found.passed, found.detail) == (False, "2 of 3 texts are plain decoding's")
    assert why.detail == "bench methods: NOT IDENTICAL"


@pytest.mark.parametrize(("ends", "told"), [("sys.exit(1)", "wrong"), ("time.sleep(60)", "no answer in 20 s")])
def test_what_a_bench_had_found_is_read_though_it_broke_off(
    ends: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = "import json, pathlib, sys, time; pathlib.Path(sys.argv[-1]).write_text(json.dumps({'rows': 3}))"
    monkeypatch.setattr(gpu_methods, "SKIPJACK", f"{writes}; print('wrong', file=sys.stderr); {ends}")
    result, problem = gpu_methods._bench(["methods"], 20 if "sleep" in ends else 60)
    assert result == {"rows": 3}
    assert told in problem


def _part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: object, *, checked: bool = False) -> tuple[int, dict]:
    monkeypatch.setitem(gpu.PARTS, "steps", replace(gpu.PARTS["steps"], run=run, checked=checked))
    done = CliRunner().invoke(gpu.app, ["2", "--dry-run", "--output", str(tmp_path)])
    return done.exit_code, json.loads((tmp_path / "gpu-steps-dry-run.json").read_text())


def test_a_part_that_breaks_keeps_what_it_had_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(setting: Setting) -> Iterator[Figure | Measurement]:
        yield Figure("step", "1b", 1, None, None, None, 0, 0, None)
        yield Measurement("T3", "1b", 0.99)
        raise RuntimeError("the device is gone")

    code, result = _part(monkeypatch, tmp_path, breaks)
    assert code == 1
    assert result["broken"] == "RuntimeError: the device is gone"
    assert len(result["figures"]) == 1
    assert {(row["measured"], row["passed"]) for row in result["rows"]} == {(None, None)}, "a dry run passes nothing"
    assert {"python", "torch", "triton", "commit"} <= set(result["machine"])


class Wrong:
    """The Triton table, one op of which is not what it was."""

    def __init__(self, name: str, op: Callable[..., Any]) -> None:
        self._ops, self._name, self._op = select("triton"), name, op

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._ops, name)
        return partial(self._op, own) if name == self._name else own


@pytest.mark.parametrize(
    ("part", "name", "op", "told"),
    [
        (
            "settled",
            "linear",
            lambda own, *given, settled, **more: own(*given, **more) + settled,
            "down, 5 rows, some",
        ),
        ("widths", "attend", lambda own, q, k, v, index, **more: own(q, k, v, index, **more) * index.width, "after 60"),
        ("order", "linear", lambda own, *given, active=None, **more: own(*given, **more), "misread them: 4,"),
    ],
)
def test_bits_that_differ_are_found(
    monkeypatch: pytest.MonkeyPatch, part: str, name: str, op: Callable[..., Any], told: str
) -> None:
    (right,) = gpu_parts.PARTS[part](DRY)
    monkeypatch.setattr(gpu_bits, "select", lambda _: Wrong(name, op))
    (wrong,) = gpu_parts.PARTS[part](DRY)
    assert (right.passed, wrong.passed) == (True, False)
    assert told in wrong.detail


def test_no_speed_beside_a_wrong_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(setting: Setting) -> Iterator[Finding]:
        yield Finding("ops", "linear", False, "relative error 1")

    def speed(setting: Setting) -> Iterator[Measurement]:
        raise AssertionError("a speed was measured")
        yield

    monkeypatch.setitem(gpu_parts.PARTS, "ops", wrong)
    code, result = _part(monkeypatch, tmp_path, speed, checked=True)
    assert (code, result["broken"]) == (1, "no figures: a check failed")


def test_captured_rounds_are_held_against_those_of_the_host() -> None:
    (finding,) = gpu_parts.graphs(replace(DRY, captured=(("tiny-dmtd", "dmtd"),)))
    assert (finding.name, finding.passed) == ("tiny-dmtd dmtd", True)


def test_captured_rounds_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PlannedSteps.step

    def wrong(self: PlannedSteps, model: Model, cache: KVCache, batch: Batch, *rest: Any) -> Any:
        hidden, ran = step(self, model, cache, batch, *rest)
        return (-hidden if batch.alone else hidden), ran

    monkeypatch.setattr(PlannedSteps, "step", wrong)
    (finding,) = gpu_parts.graphs(replace(DRY, captured=(("tiny", "unified:speedup=2"),)))
    assert not finding.passed
    assert "9 continuations differ" in finding.detail


def test_steps_run_dry_through_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("skipjack.bench.step.ROWS", (1, 8, 16))
    monkeypatch.setattr("skipjack.bench.step.DRY_FIELDS", {"num_hidden_layers": 1, "vocab_size": 64})
    code, result = _part(monkeypatch, tmp_path, gpu.PARTS["steps"].run)
    assert (code, result["broken"]) == (0, None)
    assert {figure["name"] for figure in result["figures"]} == {
        *("qkv", "attend", "output", "up", "down", "head", "step"),
        *(f"step, {change}" for change in ("fast", "nothing ahead", "ahead of any weight", "whole steps")),
        *(f"step, attention of {rows}" for rows in (32, 16)),
        *(f"sample, {name}" for name in sampled.CHOICES),
        "rejection, top-p 0.9",
    }
    usual = launch.AHEAD_BYTES, launch.AHEAD_OF, RUN, WIDE_WEIGHT, attention_rules.FEW_ROWS
    assert usual == (8 << 20, 128 << 20, 64, 2048, 8), "constants are as they were"
    assert {row["note"] for row in result["rows"] if row["id"] == "T6" and row["case"] == "8b"} == {
        "dry run, not measured"
    }


def test_rounds_run_dry_and_each_kind_drafts_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_rounds, "DRY_TOKENS", 12)
    code, result = _part(monkeypatch, tmp_path, gpu.PARTS["rounds"].run)
    assert (code, result["broken"]) == (0, None)
    rounds = {one["name"]: one["note"] for one in result["figures"] if one["name"].startswith("round, ")}
    drafted = {name: float(note.split()[4]) / float(note.split()[0]) for name, note in rounds.items()}
    assert len(rounds) == 13
    for name, mean in drafted.items():
        if "plain" in name:
            assert mean == 0
        elif "all end" in name:
            assert mean <= 1
        else:
            assert mean > 1.5, name
    assert sum(one["name"].startswith("lookup, ") for one in result["figures"]) == 6
    assert all(one["median"] is None for one in result["figures"]), "a dry run times nothing"


def test_every_lossless_method_is_held_against_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    methods: list[str] = []

    class Plain:
        config = SimpleNamespace(num_layers=16)

        def generate(self, prompts: list[Any], params: SamplingParams, method: str = "") -> Any:
            if not method:
                return SimpleNamespace(token_ids=[7] * params.max_tokens)
            methods.append(method)
            return [self.generate(prompt, params) for prompt in prompts]

    monkeypatch.setattr(gpu_speed, "engine_of", lambda *_: Plain())
    *_, measured = gpu_speed.exact(GPU)
    assert measured.value == 1
    cells = {name: {cell.method(16, i) for cell in rotation.cells(name) for i in range(20)} for name in rotation.NAMES}
    assert all(cells[name] & set(methods) for name in rotation.NAMES)


def test_parts_of_a_check_make_up_the_whole() -> None:
    cases = [one for own in GPU.split("ops") for one in product(own.shapes, own.dtypes, own.cases)]
    assert sorted(cases, key=str) == sorted(product(GPU.shapes, GPU.dtypes, op_cases.CASES), key=str)
    assert [model for own in GPU.split("rows") for model in own.models()] == GPU.models()
    assert [one for own in GPU.split("graphs") for one in own.captured] == list(GPU.captured)
    assert {shape for shape, _ in GPU.captured} == set(CAPTURED)
    assert GPU.split("race") == [GPU]
    assert [own.shapes + own.large for own in GPU.split("widths")] == [("135m",), ("1b",), ("8b",)]


def test_parts_run_in_processes_of_their_own_and_one_that_breaks_fails_alone() -> None:
    nowhere = replace(DRY, shapes=("no such shape",))
    (name, findings), (other, lost) = sorted(gpu_check.together([("compile", DRY), ("rows", nowhere)]))
    assert (name, [finding.detail for finding in findings]) == ("compile", ["the interpreter compiles nothing"])
    assert (other, [finding.passed for finding in lost]) == ("rows", [False])


def test_what_takes_longest_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(gpu_check, "together", lambda jobs: [(begun.append(name), ()) for name, _ in jobs])
    assert not list(gpu_check.run(replace(DRY, dry=False), gpu_parts.PARTS))
    assert begun[:2] == ["race", "compile"]
    assert set(begun) == set(gpu_parts.PARTS)


@pytest.mark.parametrize(
    ("on", "off", "passed", "told"),
    [
        ("[1, 2]", "[1, 2]", True, "dependent launch on and off: equal"),
        ("[1, 2]", "[1, 3]", False, "dependent launch on and off: DIFFERENT"),
        ("", "[1]", False, "SKIPJACK_PDL=1: lost the device"),
        ("", "", False, "SKIPJACK_PDL=1: lost the device; SKIPJACK_PDL=0: lost the device"),
    ],
)
def test_long_runs_with_and_without_dependent_launch_are_beside_each_other(
    on: str, off: str, passed: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Barrier(2)

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        both.wait(timeout=20)
        tokens = on if env["SKIPJACK_PDL"] == "1" else off
        return SimpleNamespace(returncode=int(not tokens), stdout=f"\n{tokens}\n", stderr="lost the device")

    monkeypatch.setattr(gpu_parts.subprocess, "run", run)
    (found,) = gpu_parts.races(DRY)
    assert (found.passed, found.detail) == (passed, told)


def test_a_process_that_dies_takes_no_other_with_it() -> None:
    jobs = [("__import__('os')._exit(1)",), ("1 + 1",)]
    done = dict(gpu_check.in_processes(eval, jobs))
    assert isinstance(done[jobs[0]].exception(), BrokenProcessPool)
    assert done[jobs[1]].result() == 2


def test_parts_have_numbers_names_and_a_script() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8")
    assert f"parts='{' '.join(gpu.PARTS)}'" in script
    assert f"(1 to {len(gpu.PARTS)}, or its name" in script
    unknown = CliRunner().invoke(gpu.app, ["nonsense", "--dry-run"])
    assert unknown.exit_code == 2
    assert DRY.named(("8b", "1b")) == {"8b": "tiny-llama"}
