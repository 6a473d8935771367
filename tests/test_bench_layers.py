"""Layers used per token by task, their heat map, and what skipping by command saves."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from skipjack import Engine, RequestError, SkipjackError
from skipjack.bench import forced_routes as forced
from skipjack.bench import heat_map, layers
from skipjack.runtime.commands import cli
from skipjack.runtime.graphs import Graphs

MODEL = "synthetic:routed-tiny:0.3"


@pytest.fixture(scope="module")
def routed() -> Engine:
    return layers.load_routed(MODEL, "auto")


def test_layers_by_task_are_the_mean_and_variance_over_tokens(tmp_path: Path, capsys) -> None:
    picture, output = tmp_path / "a.svg", tmp_path / "a.json"
    line = ["bench", "layers", MODEL, "--per-task", "1", "--max-tokens", "5"]
    assert cli.run([*line, "--picture", str(picture), "--output", str(output)]) == 0
    streams = capsys.readouterr()
    result = json.loads(output.read_text())
    assert [own["task"] for own in result["summary"]] == list(layers.PUBLISHED)
    for own, reading in zip(result["summary"], result["readings"], strict=True):
        assert own["tokens"] == len(reading["layers"]) == len(reading["words"]) == 5
        assert own["mean"] == pytest.approx(math.fsum(reading["layers"]) / 5)
        assert own["variance"] == pytest.approx(math.fsum((used - own["mean"]) ** 2 for used in reading["layers"]) / 5)
        assert len(reading["prompt_words"]) == len(reading["prompt_layers"]) > 5
    assert result["routers_trained"] is False
    assert "UNTRAINED" in streams.out
    assert "multiply" in streams.out
    drawing = picture.read_text()
    assert drawing.startswith("<?xml")
    assert drawing.count("<path") > 20
    dark = "#{:02x}{:02x}{:02x}".format(*heat_map.shade(8, 4, 8))
    assert dark in drawing


def test_mathematics_prompts_are_lists_as_on_the_slides() -> None:
    assert layers.prompts("add", 3) == layers.prompts("add", 3)
    for text in layers.prompts("multiply", 12):
        head, _, numbers = text.partition(": ")
        assert head == "Please calculate the product of numbers in the following list"
        values = json.loads(numbers)
        assert 5 <= len(values) <= 10
        assert all(10 <= value <= 99 for value in values)
    assert len(set(layers.prompts("copy", 5))) == 5


def test_shades_go_from_light_to_dark() -> None:
    sums = [sum(heat_map.shade(used, 16, 32)) for used in np.linspace(16, 32, 33)]
    assert sums == sorted(sums, reverse=True)
    assert len(set(sums)) == len(sums)
    assert heat_map.shade(3, 3, 3) == heat_map.shade(32, 16, 32) == (8, 48, 107)
    text = heat_map.terminal(["a\n", "b\x1b"], [16, 32], 16, 32)
    assert text.plain.startswith("a↵\nb␛")


def test_a_picture_is_svg_or_png(tmp_path: Path) -> None:
    words = ["word "] * 40 + ["end\n", "$x$"]
    heat_map.picture(words, [float(i % 5) for i in range(42)], 0, 4, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SkipjackError, match=r"expected a picture's name to end in \.svg or \.png"):
        heat_map.picture(words, [1.0] * 42, 0, 4, tmp_path / "a.gif", "title")


def test_forced_skips_are_counted_before_a_speed_is_told(routed: Engine, monkeypatch) -> None:
    rows = forced.measure(routed, [0, 4], 3, 1, lambda count: None)
    assert [(row.skipped, row.of) for row in rows] == [(0, 4), (4, 4)]
    ran, left = forced.layer_bytes(routed.config, 4)
    weights = sum(t.numel() for t in matrices(routed)) * 4
    assert rows[1].bytes_saved == pytest.approx(4 * (ran - left) / weights)
    assert rows[0].bytes_saved == 0
    assert rows[0].speed > 0
    assert all(own.threshold == 0.5 for own in routed._loaded()[0].routed.values())
    with pytest.raises(RequestError, match="expected 0 to 4, the routed layers of the model, got 5"):
        forced.measure(routed, [5], 3, 1, lambda count: None)
    monkeypatch.setattr(forced, "NEVER", 0.5)
    with pytest.raises(SkipjackError, match="expected 48 skipped sub-layers, counted"):
        forced.measure(routed, [4], 3, 1, lambda count: None)


def test_rounds_captured_under_other_thresholds_are_not_replayed(routed: Engine, monkeypatch) -> None:
    usual = Graphs(*routed._loaded())
    monkeypatch.setattr(routed, "_shared", replace(routed._open(), graphs=usual))
    under: dict[int, set[tuple[float, ...]]] = {}
    generate = routed.generate

    def noted(*given, **options):
        thresholds = tuple(own.threshold for own in routed._loaded()[0].routed.values())
        under.setdefault(id(routed._open().graphs), set()).add(thresholds)
        return generate(*given, **options)

    monkeypatch.setattr(routed, "generate", noted)
    forced.measure(routed, [4], 3, 1, lambda count: None)
    assert sorted(map(len, under.values())) == [1, 1]
    assert id(usual) not in under
    assert routed._open().graphs is usual
    usual.close()


def matrices(engine: Engine) -> list:
    """What a token that skips nothing reads: every matrix but the adapters and the embedding."""
    from skipjack.loaders.synthetic import synthetic_weights

    weights = synthetic_weights(engine.config, 0, engine.dtype)
    return [weights.qkv, weights.output, weights.up, weights.down, weights.router_encoder, weights.head]


def test_plain_models_are_refused(synthetic: Callable[..., Engine], capsys) -> None:
    with pytest.raises(RequestError, match="expected a routed checkpoint"):
        forced.layer_bytes(synthetic().config, 4)
    assert cli.run(["bench", "layers", "synthetic:tiny:0.3"]) == 2
    assert "method flexidepth: expected model_type ddllama" in capsys.readouterr().err
    assert cli.run(["bench", "methods", MODEL]) == 2
    assert "expected flexidepth" in capsys.readouterr().err


def test_the_command_prints_time_beside_bytes(capsys) -> None:
    line = ["bench", "forced", MODEL, "--tokens", "3", "--pairs", "1", "--skipped", "2", "--json"]
    assert cli.run(line) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    assert 0 < row["bytes_saved"] < 1
    assert row["speed"] == pytest.approx(1 / (1 - row["time_saved"]))
