"""The benchmarks' own arithmetic, and that a difference cannot pass for identical."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skipjack import Engine, RequestError, SamplingParams, SkipjackError
from skipjack.bench import exact, methods, options, rotation
from skipjack.bench.prompts import load
from skipjack.bench.record import write
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config
from skipjack.runtime import costs
from skipjack.runtime.commands import cli
from skipjack.runtime.request import Choice, Output, Stats

RUN = ("swift", 0, "swift", 1)


def test_bare_bench_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench"]) == 0
    printed = capsys.readouterr()
    assert "exact" in printed.out
    assert printed.err == ""


def test_every_category_has_prompts_of_its_own() -> None:
    prompts = load(None, 5)
    assert len(prompts) == 20
    assert len({p.category for p in prompts}) == 10
    assert len(load(None, 1)) == 10


def test_a_prompt_file_that_does_not_parse_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"category": "qa", "turns": ["a"]}\n{"category": "qa"}\n')
    with pytest.raises(RequestError, match=r"p\.jsonl, line 2"):
        load(path, 5)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"category": "\xff"}'])
def test_a_prompt_file_without_prompts_proves_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"p\.jsonl"):
        load(path, 5)


def test_a_byte_order_mark_belongs_to_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff{"category": "qa", "turns": ["a"]}\n', encoding="utf-8")
    assert load(path, 5)[0].text == "a"


def test_a_line_separator_inside_a_prompt_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"category": "qa", "turns": ["a\u2028b"]}\n', encoding="utf-8")
    assert load(path, 5)[0].text == "a\u2028b"


@pytest.mark.parametrize("option", ["--output", "--markdown"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("it measures"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below.json"):
        assert cli.run(["bench", "accept", "demo", option, str(path)]) == 2
        assert f"{option}: cannot write {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["methods", "--picture"], ["unified", "--picture"], ["layers", "demo", "--picture"], ["timeline"]],
    ids=str,
)
def test_a_picture_that_cannot_be_drawn_is_told_before_anything_is_measured(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("it measures"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "file").touch()
    for name, said in (
        ("file/below.svg", "cannot write"),
        ("a.gif", "expected a picture's name to end in .svg or .png"),
        ("a.svg", "pip install matplotlib"),
    ):
        assert cli.run(["bench", *command, str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


def test_identical_means_identical(demo: Engine) -> None:
    rows = exact.compare(demo, load(None, 1)[:2], SamplingParams(max_tokens=3), batch=2)
    assert [row.name for row in rows] == [name for name in rotation.NAMES for _ in range(2)]
    assert all(row.identical for row in rows)
    output = demo.generate("The sea", SamplingParams(max_tokens=4, ignore_eos=True))
    choice = output.choices[0]
    changed = replace(choice, token_ids=[*choice.token_ids[:2], 7, choice.token_ids[3]])
    shorter = replace(choice, token_ids=choice.token_ids[:3])
    assert exact._row("qa", RUN, replace(output, choices=(changed,)), output).first_difference == 2
    row = exact._row("qa", RUN, replace(output, choices=(shorter,)), output)
    assert (row.identical, row.first_difference) == (False, 3)
    line = exact.summary([*rows, row])[-1]
    assert (line.prompts, line.identical) == (len(rows) + 1, len(rows))


@pytest.mark.parametrize("name", rotation.NAMES)
def test_prompts_come_again_until_every_cell_has_had_its_turn(name: str) -> None:
    once = [i for _, group in exact.groups(name, 10) for i in group]
    assert once == list(range(10))
    found = list(exact.groups(name, 10, cover=True))
    assert [cell for cell, _ in found] == list(rotation.cells(name))
    assert all(len(group) == cell.batch for cell, group in found)
    assert [i for _, group in found for i in group] == [i % 10 for i in range(sum(map(len, (g for _, g in found))))]
    assert [len(group) for _, group in exact.groups(name, 1000, 4, cover=True)][:-1] == [4] * 249
    met = set[rotation.Pair]().union(*(rotation.pairs(cell) for cell, _ in found))
    assert met == set[rotation.Pair]().union(*(rotation.pairs(cell) for cell in rotation.cells(name)))
    levels = {(factor, level) for factor, own in rotation.factors(name).items() for level in own}
    assert all({(a, b), (b, a)} & met for a in levels for b in levels if a[0] != b[0])


@pytest.mark.parametrize(
    ("passes", "expected"), [(0, 3.0), (5, 3.0 / (1 + 0.5 * 6 / 10)), (20, 3.0 / (1 + 2 * 6 / 10))]
)
def test_the_ideal_counts_the_passes_of_layers_and_no_lookup(
    monkeypatch: pytest.MonkeyPatch, passes: int, expected: float
) -> None:
    """A method that drafts now by layers, now by a lookup, has a skip set all the time."""
    config = ModelConfig.parse(synthetic_config("tiny") | {"num_hidden_layers": 8}, "tiny")
    monkeypatch.setattr(costs, "head_layers", lambda config: 2.0)
    stats = Stats(
        "auto", True, "torch", 0, 1, 31, decode_s=1.0, rounds=10, drafted=40, accepted=20, bonus=10, layers=8,
        layers_kept=4.0, executed_skips=8 * passes, drafted_per_position=(10, 10, 10, 10),
    )  # fmt: skip
    output = Output([1], (Choice(None, list(range(31)), "length"),), stats)
    engine = SimpleNamespace(
        tokenizer=None, config=config, backend="torch", generate=lambda *given, **how: output
    )  # fmt: skip
    prompt = load(None, 1)[0]
    (row,) = methods.compare(cast("Engine", engine), ["auto"], [prompt], SamplingParams(), lambda row: None)
    assert row.ideal == pytest.approx(expected)


def test_methods_are_compared_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.delenv("SKIPJACK_PROMPTS", raising=False)
    arguments = ["--method", "lookup", "--method", "swift:skip_attention=4+5", "--per-category", "1"]
    files = ["--output", str(tmp_path / "m.json"), "--picture", str(tmp_path / "m.svg")]
    assert cli.run(["bench", "methods", "synthetic:tiny:0.1", *arguments, "--max-tokens", "8", *files]) == 0
    assert "lookup" in capsys.readouterr().out
    result = json.loads((tmp_path / "m.json").read_text())
    rows = [row for row in result["rows"] if row["method"] == "lookup"]
    assert len(rows) == 10
    for row in rows:
        assert row["ideal"] == pytest.approx(1 + row["accepted"] / row["rounds"]), "a lookup costs no model time"
        assert row["speed"] > 0
    line = result["summary"][-1]
    assert (line["category"], line["prompts"], line["identical"]) == ("all", 10, 10)
    assert "<svg" in (tmp_path / "m.svg").read_text()


def test_whoever_is_ended_while_a_result_is_written_leaves_that_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "deep" / "m.json", Path.write_text
    write({"bench": "gpu-check", "findings": [1]}, path)

    def half(self: Path, text: str, **how: Any) -> None:
        whole(self, text[: len(text) // 2], **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write({"bench": "gpu-check", "findings": [1, 2]}, path)
    assert json.loads(path.read_text())["findings"] == [1]
    monkeypatch.undo()
    write({"bench": "gpu-check"}, Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def test_a_comparison_that_breaks_keeps_its_rows_and_a_text_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKIPJACK_PROMPTS", raising=False)
    honest, path, count = methods._row, tmp_path / "m.json", 0

    def run(*given: Any) -> methods.Row:
        nonlocal count
        count += 1
        if count == 4:
            raise RequestError("the device is gone")
        return replace(honest(*given), identical=count % 3 > 0)

    monkeypatch.setattr(methods, "_row", run)
    arguments = ["--method", "lookup", "--per-category", "1", "--max-tokens", "4", "--output", str(path)]
    assert cli.run(["bench", "methods", "synthetic:tiny:0.1", *arguments]) == 2
    assert [row["identical"] for row in json.loads(path.read_text())["rows"]] == [True, True, False]
    count = 4
    assert cli.run(["bench", "methods", "synthetic:tiny:0.1", *arguments]) == 1
    shown, result = capsys.readouterr(), json.loads(path.read_text())
    assert "NOT IDENTICAL" in shown.err
    assert not shown.out, "no speed is shown"
    assert (result["summary"][-1]["identical"], result["summary"][-1]["prompts"]) == (7, 10)


def test_a_timeline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "t.svg"
    assert cli.run(["bench", "timeline", str(path), "--model", "synthetic:tiny:0.1", "--max-tokens", "90"]) == 0
    assert "<svg" in path.read_text()


@pytest.mark.parametrize("scale", ["loud", "nan", "inf", "", "1:2"])
def test_a_synthetic_model_of_no_finite_scale_is_refused(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "methods", f"synthetic:tiny:{scale}"]) == 2
    assert "expected synthetic:SHAPE[:LATE_SCALE]" in capsys.readouterr().err


def test_late_layers_of_a_synthetic_model_count_as_the_others_unless_it_says(tmp_path: Path) -> None:
    with (
        methods.load("synthetic:tiny-llama", "float32") as plain,
        methods.load("synthetic:tiny-llama:1", "float32") as spelled_out,
    ):
        assert plain.generate([3, 4, 5]).token_ids == spelled_out.generate([3, 4, 5]).token_ids


def test_tokens_are_compared_of_a_model_without_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.run(["bench", "exact", "synthetic:tiny-llama", "--per-category", "1", "--max-tokens", "8", "--json"]) == 0
    )
    line = json.loads(capsys.readouterr().out)["summary"][-1]
    assert line["identical"] == line["prompts"] > 0


def test_one_method_is_held_against_plain_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "exact", "synthetic:tiny-llama", "--per-category", "1", "--max-tokens", "8", "--json"]
    assert cli.run([*command, "--method", "lookup", "--method", "swift"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in result["rows"]} == {"lookup", "swift", "swift search"}
    assert result["pairs"]["clasp"].startswith("0 of ")
    for wrong in ("lookup:tree=true", "unified"):
        assert cli.run([*command, "--method", wrong]) == 2
        assert "--method: expected a lossless method without options (swift, lookup, " in capsys.readouterr().err


def test_more_tokens_than_the_context_has_room_for_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "decode", "synthetic:tiny-llama", "--context", "1000", "--tokens", "64"]) == 2
    assert "--context and --tokens: expected 1024 together" in capsys.readouterr().err


def test_rows_are_counted_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for terminal, expected in ((False, ["3 of 7", "6 of 7"]), (True, [f"{i} of 7" for i in range(1, 8)])):
        told.clear()
        monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda terminal=terminal: terminal))
        progress = options.counted(told.append, 7, every=3)
        for _ in range(7):
            progress(None)
        assert told == expected


def test_prompts_that_are_not_there_are_refused() -> None:
    assert {prompt.category for prompt in options.chosen(None, 2, ["qa"])} == {"qa"}
    with pytest.raises(SkipjackError, match=r"--category: .*, got nonsense"):
        options.chosen(None, 2, ["nonsense"])
