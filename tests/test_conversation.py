"""`bench chat`: what the prefix cache saves, and that it changes nothing."""

import json

import pytest

from skipjack.bench.figures import SHEETS
from skipjack.runtime.cache import KVCache
from skipjack.runtime.commands import cli

LINE = ["bench", "chat", "synthetic:tiny", "--turns", "3", "--pairs", "2", "--max-tokens", "3", "--json"]


def test_every_turn_reads_what_is_new_and_the_last_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(LINE) == 0
    result = json.loads(capsys.readouterr().out)
    prompts = [row["prompt_tokens"] for row in result["rows"]]
    # Prompts of 32 tokens or fewer, an answer of three after each.
    assert prompts[1] - prompts[0] in range(4, 36)
    assert [row["cached_tokens"] for row in result["rows"]] == [0, *prompts[:2]]
    assert {row[name]["count"] for row in result["rows"] for name in ("without", "cached", "ratio")} == {2}
    assert len(SHEETS["chat"](result).rows) == 3


def test_no_time_is_told_where_answers_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is told to lie there was never copied.
    monkeypatch.setattr(KVCache, "copy", lambda *_: None)
    assert cli.run(LINE) == 1
    streams = capsys.readouterr()
    assert "NOT IDENTICAL" in streams.err
    assert streams.out == ""
