"""The table of baselines: every row is what scoring its method by hand gives, and what is missing is said."""

import json
from pathlib import Path

import pytest
import torch

from skipjack import Engine, RequestError
from skipjack.bench import agreement, baselines
from skipjack.bench.prompts import Prompt
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime.commands import cli

PROMPTS = [Prompt("a", "some words"), Prompt("b", "some words")]


def test_rows_are_those_of_scoring_by_hand(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "m", "tiny-llama", 0, 0.3)
    write_synthetic(tmp_path / "routed", "tiny-mindskip", 0, 0.3)
    routed = {"mindskip": str(tmp_path / "routed")}
    _, lines = baselines.compare(str(tmp_path / "m"), "auto", PROMPTS, 6, [2], routed, lambda text: None)
    overall = {line.method: line for line in lines if line.category == "all"}
    assert list(overall) == [
        "autoregressive", "layerskip", "shortgpt", "skipdecode", "adaskip", "laco paper", "laco code",
        "calm state", "calm softmax", "mindskip", "flexidepth",
    ]  # fmt: skip
    assert (overall["autoregressive"].agreement, overall["autoregressive"].skipped) == (1, 0)
    # The first token comes of the prompt, which SkipDecode reads with all layers.
    skipped = [2, 2, pytest.approx(2 * 5 / 6), 2, 2, 2]
    assert [overall[name].skipped for name in list(overall)[1:7]] == skipped
    assert overall["flexidepth"].note == "no routers"
    assert overall["flexidepth"].agreement is None
    with Engine.load(tmp_path / "m") as engine, Engine.load(tmp_path / "routed", method="mindskip") as other:
        given = agreement.continuations(engine, PROMPTS, 6)
        by_hand = agreement.summary(agreement.score(other, "mindskip", PROMPTS, given))[-1]
        early = agreement.summary(agreement.score(engine, "layerskip:exit_layer=6,verify=false", PROMPTS, given))[-1]
    assert by_hand.layers is not None
    assert 0 < (overall["calm state"].skipped or 0) <= 4
    mindskip, layerskip = overall["mindskip"], overall["layerskip"]
    assert (mindskip.perplexity, mindskip.skipped) == (by_hand.perplexity, 8 - by_hand.layers)
    assert (layerskip.agreement, layerskip.perplexity) == (early.agreement, early.perplexity)
    assert {line.category for line in lines} == {"a", "b", "all"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "synthetic:tiny:0.3"
    small = ["--per-category", "1", "--max-tokens", "2"]
    out = tmp_path / "r.json"
    assert cli.run(["bench", "baselines", shape, "--skipped", "1", *small, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "no routers" in printed
    assert len(json.loads(out.read_text())["lines"]) > 7
    own = [f"--method={name}" for name in ("skipdecode:most=5,least=5", "calm:least=3,threshold=0.9")]
    assert cli.run(["bench", "baselines", shape, *own, *small, "--json"]) == 0
    lines = [line for line in json.loads(capsys.readouterr().out)["lines"] if line["category"] == "all"]
    assert [line["method"] for line in lines] == ["autoregressive", *(name[len("--method=") :] for name in own)]
    assert [line["skipped"] for line in lines[:2]] == [0, 1.5], "of two tokens the first is the prompt's"
    assert cli.run(["bench", "baselines", shape, *own, "--skipped", "2", *small]) == 2
    assert "--skipped: expected without --method" in capsys.readouterr().err
    assert cli.run(["bench", "baselines", shape, "--method", "lookup", *small]) == 2
    assert "expected a lossy method or autoregressive, got lookup" in capsys.readouterr().err
    assert cli.run(["bench", "baselines", shape, "--skipped", "8", *small]) == 2
    assert "--skipped: expected fewer than the model's 8 layers, got 8" in capsys.readouterr().err
    assert cli.run(["bench", "baselines", shape, "--checkpoint", "mindskip", *small]) == 2
    assert "--checkpoint: expected METHOD=FOLDER, got 'mindskip'" in capsys.readouterr().err


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    fields = synthetic_config("tiny-mindskip") | {"vocab_size": 300}
    config = ModelConfig.parse(fields, "config.json")
    save_checkpoint(tmp_path / "m", fields, checkpoint_tensors(synthetic_weights(config, 0, torch.float32), config))
    routed = {"mindskip": str(tmp_path / "m")}
    with pytest.raises(RequestError, match=r"mindskip: expected the vocabulary of synthetic:tiny:1, 512 .*, got 300"):
        baselines.compare("synthetic:tiny:1", "auto", PROMPTS[:1], 2, [1], routed, lambda text: None)
