"""Other libraries' loops against the engine, and that one that cannot run says why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipjack import Engine
from skipjack.bench import peers, sheets
from skipjack.bench.compiled_loop import CompiledLoop
from skipjack.bench.peer_loops import PLAIN, Setting, expect_peers, load_model
from skipjack.bench.peer_loops import peers as loop_peers
from skipjack.bench.prompts import Prompt
from skipjack.loaders.synthetic import write_synthetic
from skipjack.runtime.commands import cli
from skipjack.runtime.errors import RequestError

pytest.importorskip("transformers")
PROMPTS = [Prompt("qa", "Why is the sea salt?"), Prompt("qa", "Name three oceans.")]
EAGER = Setting(exit_layer=4, num_draft_tokens=3, compile_mode="eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "tiny"
    write_synthetic(path, "tiny", 0, 0.3)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, dtype="float32")


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"])
def test_the_compiled_loop_is_the_model(shape: str, tmp_path: Path) -> None:
    """Against transformers, past the sliding window of the one that has it."""
    write_synthetic(tmp_path / shape, shape, 0)
    model = load_model(tmp_path / shape, torch.float32, torch.device("cpu"))
    prompt = list(range(5, 41))
    loop = CompiledLoop(model, 48, "eager")
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(6):
            token = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
    assert loop(prompt, 6) == ids[0, len(prompt) :].tolist()
    assert loop(prompt, 6) == ids[0, len(prompt) :].tolist(), "nothing of the call before is left"


def test_a_peer_that_cannot_run_says_why_and_the_others_run(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin torch._inductor.config.cpp.cxx")

    monkeypatch.setattr(torch, "compile", broken)
    contest = peers.Contest(folder, engine, PROMPTS, Setting(4, 3, "default"), 4)
    agreements = {agreement.peer: agreement for agreement in contest.agree(lambda _: None)}
    assert len(agreements) == 6
    for name in ("transformers static cache + compile", "torch.compile loop (default)"):
        assert agreements[name].reason == "RuntimeError: InvalidCxxCompiler: No working C++ compiler found"
    plain = agreements[PLAIN]
    assert (plain.identical, plain.reason) == (2, None)
    assert agreements["transformers assistant_early_exit=4"].identical == 2

    measured = [*contest.measure([plain, agreements["torch.compile loop (default)"]], lambda _: None)]
    rows, lines = [row for own, _ in measured for row in own], [line for _, line in measured]
    assert [row.peer for row in rows] == [PLAIN] * 2
    for row in rows:
        assert row.tokens == 4
        assert row.ratio == pytest.approx(row.skipjack_tokens_per_s / row.tokens_per_s)
    assert [line.unavailable for line in lines] == [None, agreements["torch.compile loop (default)"].reason]


def test_an_option_this_transformers_lacks_is_named(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    contest = peers.Contest(folder, engine, PROMPTS[:1], EAGER, 4)
    config = type(contest._model.generation_config)
    whole = config.__init__

    def without(self: Any, **kwargs: Any) -> None:
        whole(self, **kwargs)
        vars(self).pop("assistant_early_exit", None)

    monkeypatch.setattr(config, "__init__", without)
    run, _, reason = contest._ready("transformers assistant_early_exit=4")
    assert (run, reason) == (None, "this transformers has no assistant_early_exit")


def test_only_the_peers_asked_for_are_measured(folder: Path, engine: Engine) -> None:
    contest = peers.Contest(folder, engine, PROMPTS[:1], EAGER, 4, ["lookup", "torch.compile loop"])
    lookup, loop = (name for name in contest.names if name != PLAIN)
    agreements = contest.agree(lambda _: None)
    assert [agreement.peer for agreement in agreements] == [PLAIN, lookup, loop]
    assert [line.peer for _, line in contest.measure(agreements, lambda _: None)] == [lookup, loop]


def test_peers_that_cannot_run_are_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"--peer: expected a part of one of transformers generate, .*, got vllm"):
        expect_peers(["lookup", "vllm"], EAGER, "llama")
    expect_peers(["lookup", "torch.compile loop", "assistant_early_exit=4"], EAGER, "llama")
    with pytest.raises(RequestError, match=r"^--peer: torch\.compile loop \(eager\) cannot run: written for llama, "):
        expect_peers(["lookup", "loop"], EAGER, "bloom")
    absent: str | None = None
    monkeypatch.setattr("skipjack.bench.llama_cpp.find_spec", lambda name: None if name == absent else name)
    expect_peers(["llama"], EAGER, "llama")
    with pytest.raises(RequestError, match=r"^--peer: llama\.cpp cannot run: written for llama, not for qwen3$"):
        expect_peers(["llama"], EAGER, "qwen3")
    absent = "gguf"
    with pytest.raises(RequestError, match=r"^--peer: llama\.cpp cannot run: gguf is not installed \(pip install"):
        expect_peers(["llama"], EAGER, "llama")
    # One that can run is enough for a part of several names.
    expect_peers(["l"], EAGER, "bloom")


def test_a_peer_with_other_tokens_gets_no_speed(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = peers.Contest(folder, engine, PROMPTS[:1], EAGER, 4)
    ours = contest._ours[0]
    wrong = [*ours[:2], (ours[2] + 1) % 500, ours[3]]
    contest._makers = {PLAIN: lambda: lambda prompt, count: wrong}
    (agreement,) = contest.agree(lambda _: None)
    assert agreement.identical == agreement.tied == 0
    assert "from token 2" in (agreement.reason or "")
    assert not peers.trusted([agreement])
    ((rows, _),) = contest.measure([agreement], lambda _: None)
    assert rows == []

    monkeypatch.setattr(peers, "TIE", 1e9)
    (agreement,) = contest.agree(lambda _: None)
    assert (agreement.tied, agreement.reason) == (1, None)


def test_the_command_refuses_speeds_when_the_ids_are_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SKIPJACK_PROMPTS", raising=False)
    monkeypatch.setattr("skipjack.bench.peers.trusted", lambda _: False)
    arguments = ["--category", "qa", "--max-tokens", "2", "--compile-mode", "eager", "--exit-layer", "4"]
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr("skipjack.bench.peer_loops._compile_config", lambda _: None)
    assert cli.run(["bench", "peers", str(folder), *arguments, "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "RED" in printed.err


def test_a_table_of_peers_shows_what_is_unavailable() -> None:
    ran = peers.Line(PLAIN, None, 2, 8, "2 of 2", 1, 10.0, 25.0, 2.5, 2.4, 2.6)
    absent = peers.Line("torch.compile loop", "no compiler", 0, 0, "0 of 2", 0, 0, 0, 0, 0, 0)
    machine = {"device": "X", "threads": 2, "torch": "2.13", "date": "2026-01-02T03:04:05"}
    result = {"model": "m", "dtype": "float32", "machine": machine, "transformers": "5", "max_tokens": 4}
    result["summary"] = [vars(ran), vars(absent)]
    sheet = sheets.peers(json.loads(json.dumps(result)))
    assert sheet.rows[0][:5] == (PLAIN, "2.50", "2.40–2.60", "10.0", "25.0")
    assert sheet.rows[1][:2] == ("torch.compile loop", "unavailable: no compiler")
    assert "X (CPU, 2 threads)" in sheet.title


def test_only_what_is_timed_is_tuned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda step, mode, fullgraph: modes.append(mode) or step)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    setting = Setting(4, 3, "max-autotune")
    for one in (setting, replace(setting, timed=False), replace(setting, compile_mode="reduce-overhead", timed=False)):
        name = f"torch.compile loop ({one.compile_mode})"
        loop_peers(model, one, 64)[name]()
    assert modes == ["max-autotune", "default", "reduce-overhead"]
