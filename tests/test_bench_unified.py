"""`skipjack bench unified`: its three experiments on a small random model, and the gate before any speed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skipjack import Engine
from skipjack.bench import unified as experiments
from skipjack.runtime.commands import cli


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, cut down to seconds."""
    for name, value in {"SPEEDUPS": (2.0, 8.0), "SCALING": (2.0,), "BATCHES": (1, 2), "SEEDS": (0, 1)}.items():
        monkeypatch.setattr(experiments, name, value)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"category": "{name}", "turns": ["x"]}}\n' for name in "aab"))
    return ["bench", "unified", "synthetic:tiny:0.3", "--prompts", str(prompts), "--max-tokens", "5", "--pairs", "2"]


def test_all_three_experiments(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = ["--output", str(tmp_path / "u.json"), "--picture", str(tmp_path / "u.svg")]
    assert cli.run([*arguments, *files]) == 0
    printed = capsys.readouterr()
    assert "agreement with the full model" in printed.out
    assert "predicted" in printed.out
    assert cli.run(["bench", "table", str(tmp_path / "u.json")]) == 0
    assert "Unified Layer Skipping: synthetic:tiny:0.3, float32" in capsys.readouterr().out
    assert "scaling 2 of 2" in printed.err
    assert "<svg" in (tmp_path / "u.svg").read_text()
    result = json.loads((tmp_path / "u.json").read_text())
    assert result["machine"]["torch"]

    lines = {(line["speedup"], line["pattern"], line["category"]): line for line in result["patterns"]}
    assert len(lines) == (1 + 2 * 4) * 3
    assert lines[1, "full", "all"]["agreement"] == 1
    assert [lines[speedup, "balanced", "a"]["kept"] for speedup in (2, 8)] == [4, 2]
    assert lines[2, "random", "a"]["tokens"] == 2 * lines[2, "balanced", "a"]["tokens"] == 20
    assert all(0.2 <= line["agreement"] <= 1 for line in lines.values()), "first tokens come from the prompt's pass"

    assert result["batches"] == [{"speedup": 2, "batch": 2, "prompts": 3, "identical": 3}]
    one, two = result["scaling"]
    assert (one["batch"], two["batch"], one["kept"], one["of"], one["pairs"]) == (1, 2, 4, 8, 2)
    head = 512 * 64 / (2 * (4 + 2) * 16 * 64 + 3 * 64 * 128)
    assert one["predicted"] == pytest.approx((8 + head) / (4 + head))
    assert one["ratio"] == pytest.approx(one["measured"] / one["predicted"])


def test_speeds_are_medians_of_pairs(synthetic: Callable[..., Engine]) -> None:
    times = np.array([[3.0, 1.0], [4.0, 2.0], [5.0, 4.0]])
    line = experiments._scale(synthetic("tiny"), 2.0, 1, 8, times)
    assert (line.measured, line.plain_tokens_per_s, line.tokens_per_s) == (2.0, 2.0, 4.0)
    assert line.measured_p10 < line.measured < line.measured_p90


def test_no_speed_of_a_batch_that_differs(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    differing = [experiments.Batch(2.0, 8, 3, 2)]
    monkeypatch.setattr(experiments, "batches", lambda *_: differing)
    assert cli.run(arguments) == 1
    printed = capsys.readouterr()
    assert "BATCHES DIFFER" in printed.err
    assert printed.out == ""
