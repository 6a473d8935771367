"""Sets found ahead of time: scored as they claim, loaded by the model they belong to, and by no other."""

import itertools
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from skipjack import Engine, RequestError, SamplingParams
from skipjack.runtime.commands import cli
from skipjack.runtime.commands.tune import Tuning
from skipjack.runtime.methods import registry
from skipjack.runtime.skip_sets import SkipSet
from skipjack.runtime.tune import tune_knapspec, tune_swift

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 90))]


def tuned(engine: Engine, candidates: int, stop: Callable[[], bool] = lambda: False) -> SkipSet:
    seen: list[float] = []
    found = tune_swift(
        engine,
        PROMPTS,
        window=16,
        skip_ratio=0.3,
        candidates=candidates,
        seconds=60,
        seed=1,
        stop=stop,
        report=lambda done, best: seen.append(best),
    )
    assert seen == sorted(seen)
    return found


def test_a_tuned_set_is_loaded_and_keeps_the_text(synthetic: Callable[..., Engine], tmp_path: Path) -> None:
    engine = synthetic("tiny", torch.float32, 0.1)
    found = tuned(engine, 60)
    assert found.candidates == 60
    assert len(found.skip_attention) + len(found.skip_mlp) == int(12 * 0.3)
    found.save(tmp_path / "set.json")
    params, method = SamplingParams(max_tokens=40, ignore_eos=True), f"swift:set={tmp_path}/set.json"
    output = engine.generate(PROMPTS[0], params, method=method)
    assert output.token_ids == engine.generate(PROMPTS[0], params).token_ids
    assert output.stats.layers_kept == 8 - int(12 * 0.3) / 2
    assert output.stats.phases[0][0] == "acceleration", "a saved set is drafted with from the first token"
    with pytest.raises(RequestError, match="weights: expected a skip set of this model"):
        synthetic("tiny", torch.float32, 0.2).generate(PROMPTS[0], params, method=method)
    cache = engine._loaded()[1]
    assert cache.free_pages == cache.total_pages


def test_a_search_that_resumes_starts_from_the_saved_set(synthetic: Callable[..., Engine], tmp_path: Path) -> None:
    engine, file = synthetic("tiny", torch.float32, 0.1), tmp_path / "set.json"
    found = tuned(engine, 20)
    found.save(file)
    method = f"swift:set={file},search_budget=0.0001"
    own = engine._method(registry.parse(method))
    own._search.resume(0)
    output = engine.generate(PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True), method=method)
    assert [event["kind"] for event in output.stats.events] == ["restart"]
    assert (own.plan.skipped_attention, own.plan.skipped_mlp) == (found.skip_attention, found.skip_mlp)


@pytest.mark.parametrize(
    ("saved", "option", "longest"), [(2, "", 2), (2, ",num_draft_tokens=7", 7), (None, "", 7), (9, "", 9)]
)
def test_the_draft_length_saved_with_a_set_is_drafted(
    synthetic: Callable[..., Engine], tmp_path: Path, saved: int | None, option: str, longest: int
) -> None:
    """Unless another one is asked for; a set without a length, as of swift, is drafted with the usual one."""
    engine, file = synthetic("tiny", torch.float32, 0.1), tmp_path / "set.json"
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    replace(tuned(engine, 3), num_draft_tokens=saved).save(file)
    output = engine.generate(PROMPTS[0], params, method=f"swift:set={file},threshold=0{option}")
    assert len(output.stats.drafted_per_position) == longest
    assert output.token_ids == engine.generate(PROMPTS[0], params).token_ids


def test_the_score_grows_with_the_candidates(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny", torch.float32, 0.1)
    assert tuned(engine, 60).score > tuned(engine, 1).score


def test_stopping_keeps_the_best_so_far(synthetic: Callable[..., Engine]) -> None:
    calls: list[int] = []
    found = tuned(synthetic("tiny"), 500, stop=lambda: len(calls) >= 5 or bool(calls.append(1)))
    assert found.candidates == 5


def test_knapspec_leaves_the_set_it_chose_last(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny", torch.float32, 0.1)
    found = choose(engine, lambda: False)
    assert found.method == "knapspec"
    assert not {0, 7} & {*found.skip_attention, *found.skip_mlp}


def choose(engine: Engine, stop: Callable[[], bool], seconds: float = 60.0) -> SkipSet:
    return tune_knapspec(engine, PROMPTS, max_tokens=80, seconds=seconds, stop=stop, report=lambda done, best: None)


def test_knapspec_is_asked_to_stop_in_the_middle_of_a_text(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = synthetic("tiny", torch.float32, 0.1)
    rounds: list[int] = []
    one = choose(engine, lambda: len(rounds) >= 20 or bool(rounds.append(1)))
    assert one.method == "knapspec"
    assert len(rounds) == 20
    with pytest.raises(RequestError, match=r"^tune: knapspec chose no set on these prompts: give it more time"):
        choose(engine, lambda: False, seconds=0.0)
    cache = engine._loaded()[1]
    assert cache.free_pages == cache.total_pages


def test_a_search_that_no_terminal_watches_says_every_so_often_how_far_it_is(
    demo: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(step=4.0)
    monkeypatch.setattr("skipjack.runtime.commands.terminal.monotonic", lambda: next(now))
    line = ["tune", str(demo.model_path), "-o", str(tmp_path / "set.json"), "--prompts", str(tmp_path / "ids")]
    (tmp_path / "ids").write_text("[5, 9, 200]\n")
    assert cli.run([*line, "--candidates", "10", "--window", "2"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("candidates")]
    assert told == ["candidates: 30%", "candidates: 60%", "candidates: 90%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic", "-o", "x.json"], "--method: expected swift or knapspec"),
        (["--method", "knapspec", "--candidates", "3", "-o", "x.json"], "--candidates: expected with swift only"),
        (["--method", "knapspec", "--skip-ratio", "0", "-o", "x.json"], "--skip-ratio: expected with swift only"),
        (["--method", "knapspec", "--seed", "0", "-o", "x.json"], "--seed: expected with swift only"),
        (["-o", "/nowhere/x.json"], "--output: no such folder"),
        (["-o", "/"], "--output: expected a file that can be written"),
        (["-o", "a,b.json"], "--output: expected a name without a comma"),
        (["-o", "x.json", "--prompts", "nowhere"], "--prompts: cannot read nowhere: No such file or directory"),
    ],
)
def test_wrong_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, demo: Engine
) -> None:
    assert cli.run(["tune", str(demo.model_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_it_prints_loads_the_set(
    synthetic: Callable[..., Engine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a shell reads it, of a name with what shells and options give a meaning to."""
    engine, output = synthetic("tiny", torch.float32, 0.1), tmp_path / "my set=1+2:'x'.json"
    silent = SimpleNamespace(step=lambda _: "", finish=lambda: "")
    monkeypatch.setattr(engine, "tokenizer", SimpleNamespace(stream=lambda: silent))
    monkeypatch.setattr("skipjack.runtime.commands.tune.to_ids", lambda text, *_: [5, 9, len(text) % 500])
    Tuning(output, "swift", ["a text"], 3, 60.0, 0.3, 8, 0).run(engine, as_json=False)
    option, method = shlex.split(capsys.readouterr().out.partition("use it with ")[2])
    assert (option, method) == ("--method", f"swift:set={output}")
    monkeypatch.setattr(engine, "tokenizer", None)
    assert engine.generate(PROMPTS[0], SamplingParams(max_tokens=3), method=method).stats.layers_kept < 8
