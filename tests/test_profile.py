"""`bench profile`: the table adds up, and the timeline has the ranges of the rounds that were asked for."""

import json
from pathlib import Path

import pytest
import torch

from skipjack.bench.profile import breakdown
from skipjack.runtime.commands import cli


def test_the_parts_of_a_round_add_up() -> None:
    spans = [("prefill S=1 R=9", 5.0), ("round S=1 R=1", 6.0), ("round S=1 R=1", 4.0), ("aten::mm", 7.0)]
    spans += [("draft[0] S=1 R=1", 2.0), ("draft[10] S=1 R=1", 0.5), ("draft[2] S=1 R=1", 0.5)]
    spans += [("verify S=1 R=2", 3.0), ("verify S=1 R=1", 2.0), ("commit S=1 R=1", 0.5)]
    shares = breakdown(spans)
    assert [share.part for share in shares] == ["draft[0]", "draft[2]", "draft[10]", "verify", "commit", "other"]
    assert [share.share for share in shares] == pytest.approx([0.2, 0.05, 0.05, 0.5, 0.05, 0.15])
    assert [share.count for share in shares] == [1, 1, 1, 2, 1, 2]
    assert shares[3].round_ms == pytest.approx(2500.0)
    assert breakdown([("prefill S=1 R=9", 5.0)]) == []


def test_a_profile_is_a_timeline_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    method = "swift:skip_attention=2+3,num_draft_tokens=2,threshold=0"
    options = ["--method", method, "--rounds", "2", "--warm-up", "1", "--batch", "2", "--trace", str(trace), "--json"]
    assert cli.run(["bench", "profile", "synthetic:tiny:0.1", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    parts = {part["part"]: part for part in result["parts"]}
    assert list(parts) == ["draft[0]", "draft[1]", "verify", "commit", "other"]
    assert all(part["count"] == 2 for part in parts.values())
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert all(part["share"] > 0 for part in parts.values())
    times = [op["self_ms"] for op in result["ops"]]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(op["share"] for op in result["ops"]) <= 1 + 1e-9
    assert not any(op["name"].startswith(("round", "verify")) for op in result["ops"])
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("round S=2 R=2") == names.count("verify S=2 R=6") == 2
    assert not any(str(name).startswith("prefill") for name in names)


def test_a_profile_is_written_and_has_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    options = ["--method", "lookup", "--rounds", "2", "--output", str(path)]
    assert cli.run(["bench", "profile", "synthetic:tiny:0.1", *options]) == 0
    result = json.loads(path.read_text())
    shown = capsys.readouterr().out
    assert cli.run(["bench", "table", str(path)]) == 0
    table = capsys.readouterr().out
    for part in result["parts"]:
        assert f"| {part['part']} | {part['count']} | {part['round_ms']:.3f} | {part['share']:.1%} |" in table
        assert f"{part['round_ms']:.3f}" in shown
    assert f"| {result['ops'][0]['name']} | {result['ops'][0]['count']} |" in table


def test_a_profile_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["bench", "profile", "synthetic:tiny:0.1"]
    assert cli.run([*model, "--profiler", "nsight", "--trace", str(tmp_path / "t.json")]) == 2
    assert "--trace" in capsys.readouterr().err
    assert cli.run([*model, "--profiler", "nsight", "--output", str(tmp_path / "t.json")]) == 2
    assert "--output" in capsys.readouterr().err
    assert cli.run([*model, "--rounds", "100000"]) == 2
    assert "context of 1024, got 100003" in capsys.readouterr().err
    if torch.version.cuda is None:
        assert cli.run([*model, "--profiler", "nsight"]) == 2
        assert "no NVTX" in capsys.readouterr().err
