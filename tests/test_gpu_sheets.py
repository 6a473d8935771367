"""Tables of what a GPU's parts found, from the result files there are and from ones that went wrong."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from skipjack.bench import gpu_speed
from skipjack.bench.figures import table
from skipjack.bench.gpu_setting import DRY
from skipjack.bench.gpu_sheets import sheets
from skipjack.bench.record import read
from skipjack.bench.step import Figure
from skipjack.bench.targets import Measurement
from skipjack.runtime.errors import ConfigError

RESULTS = Path(__file__).parent.parent / "bench" / "results"
FILES = [path for card in ("gpu-h100", "gpu-h200") for path in sorted((RESULTS / card).glob("*-*.json"))]


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name} {path.stem}" for path in FILES])
def test_every_result_of_a_gpu_has_tables(path: Path) -> None:
    text = table([path])
    assert text.count("\n|---|") >= 1
    assert read(path)["machine"]["gpu"] in text


def test_a_steps_table_says_what_its_targets_were_measured_as() -> None:
    result = read(RESULTS / "gpu-h200" / "steps-18e2860.json")
    measured = {(row["id"], row["case"]): row["measured"] for row in result["rows"]}
    steps = next(sheet for sheet in sheets(result) if sheet.title.startswith("A step"))
    assert [row[0] for row in steps.rows] == ["8b", "1b", "135m"]
    for row, share in zip(steps.rows, ("T2", "T3", "T4"), strict=True):
        line = dict(zip(steps.columns, row, strict=True))
        assert float(line["bubble a layer, µs"]) == pytest.approx(1e6 * measured["T1", row[0]], abs=0.06)
        assert float(line["% of a copy's bandwidth"]) == pytest.approx(100 * measured[share, row[0]], abs=0.06)
        assert float(line["8 rows ÷ 1"]) == pytest.approx(measured["T6", row[0]], abs=0.006)


def test_what_failed_and_what_was_not_run_is_named() -> None:
    checks = [
        {"part": "ops", "name": "linear", "passed": True, "detail": "fine"},
        {"part": "ops", "name": "head", "passed": False, "detail": "relative error 1"},
        {"part": "demo", "name": "exact", "passed": None, "detail": "no weights"},
    ]
    machine = {"gpu": "A card", "torch": "2", "date": "2026-11-27T00:00:00"}
    (found,) = sheets({"bench": "gpu-check", "machine": machine, "findings": checks})
    assert found.rows == (
        ("ops", "1 of 2", "FAILED head: relative error 1"),
        ("demo", "0 of 1", "not run exact: no weights"),
    )


def test_a_file_of_another_shape_is_an_error_that_names_its_command(tmp_path: Path) -> None:
    path = tmp_path / "gpu-steps.json"
    path.write_text(json.dumps({"bench": "gpu-steps", "figures": 3}))
    with pytest.raises(ConfigError, match=r"expected a result of `bench/gpu.sh steps`"):
        table([path])
    path.write_text(json.dumps({"bench": "nothing"}))
    with pytest.raises(ConfigError, match=r"no table for results of 'nothing'; there is one for .*gpu-PART"):
        table([path])


def test_a_shape_is_judged_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> Iterator[Figure]:
        yield Figure("copy bandwidth", "", 0, 4e12, None, None, 0, 0, None)
        for name in ("up", "down", "head"):
            yield Figure(name, "tiny-llama", 1, 1e-5, None, None, 1, 0, 0.9)
        for rows in (1, 8, 16):
            yield Figure("step", "tiny-llama", rows, 1e-3, None, None, 1_000_000, 0, 0.5)
        yield Figure("qkv", "another", 1, 1e-5, None, None, 1, 0, 0.9)
        raise RuntimeError("the time is up")

    monkeypatch.setattr(gpu_speed, "figures", breaks)
    found: list[Figure | Measurement] = []
    with pytest.raises(RuntimeError, match="the time is up"):
        found.extend(gpu_speed.steps(DRY))
    judged = [one.id for one in found if isinstance(one, Measurement)]
    assert judged == ["T1", "T2", "T5", "T5", "T5", "T6", "T7"]
