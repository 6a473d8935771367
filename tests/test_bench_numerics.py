"""`skipjack bench numerics`: fast numerics against exact ones."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.bench import figures, numerics
from skipjack.bench.numerics import Gap, Row, compare, gaps, summary, trusted
from skipjack.bench.prompts import Prompt
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.commands.cli import run

PROMPTS = [Prompt("short", "abc"), Prompt("long", "a longer prompt of some thirty bytes")]


@cache
def engine(kind: str, dtype: torch.dtype = torch.float32) -> Engine:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    return Engine(config, synthetic_weights(config, 0, dtype, 0.3), numerics=kind)


def test_exact_logits_do_not_follow_the_size_of_a_pass_and_choose_the_text() -> None:
    text = engine("exact").generate([5, 6, 7], SamplingParams(max_tokens=11, ignore_eos=True))
    read = [numerics.logits(engine("exact"), text.prompt_ids, text.token_ids, rows) for rows in (1, 4, 16)]
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])
    assert read[0].argmax(dim=1).tolist() == text.token_ids


def test_the_gap_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = numerics.logits

    def shifted(which: Engine, prompt: list[int], given: list[int], rows: int) -> Tensor:
        found = logits(which, prompt, given, rows)
        if which is engine("fast") and rows == 8:
            found[0] = -found[0]
        return found

    monkeypatch.setattr(numerics, "logits", shifted)
    one, eight, _ = gaps(engine("exact"), engine("fast"), PROMPTS, 6)
    assert (one.rows, one.tokens, one.changed) == (1, 12, 0)
    assert one.mean <= one.largest < 1e-4
    assert (eight.tokens, eight.changed) == (12, 2)
    assert 0 < eight.mean < eight.largest
    assert trusted([one], torch.float32)
    assert not trusted([one, eight], torch.float32)
    assert not trusted([Gap(1, 1, 0, 0.0, 0.0, float("nan"))], torch.bfloat16)


def test_texts_are_compared_up_to_where_they_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compare(engine("exact"), engine("fast"), ["autoregressive"], PROMPTS, 5, lambda row: None)
    assert [(row.category, row.tokens, row.shared, row.identical) for row in rows] == [
        ("short", 5, 5, True),
        ("long", 5, 5, True),
    ]
    assert all(row.speed > 0 and row.prompt_speed > 0 for row in rows)
    parted = [Row("m", "a", 9, 4, identical=False, speed=2.0, prompt_speed=3.0)]
    (line,) = summary([*parted, Row("m", "b", 7, 7, identical=True, speed=1.0, prompt_speed=1.0)])
    assert (line.identical, line.tokens, line.shared, line.first_difference, line.speed) == (1, 16, 11, 4, 1.5)


def test_the_command_writes_what_the_table_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numerics.json"
    command = ["bench", "numerics", "synthetic:tiny:0.3", "--max-tokens", "4", "--category", "qa", "--dtype", "float32"]
    assert run([*command, "--method", "autoregressive", "--output", str(file)]) == 0
    shown = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert (result["bench"], result["numerics"], [gap["rows"] for gap in result["gaps"]]) == (
        *("numerics", "fast"),
        [1, 8, 16],
    )
    assert result["summary"][0]["prompts"] == len(result["rows"]) == 1
    assert "most likely token changed" in shown
    assert "1 of 1" in figures.table([file])


def test_logits_that_are_wrong_print_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numerics, "trusted", lambda found, dtype: False)
    command = ["bench", "numerics", "synthetic:tiny:0.3", "--max-tokens", "2", "--category", "qa", "--dtype", "float32"]
    assert run(command) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert "RED" in captured.err
