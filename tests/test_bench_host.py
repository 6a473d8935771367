"""`bench host`: rounds without a device, and honest ones again afterwards."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from skipjack import Engine, SamplingParams
from skipjack.bench import figures, host
from skipjack.bench.methods import load
from skipjack.runtime import round_graph
from skipjack.runtime.commands import cli
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods.base import Method
from skipjack.runtime.methods.lookup import Lookup


@pytest.fixture
def engine() -> Iterator[Engine]:
    with load("synthetic:tiny:0.3", "float32", graphs=True) as engine:
        yield engine


def test_every_draft_token_is_accepted_and_no_pass_runs(engine: Engine) -> None:
    params, honest = SamplingParams(max_tokens=40, ignore_eos=True), round_graph.device_round
    plain = engine.generate([5, 6, 7], params)
    passes, forward = [], engine._loaded()[0].forward

    def counted(*given: object, **named: object) -> object:
        passes.append(given)
        return forward(*given, **named)

    engine._loaded()[0].forward = counted
    try:
        line = host.measure(engine, "swift:num_draft_tokens=3,threshold=0,search_budget=0", 2, 20)
    finally:
        del engine._loaded()[0].forward
    assert (line.sequences, line.emitted) == (2, 4)
    assert 0 < line.seconds.p10 <= line.seconds.median <= line.seconds.p90
    assert len(passes) == 2, "a prompt for the probe, and those of both sequences together"
    assert round_graph.device_round is honest
    assert engine.generate([5, 6, 7], params).token_ids == plain.token_ids


def test_steps_of_a_policy_are_measured_too(engine: Engine) -> None:
    honest = round_graph.device_steps
    line = host.measure(engine, "unified:speedup=2", 1, 20)
    assert (line.emitted, line.seconds.median > 0) == (1, True)
    assert round_graph.device_steps is honest


def test_a_method_the_host_steers_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lookup, "recipe", Method.recipe)
    with pytest.raises(RequestError, match=r"--method.*lookup"):
        host.measure(engine, "lookup:max_ngram=2", 1, 20)


def test_the_command_writes_a_result_that_the_tables_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "host.json"
    arguments = ["bench", "host", "synthetic:tiny:0.3", "--sequences", "2", "--rounds", "16", "--output", str(path)]
    assert cli.run([*arguments, "--method", "autoregressive"]) == 0
    result = json.loads(path.read_text())
    assert result["lines"][0]["sequences"] == 2
    assert "autoregressive" in capsys.readouterr().out
    assert "| autoregressive | 2 | 1 |" in figures.table([path])
