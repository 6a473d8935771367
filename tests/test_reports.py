"""Acceptance, latency, projection, pictures and tables: their arithmetic, and that devices never mix."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skipjack import ConfigError, Engine, SamplingParams
from skipjack.bench import accept, figures, latency, project
from skipjack.bench.prompts import Prompt
from skipjack.bench.published import PUBLISHED, Published
from skipjack.bench.record import Spread, markdown, read
from skipjack.runtime.commands import cli
from skipjack.runtime.costs import Costs, expected_tokens

CPU = {"device": "X", "threads": 2, "torch": "2.13", "date": "2026-01-02T03:04:05"}
GPU = CPU | {"gpu": "Y"}
PLACE = {"machine": CPU, "model": "m", "dtype": "bfloat16", "backend": "torch"}
# h + f linear: 2 ms for the head, 1 ms a layer.
COSTS: dict[str, Any] = {
    "shape": "m",
    "layers": 8,
    "t_decode": 0.010,
    "t_draft": {"2": 0.004, "4": 0.006, "6": 0.008},
    "t_verify": {"1": 0.010, "8": 0.010, "16": 0.018},
}


def decode_result(machine: dict[str, Any]) -> dict[str, Any]:
    """COSTS as `bench decode` writes them, and rounds with forced acceptance."""
    passes = [
        {"kind": kind, "rows": int(n) if kind == "verify" else 1, "layers": 8 if kind == "verify" else int(n),
         "seconds": {"median": seconds}}
        for kind, name in (("verify", "t_verify"), ("draft", "t_draft"))
        for n, seconds in COSTS[name].items()
    ]  # fmt: skip
    speed = {"median": 1.2, "p10": 1.1, "p90": 1.3}
    rounds = [{"method": "swift:a=1", "k": 3, "rate": rate, "speed": speed, "possible": 1.4} for rate in (0.9, 0.5)]
    return {"bench": "decode", **PLACE, "machine": machine, "passes": passes, "rounds": rounds}


def accept_row(category: str, drafted: tuple[int, ...], accepted: tuple[int, ...], rounds: int) -> accept.Row:
    return accept.Row("swift", category, 5, 20, rounds, sum(drafted), sum(accepted), drafted, accepted, 6.0, 8)


def test_acceptance_adds_up_before_it_divides() -> None:
    rows = [accept_row("qa", (4, 4), (3, 1), 4), accept_row("writing", (6,), (6,), 6)]
    first, _, whole = accept.summary(rows)
    assert (first.acceptance_rate, first.mean_acceptance_length) == (0.5, 2.0)
    assert first.acceptance_per_position == (0.75, 0.25)
    assert (whole.category, whole.drafted, whole.accepted) == ("all", 14, 10)
    assert whole.acceptance_per_position == (0.9, 0.25)
    assert whole.mean_acceptance_length == 2.0


def test_acceptance_of_real_rounds(synthetic: Callable[..., Engine], tmp_path: Path) -> None:
    """With late layers that do nothing a draft that skips them is always right; the last round is cut by max_tokens."""
    engine = synthetic(late_scale=0.0)
    method = "swift:skip_attention=4+5+6,skip_mlp=4+5+6,threshold=0,num_draft_tokens=2"
    seen: list[accept.Row] = []
    rows = accept.measure(
        engine, [method], [Prompt("qa", "salt")], SamplingParams(max_tokens=7, ignore_eos=True), seen.append
    )
    assert rows == seen
    (line, _) = accept.summary(rows)
    assert line.acceptance_per_position == (1.0, 1.0)
    assert (line.drafted, line.accepted, line.rounds, line.mean_acceptance_length) == (4, 4, 2, 3.0)
    assert (line.kept, line.layers) == (5.0, 8)


def test_accept_writes_json_and_markdown_without_a_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKIPJACK_PROMPTS", raising=False)
    files = ["--output", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    arguments = ["--method", "lookup", "--category", "qa", "--per-category", "1", "--max-tokens", "8", "--json"]
    assert cli.run(["bench", "accept", "synthetic:tiny:0.1", *arguments, *files]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == read(tmp_path / "a.json")
    assert "tokens_per_s" not in json.dumps(result)
    assert [line["category"] for line in result["summary"]] == ["qa", "all"]
    text = (tmp_path / "a.md").read_text()
    assert "accepted ÷ drafted" in text
    assert figures.table([tmp_path / "a.json"]) + "\n" == text


def test_percentiles() -> None:
    assert Spread.of([]) is None
    assert Spread.of(range(101)) == Spread(101, 10, 50, 90, 99, 100)


def test_latencies_of_concurrent_requests(synthetic: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    sources = [[3, 4, 5], [6, 7], [8, 9, 10]]
    rows = latency.measure(synthetic(), ["autoregressive"], [1, 2], sources, params, lambda _: None)
    for row, concurrency in zip(rows, (1, 2), strict=True):
        assert (row.concurrency, row.requests, row.tokens, row.identical) == (concurrency, 3, 12, 3)
        assert row.first_token is not None
        assert row.between_tokens is not None
        assert row.loop_delay is not None
        assert (row.first_token.count, row.between_tokens.count) == (3, 9)
        assert 0 < row.between_tokens.p50 <= row.between_tokens.max
        assert row.loop_delay.max < 60


def test_a_blocked_event_loop_is_seen(synthetic: Callable[..., Engine]) -> None:
    async def main() -> latency.Arrivals:
        seen = latency.Arrivals()
        heart = asyncio.create_task(latency._beat(seen))
        await asyncio.sleep(0.01)
        time.sleep(0.2)
        await asyncio.sleep(0.01)
        heart.cancel()
        return seen

    assert max(asyncio.run(main()).delays) > 0.15


def test_tokens_of_one_arrival_share_its_time() -> None:
    """A round of three tokens, 30 ms after the first token, is one pause of 30 ms and three tokens of 10 ms."""

    class Chunk:
        def __init__(self, *ids: int) -> None:
            self.token_ids = list(ids)

    class Speaker:
        async def astream(self, *_: Any, **__: Any) -> Any:
            yield Chunk(1)
            await asyncio.sleep(0.03)
            yield Chunk(2, 3, 4)

    seen = asyncio.run(latency._serve(Speaker(), "m", 1, [[1]], SamplingParams()))  # pyright: ignore[reportArgumentType]
    (pause,) = seen.pauses
    assert pause >= 0.03
    assert seen.between == [pause / 3] * 3
    assert seen.token_ids == {0: [1, 2, 3, 4]}


def test_a_projection_is_the_formula() -> None:
    costs = project.costs_of({"costs": COSTS})
    assert costs == project.costs_of(decode_result(CPU))
    assert costs.draft(0.5) == pytest.approx(0.006)
    assert costs.draft(1.0) == pytest.approx(0.010)
    assert costs.verify(4) == pytest.approx(0.010)
    assert costs.verify(12) == pytest.approx(0.014)
    assert costs.verify(32) == pytest.approx(0.036)
    known = Published("a", "paper", "n", "t", 0.5, 1.4, k=3, acceptance=0.8)
    unknown = Published("b", "paper", "n", "t", 0.5, 1.2)
    beyond = Published("c", "paper", "n", "t", 0.5, 9.0)
    first, second, third = project.project(costs, [known, unknown, beyond])
    speedup = (1 + 3 * 0.8) / (3 * 0.6 + 1.0)
    assert first.projected == pytest.approx(speedup)
    assert first.tokens_per_s == pytest.approx(100 * speedup)
    assert (second.projected, second.tokens_per_s, third.needed) == (None, None, None)
    assert second.needed is not None
    best = [max(expected_tokens(a, k) / (0.6 * k + costs.verify(k + 1) / 0.01) for k in range(1, 17)) for a in
            (second.needed, second.needed - 0.001)]  # fmt: skip
    assert best[0] >= 1.2 > best[1]


def test_calibrated_costs_survive_their_result_file() -> None:
    calibrated = Costs(sublayers=16, full=0.010, tiles=((8, 0.0),), per_tile=0.004, fixed=0.002)
    costs = project.costs_from(calibrated, "m")
    assert costs.draft(0.5) == pytest.approx(0.006)
    assert (costs.verify(8), costs.verify(9)) == (0.010, pytest.approx(0.014))
    assert project.costs_of({"costs": json.loads(json.dumps(costs.fields()))}) == costs


@pytest.mark.parametrize("costs", [None, {}, {**COSTS, "t_draft": {"2": 0.004}}, {**COSTS, "t_verify": 3}])
def test_costs_that_are_none_are_refused(costs: object) -> None:
    with pytest.raises(ConfigError, match="--costs"):
        project.costs_of({"costs": costs})


def test_published_results_are_cited_and_plausible() -> None:
    for one in PUBLISHED:
        assert "arXiv" in one.source
        assert 0 < one.kept < 1 < one.speedup < 3
        assert (one.k is None) == (one.acceptance is None)


def test_every_output_of_a_projection_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.json").write_text(json.dumps(decode_result(CPU)))
    output = tmp_path / "p.json"
    assert cli.run(["bench", "project", "--costs", str(tmp_path / "d.json"), "--output", str(output)]) == 0
    assert "PROJECTION, not a measurement" in capsys.readouterr().out
    result = read(output)
    assert result["projection"] is True
    assert "PROJECTION" in figures.table([output])
    assert cli.run(["bench", "project"]) == 2


def method_line(method: str) -> dict[str, Any]:
    counts = {"prompts": 1, "tokens": 8, "identical": 1, "acceptance_rate": 0.5, "mean_acceptance_length": 2.0}
    speeds = {"speed": 1.2, "speed_p10": 1.1, "speed_p90": 1.3, "ideal": 1.4}
    return {"method": method, "category": "all", "gap": "none", **counts, **speeds}


def test_every_picture_is_drawn_or_its_absence_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = tmp_path / "results"
    results.mkdir()
    op = {"op": "linear", "shape": "m", "rows": 8, "seconds": {"median": 1e-4}, "bytes": 10**6, "flops": 10**7}
    rates = {"bandwidth": {"copy": 4e10}, "of": "copy", "peak": 1e11, "dtype": "float32"}
    parts = {"draft": 1.2, "verify": 1.0, "search": 0.0, "other": 0.1, "depth": 2.0, "rounds": 4, "accepted": 6}
    lines = {"summary": [method_line("swift")], "rows": [{"method": "swift", **parts}]}
    spans = [{"part": part, "round_ms": 1.5} for part in ("draft[0]", "draft[1]", "verify", "commit", "other")]
    figure = {"name": "up", "shape": "m", "rows": 1, "median": 1e-5, "bytes": 10**7}
    bandwidth = {"name": "copy bandwidth", "shape": "", "rows": 0, "median": 4e12, "bytes": 0}
    files = {
        "decode-x": decode_result(CPU),
        "decode-y": decode_result(GPU) | {"rounds": []},
        "micro": {"bench": "micro", **PLACE, **rates, "figures": [op]},
        "methods-x": {"bench": "methods", **PLACE, **lines},
        "profile": {"bench": "profile", **PLACE, "method": "swift", "rounds": 5, "parts": spans},
        "gpu-steps": {"bench": "gpu-steps", "machine": GPU, "figures": [bandwidth, figure]},
    }  # fmt: skip
    for name, result in files.items():
        (results / f"{name}.json").write_text(json.dumps(result))
    notices: list[str] = []
    drawn = figures.draw(results, tmp_path / "figures", notices.append)
    names = {path.stem for path in drawn}
    assert names == {
        *("bandwidth-gpu-steps", "roofline-micro", "draft-cost-decode-x", "draft-cost-decode-y"),
        *("acceptance-decode-x", "methods-methods-x", "round-methods-x", "timeline-profile"),
    }
    first = {path: path.read_bytes() for path in drawn}
    assert all(content.startswith(b"<?xml") for content in first.values())
    figures.draw(results, tmp_path / "figures", lambda _: None)
    assert {path: path.read_bytes() for path in drawn} == first
    told = "\n".join(notices)
    for words in ("peers: skipped", "bench peers MODEL", "projection: skipped", "acceptance: skipped", "decode-y.json"):
        assert words in told


def test_a_title_names_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipjack.bench.plots.save", lambda _, figure, path: titles.append(figure.axes[0].get_title()))
    titles: list[str] = []
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for machine in (CPU, GPU):
        next(p for p in figures.PICTURES if p.name == "draft-cost").draw(decode_result(machine), tmp_path)
    assert "X (CPU, 2 threads)" in titles[0]
    assert "Y (GPU)" in titles[1]


def test_results_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    for content in ("{", "[]", '{"bench": "unheard of"}', '{"bench": "methods"}', '{"bench": "exact", "summary": []}'):
        path.write_text(content)
        assert cli.run(["bench", "table", str(path)]) == 2
        assert "r.json" in capsys.readouterr().err
    path.write_text('{"bench": "methods", "rows": 3}')
    assert cli.run(["bench", "figures", str(tmp_path)]) == 2
    assert cli.run(["bench", "figures", str(tmp_path / "none")]) == 2


def test_tables_of_two_devices_stay_apart(tmp_path: Path) -> None:
    summary = [{"prompts": 5, "tokens": 640, "identical": 5, "acceptance_rate": 0.5, "mean_acceptance_length": 1.75}]
    base = {"bench": "exact", "dtype": "float32", "temperature": 0.0, "batch": 4, "summary": summary}
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, machine in zip(paths, (CPU, GPU, CPU), strict=True):
        path.write_text(json.dumps(base | {"machine": machine}))
    first, second = figures.table(paths).split("**Against plain decoding: ")[1:]
    row = "| float32 | 0 | 4 | 5 | 640 | 5 of 5 | 0.50 | 1.75 |"
    assert (first.count(row), second.count(row)) == (2, 1)
    assert first.startswith("X (CPU, 2 threads)**")
    assert first.count("Measured on X (CPU, 2 threads), torch 2.13, 2026-01-02.") == 1
    assert "Y (GPU)" not in first
    assert "(CPU" not in second
    assert markdown([]) == ""


def test_serve_reports_latencies_only_of_the_right_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKIPJACK_PROMPTS", raising=False)
    arguments = ["bench", "serve", "synthetic:tiny:0.1", "--method", "lookup", "--requests", "2", "--max-tokens", "3"]
    arguments += ["--concurrency", "2", "--json", "--output", str(tmp_path / "s.json")]
    assert cli.run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["concurrency"], row["tokens"]) for row in result["rows"]] == [("lookup", 2, 6)]
    assert "| lookup | 2 | 2 |" in figures.table([tmp_path / "s.json"])

    wrong = latency.Row("lookup", True, 2, 2, 6, 1, 1.0, None, None, None, None)
    monkeypatch.setattr(latency, "measure", lambda *_: [wrong])
    assert cli.run(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "NOT IDENTICAL" in printed.err


def test_every_result_that_is_kept_has_a_table() -> None:
    paths = sorted((Path(figures.__file__).parent / "results").glob("*.json"))
    assert len(paths) > 20
    text = figures.table(paths)
    assert "**A round: demo, bfloat16" in text
