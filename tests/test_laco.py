"""LaCo: the published merges bit for bit, the published search step by step, and engines that serve nothing else."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import Weights, checkpoint_tensors, load_weights
from skipjack.runtime.commands import cli
from skipjack.runtime.errors import RequestError
from skipjack.runtime.merging import Merged, Scan, Similarity, remove_layers, search
from skipjack.runtime.model import Model

CASES = ["laco-1", "laco-2"]
MATRICES = [
    *(f"mlp.{part}_proj" for part in ("down", "gate", "up")),
    *(f"self_attn.{part}_proj" for part in ("k", "o", "q", "v")),
]
PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]
TEXTS = [[(31 * i + 7 * text) % 500 + 3 for i in range(20)] for text in range(3)]


def expected(golden: Path, case: str) -> dict:
    return json.loads((golden / case / "expected.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_merged_matrices_and_tokens_are_those_of_the_conformance_case(golden: Path, case: str) -> None:
    config = ModelConfig.load(golden / case)
    weights = load_weights(golden / case, config, torch.float32)
    for run in expected(golden, case)["runs"]:
        base, followers, rule = (run["options"][name] for name in ("base", "followers", "rule"))
        merged = Merged.of(config, weights).merge(base, followers, rule)
        tensors = checkpoint_tensors(merged.weights, merged.config)
        names = [f"model.layers.{base}.{name}.weight" for name in MATRICES]
        digest = hashlib.sha256(b"".join(tensors[name].contiguous().numpy().tobytes() for name in names))
        assert digest.hexdigest() == run["merged_layer_sha256"]
        assert merged.config.num_layers == run["resulting_layers"]
        params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
        with Engine.load(golden / case, method=f"laco:base={base},followers={followers},rule={rule}") as engine:
            output = engine.generate(run["prompt_ids"], params)
        assert output.token_ids == run["token_ids"]
        assert not output.stats.lossless
        assert output.stats.events[0]["layers"][base] == list(range(base, base + followers + 1))


@pytest.mark.parametrize("case", CASES)
def test_searches_are_those_of_the_conformance_case(golden: Path, case: str, tmp_path: Path) -> None:
    for run in expected(golden, case)["searches"]:
        (tmp_path / "ids").write_text("\n".join(map(str, run["calibration_ids"])))
        options = {
            "rule": run["rule"],
            "merge_layers": run["merge_layers_C"],
            "interval": run["interval_I"],
            "highest": run["highest_layer_H"],
            "lowest": run["lowest_layer_L"],
            "threshold": run["threshold_T"],
            "calibration": tmp_path / "ids",
        }
        method = "laco:" + ",".join(f"{name}={value}" for name, value in options.items())
        with Engine.load(golden / case, method=method) as engine:
            params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
            output = engine.generate(run["prompt_ids"], params)
            assert engine.config.num_layers == run["final_depth"]
        (found,) = output.stats.events
        assert found["layers"] == run["final_layer_origins"]
        assert len(found["trace"]) == len(run["trace"])
        for ours, theirs in zip(found["trace"], run["trace"], strict=True):
            assert (ours["layer"], ours["depth"], ours["followers"], ours["accepted"]) == (
                theirs["layer"],
                theirs["depth"],
                theirs["merged_followers"],
                theirs["accepted"],
            )
            assert ours["similarity"] == pytest.approx(theirs["similarity"], abs=1e-4)
        assert output.token_ids == run["token_ids"]


def original(shape: str, dtype: torch.dtype = torch.float32) -> Merged:
    config = ModelConfig.parse(synthetic_config(shape), shape)
    return Merged.of(config, synthetic_weights(config, 2, dtype))


@pytest.mark.parametrize(("shape", "rule"), [("tiny-qwen2", "paper"), ("tiny-qwen3", "code"), ("tiny-bloom", "paper")])
def test_a_merged_model_is_that_of_transformers_with_the_parameters_written_by_hand(
    tmp_path: Path, shape: str, rule: str
) -> None:
    whole = original(shape)
    save_checkpoint(tmp_path / "m", synthetic_config(shape), checkpoint_tensors(whole.weights, whole.config))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    inner = oracle.transformer.h if shape == "tiny-bloom" else oracle.model.layers
    with torch.no_grad():
        for name, parameter in inner[2].named_parameters():
            if "norm" not in name:
                followers = [dict(inner[2 + k].named_parameters())[name] for k in (1, 2)]
                parameter.copy_(followers[1] if rule == "code" else sum(followers) - parameter)
    del inner[3:5]
    for number, layer in enumerate(inner):
        (layer.self_attention if shape == "tiny-bloom" else layer.self_attn).layer_idx = number
    oracle.config.num_hidden_layers = 6
    merged = whole.merge(2, 2, rule)
    with Engine(merged.config, merged.weights) as engine:
        for prompt in PROMPTS:
            tokens = engine.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True)).token_ids
            with torch.no_grad():
                logits = oracle(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == tokens


def test_layers_keep_their_own_positions_and_windows() -> None:
    whole = original("tiny-smollm3")
    assert whole.config.rope_layers == (True, True, True, False) * 2
    merged = whole.merge(2, 2, "paper")
    assert merged.config.rope_layers == (True, True, True, True, True, False)
    assert merged.origins == ((0,), (1,), (2, 3, 4), (5,), (6,), (7,))
    assert merged.merge(1, 1, "paper").origins == ((0,), (1, 2, 3, 4), (5,), (6,), (7,))
    assert (merged.weights.head is merged.weights.embedding) == whole.config.tied_head


def test_bfloat16_is_merged_in_float32() -> None:
    layers = original("tiny", torch.bfloat16).weights.down
    merged = original("tiny", torch.bfloat16).merge(1, 3, "paper").weights.down[1]
    exact = layers[2:5].double().sum(dim=0) - 2 * layers[1].double()
    torch.testing.assert_close(merged.double(), exact, rtol=2**-8, atol=1e-6)
    assert merged.dtype == torch.bfloat16


def similarity(whole: Merged, calls: list[int]) -> Similarity:
    def build(config: ModelConfig, weights: Weights) -> Model:
        calls.append(config.num_layers)
        return Model(config, weights, TORCH)

    return Similarity(whole, build, TEXTS)


def test_remove_lowers_the_threshold_until_the_layers_are_gone() -> None:
    whole, calls = original("tiny"), list[int]()
    alike = similarity(whole, calls)
    scan = Scan(merge_layers=3, interval=1, threshold=0.95, lowest=0, highest=7)
    assert search(whole, alike, scan, "paper").config.num_layers > 5
    found = remove_layers(whole, alike, scan, "paper", 3)
    assert found is not None
    assert found.config.num_layers == 5
    assert sorted(sum(found.origins, ())) == list(range(8))
    accepted = [trial for trial in found.trace if trial.accepted]
    assert sum(trial.followers for trial in accepted) == 3
    threshold = min(trial.similarity for trial in accepted)
    rejected = [trial.similarity for trial in found.trace if not trial.accepted]
    assert not rejected or max(rejected) < threshold + 0.05
    assert len(calls) == len(alike._known) + 1, "no candidate is prepared twice"
    assert remove_layers(whole, alike, Scan(3, 1, 0.95, lowest=7, highest=7), "paper", 3) is None


def test_an_engine_loaded_with_it_serves_nothing_else(synthetic: Callable[..., Engine]) -> None:
    whole, params = original("tiny"), SamplingParams(max_tokens=6, ignore_eos=True)
    method = "laco:base=2,followers=2"
    with Engine(whole.config, whole.weights, method=method) as engine:
        together = engine.generate(PROMPTS, params)
        assert [o.token_ids for o in together] == [engine.generate(p, params, method=method).token_ids for p in PROMPTS]
        assert together[0].stats.method == "laco"
        for other in ("autoregressive", "swift", "laco:base=3,followers=1"):
            with pytest.raises(RequestError, match=f"{other[:4]}.*: expected laco as this engine was loaded"):
                engine.generate(PROMPTS[0], params, method=other)
    with pytest.raises(RequestError, match="laco: expected autoregressive as this engine was loaded: laco edits the"):
        synthetic("tiny").generate(PROMPTS[0], params, method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("base=7,followers=1", "option base expects -1 to 6, got 7"),
        ("base=5,followers=3", "option followers expects 0 to 2, got 3"),
        ("base=5", "options base and followers come together"),
        ("followers=2", "options base and followers come together"),
        ("rule=sum", "option rule expects paper or code, got 'sum'"),
        ("merge_layers=1", "option merge_layers expects 2 to 512, got 1"),
        ("interval=0", "option interval expects 1 to 512, got 0"),
        ("threshold=2", "option threshold expects -1 to 1, got 2.0"),
        ("remove=8", "option remove expects 0 to 7, got 8"),
        ("highest=8", "option highest expects 0 to 7, got 8"),
        ("calibration=nowhere", "option calibration: cannot read nowhere: No such file"),
    ],
)
def test_options_are_checked(options: str, message: str) -> None:
    whole = original("tiny")
    with pytest.raises(RequestError, match=message):
        Engine(whole.config, whole.weights, method=f"laco:{options}")


@pytest.mark.parametrize("shape", ["tiny-smollm3", "tiny-bloom", "windowed"])
def test_a_merged_model_is_written_as_a_folder(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5}
    fields = synthetic_config("tiny-qwen2") | window if shape == "windowed" else synthetic_config(shape)
    config = ModelConfig.parse(fields, "config.json")
    weights = synthetic_weights(config, 2, torch.float32)
    save_checkpoint(tmp_path / "m", fields, checkpoint_tensors(weights, config))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 7}')
    method, params = "laco:base=2,followers=2", SamplingParams(max_tokens=6, ignore_eos=True)
    assert cli.run(["merge", str(tmp_path / "m"), str(tmp_path / "out"), "--method", method, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [[0], [1], [2, 3, 4], [5], [6], [7]]
    with Engine.load(tmp_path / "m", method=method) as edited, Engine.load(tmp_path / "out") as written:
        assert written.config == edited.config
        assert written.config.eos_token_ids == (7,)
        assert written.generate(PROMPTS[2], params).token_ids == edited.generate(PROMPTS[2], params).token_ids
    line = ["merge", str(tmp_path / "m"), str(tmp_path / "new"), "--method"]
    for option, named in (
        ("threshold=1,rule=paper", "lower threshold or set rule=code or merge fewer than merge_layers=4 at a time\n"),
        (
            "threshold=1,merge_layers=2,interval=3",
            r"0\.\d+ \(layers [0-6]\+[1-7] merged by rule code\), got 1: lower threshold\n",
        ),
    ):
        assert cli.run([*line, f"laco:{option}"]) == 2
        assert re.search(named, capsys.readouterr().err)
        assert not (tmp_path / "new").exists()
    monkeypatch.setattr("skipjack.runtime.commands.merge.load_weights", lambda *_: pytest.fail("weights were read"))
    assert cli.run([*line, "laco:highest=1"]) == 2
    assert "options highest, merge_layers and lowest" in capsys.readouterr().err
    assert cli.run(["merge", str(tmp_path / "m"), str(tmp_path / "out"), "--method", method]) == 2
    assert "out: cannot be written" in capsys.readouterr().err
    assert cli.run(["merge", str(tmp_path / "m"), str(tmp_path / "new"), "--method", "swift"]) == 2
    assert "--method: expected laco, which edits weights, got swift" in capsys.readouterr().err


def test_layers_of_real_weights_merge_without_options(
    demo: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within two bounds, which spare the test the rest of the search."""
    now = itertools.count(step=20.0)
    monkeypatch.setattr("skipjack.runtime.commands.terminal.monotonic", lambda: next(now))
    bounds = "laco:lowest=15,highest=20"
    assert cli.run(["merge", str(demo.model_path), str(tmp_path / "out"), "--method", bounds, "--json"]) == 0
    streams = capsys.readouterr()
    assert [layers for layers in json.loads(streams.out)["layers"] if len(layers) > 1] == [[16, 17, 18, 19]]
    assert "candidates: 50%" in streams.err.splitlines()
