"""Models of the hub, against a stand-in that speaks its two requests: only what is needed is fetched, and errors."""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from skipjack import CheckpointError, ConfigError, Engine, SamplingParams
from skipjack.loaders import locate
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime.commands import cli

hub = pytest.importorskip("huggingface_hub", reason="the hub's client is not installed")
constants = importlib.import_module("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "org/gated": (403, "GatedRepo"),
    "org/missing": (404, "RepoNotFound"),
    "org/private": (401, "RepoNotFound"),
    "org/broken": (500, None),
}


@dataclass
class Hub:
    """A hub of two repositories, and what was asked of it."""

    url: str
    repositories: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        return [path.rsplit("/", 1)[1] for verb, path in self.asked if verb == "GET"]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        organisation, name, _, revision, file = self.path.strip("/").split("/")
        repo = f"{organisation}/{name}"
        self.hub.asked.append((self.command, self.path))
        body = self.hub.repositories.get(repo, {}).get(file)
        status, code = REFUSALS.get(repo, (404, "EntryNotFound") if body is None else (200, None))
        if repo not in REFUSALS and revision not in ("main", "v1", COMMIT):
            status, code = 404, "RevisionNotFound"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        body = (body or b"") if status == 200 else b""
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder, fields = tmp_path_factory.mktemp("hub"), synthetic_config("tiny")
    config = ModelConfig.parse(fields, "tiny")
    tensors = checkpoint_tensors(synthetic_weights(config, 0, torch.float32, 0.3), config)
    save_checkpoint(folder / "sharded", fields, tensors, 300_000)
    save_checkpoint(folder / "single", fields, tensors)
    files = {name: {p.name: p.read_bytes() for p in (folder / name).iterdir()} for name in ("single", "sharded")}
    noise = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "consolidated.safetensors": b"other"}
    template = {
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
        "generation_config.json": b'{"eos_token_id": 7}',
    }
    pickled = {"config.json": json.dumps(fields).encode(), "pytorch_model.bin": b"pickle"}
    return {
        "org/sharded": files["sharded"] | noise | template,
        "org/single": files["single"] | noise,
        "org/both": files["sharded"] | files["single"],
        "org/pickled": pickled,
        "org/empty": {},
    }


@pytest.fixture
def stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repositories: dict[str, dict[str, bytes]]
) -> Generator[Hub, None, None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    direct(monkeypatch, Handler.hub.url, tmp_path / "cache")
    yield Handler.hub
    server.shutdown()
    server.server_close()


def direct(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """The client reads its environment once, when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_only_what_a_model_needs_is_fetched_once(stand_in: Hub, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with Engine.load("org/sharded", progress=lambda *news: told.append(news)) as engine:
        tokens = engine.generate([1, 2, 3], SamplingParams(max_tokens=5)).token_ids
        assert engine.config.eos_token_ids == (7,)
        assert engine.model_path is not None
        assert (engine.model_path / "chat_template.jinja").is_file()
    assert told[:2] == [("preparing kernels", 0, 1), ("preparing kernels", 1, 1)]
    shards = {name for name in stand_in.repositories["org/sharded"] if name.startswith("model-")}
    small = {"config.json", "generation_config.json", "chat_template.jinja", "model.safetensors.index.json"}
    assert len(shards) > 1
    assert sorted(stand_in.fetched()) == sorted(small | shards)
    for shard in shards:
        size = len(stand_in.repositories["org/sharded"][shard])
        assert [news[1:] for news in told if news[0].endswith(shard)][-1] == (size, size)

    stand_in.asked.clear()
    with Engine.load("org/sharded@v1") as engine:
        assert engine.generate([1, 2, 3], SamplingParams(max_tokens=5)).token_ids == tokens
    assert stand_in.fetched() == []


def test_a_single_file_comes_before_shards(stand_in: Hub) -> None:
    locate.locate("org/both")
    assert sorted(stand_in.fetched()) == ["config.json", "model.safetensors"]


def test_cached_shards_need_no_hub(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where another tool cached them, which leaves no note that there is no single file."""
    for name in stand_in.repositories["org/sharded"]:
        if name.endswith((".json", ".jinja")) or name.startswith("model-"):
            hub.hf_hub_download("org/sharded", name)
    direct(monkeypatch, closed_port(), tmp_path / "cache")
    assert not (locate.locate("org/sharded") / "model.safetensors").exists()


def test_a_cached_model_needs_no_hub(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate.locate("org/single")
    assert sorted(stand_in.fetched()) == ["config.json", "model.safetensors"]
    direct(monkeypatch, closed_port(), tmp_path / "cache")
    assert locate.locate("org/single") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate.locate("org/single") == folder


def test_what_another_tool_cached_needs_no_hub(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no note of the files that do not exist; a copy without its weights is not enough."""
    for repo, names in (("org/single", ["config.json", "model.safetensors"]), ("org/sharded", ["config.json"])):
        for name in names:
            hub.hf_hub_download(repo, name)
    direct(monkeypatch, closed_port(), tmp_path / "cache")
    assert (locate.locate("org/single") / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"cannot be reached and generation_config\.json is not in its cache"):
        locate.locate("org/sharded")


def test_a_folder_of_that_name_comes_first(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/single").mkdir(parents=True)
    assert locate.locate("org/single") == Path("org/single")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Engine.load("org/single")
    assert stand_in.asked == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/gated", "hub: org/gated is gated: accept its terms"),
        ("org/missing", "expected a model folder or a repository org/missing, found neither"),
        ("org/private", "repository org/private, found neither .a private one needs HF_TOKEN"),
        ("org/broken", "org/broken: the hub cannot be reached and config.json is not in its cache .*500"),
        ("org/single@v9", "hub: org/single: expected a revision v9, found none"),
        ("org/empty", "org/empty: expected config.json, found none"),
        ("org/pickled", "org/pickled: expected model.safetensors, found none; only safetensors are read"),
    ],
)
def test_refusals_say_what_to_do(stand_in: Hub, model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        locate.locate(model)
    assert "\n" not in str(refusal.value)
    assert not any(name.endswith((".bin", ".py")) for name in stand_in.fetched())


def test_an_unreachable_hub_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct(monkeypatch, closed_port(), tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"org/single: the hub cannot be reached and config\.json is not"):
        locate.locate("org/single")


def test_an_unreachable_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would wait 1, 2, 4, 8 and 8 seconds between its questions; a hub that says nothing is not one."""
    direct(monkeypatch, closed_port(), tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    with pytest.raises(CheckpointError, match=r"cannot be reached .*refused"):
        locate.locate("org/single")
    monkeypatch.setattr("skipjack.loaders.hub.ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        direct(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
        with pytest.raises(CheckpointError, match=r"cannot be reached .*timed out"):
            locate.locate("org/single")


def test_without_the_client_a_hub_id_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for model, message in (("org/name", "pip install huggingface-hub"), ("/org/name", "got '/org/name', which is not")):
        assert cli.run(["generate", model, "--prompt-ids", "1"]) == 2
        assert message in capsys.readouterr().err


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"org is a folder without single; on the hub it is org/single@main"):
        locate.locate("org/single")
    assert stand_in.fetched() == []
    assert locate.locate("org/single@main").is_dir()


def test_the_command_line_takes_hub_ids(stand_in: Hub, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from skipjack.runtime.commands.cli import main; main()",
            "inspect",
            "org/single",
            "--json",
        ],
        env=os.environ | {"HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout)["max_context"] == 1024
    assert sorted(stand_in.fetched()) == ["config.json", "model.safetensors"]
