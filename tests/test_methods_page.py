"""The method that docs/methods.md shows how to write works as it stands there."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from skipjack import Engine, RequestError, SamplingParams
from skipjack.bench import rotation
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.commands.cli import run
from skipjack.runtime.methods import registry

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")

CONFIG = ModelConfig.parse(synthetic_config("tiny"), "tiny")


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return text


def install(folder: Path, module: str, source: str, entry: str) -> None:
    """A package as pip leaves it: a module, and beside it what is known of the package."""
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    known = folder / f"{module}-1.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    (known / "entry_points.txt").write_text(f"[skipjack.methods]\n{entry}\n", encoding="utf-8")


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's module and entry point, installed."""
    section, entry = block("toml").strip().splitlines()
    assert section == f'[project.entry-points."{registry.GROUP}"]'
    install(tmp_path, "skipjack_echo", block("python"), entry.replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)
    registry.find.cache_clear()
    yield
    registry.find.cache_clear()
    sys.modules.pop("skipjack_echo", None)


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}], ids=str)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_its_tokens_are_those_of_plain_decoding(
    synthetic: Callable[..., Engine], k: int, fields: dict[str, float]
) -> None:
    engine = synthetic("tiny", torch.float32, 0.3, vocab=4)
    prompts, params = [[1, 2, 3], [3], [2] * 30], SamplingParams(max_tokens=40, ignore_eos=True, **fields)
    plain, drafted = (
        engine.generate(prompts, params),
        engine.generate(prompts, params, method=f"echo:num_draft_tokens={k}"),
    )
    assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]
    assert 0 < sum(output.stats.accepted for output in drafted) < sum(output.stats.drafted for output in drafted)
    assert all(output.stats.lossless and output.stats.method == "echo" for output in drafted)


@pytest.mark.usefixtures("echo")
def test_it_keeps_to_its_room_at_the_end_of_a_page() -> None:
    """Two sequences whose last slots are the last ones of their pages."""
    config = ModelConfig.parse(synthetic_config("tiny") | {"vocab_size": 4}, "tiny")
    with Engine(config, synthetic_weights(config, 0, torch.float32, 0.3), cache_tokens=512) as engine:
        prompts, params = [[1, 2] * 120, [3] * 240], SamplingParams(max_tokens=16, ignore_eos=True)
        plain, drafted = (
            engine.generate(prompts, params),
            engine.generate(prompts, params, method="echo:num_draft_tokens=8"),
        )
    assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]


@pytest.mark.usefixtures("echo")
def test_its_options_are_checked_and_rotate() -> None:
    with pytest.raises(RequestError, match="method echo: option num_draft_tokens expects 1 to 64, got 0"):
        registry.parse("echo:num_draft_tokens=0")
    assert rotation.named(["lookup", "echo"]) == ("lookup", "echo")
    assert (
        registry.parse(rotation.Cell("echo", (("num_draft_tokens", "4"), ("batch", "1"))).method(8, 0)).name == "echo"
    )
    assert set(rotation.factors("echo")) == {"num_draft_tokens", "batch"}


@pytest.mark.usefixtures("echo")
def test_the_command_line_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    """And holds it to plain decoding as any other method."""
    given = ["--method", "echo", "--max-tokens", "8", "--json"]
    assert run(["bench", "exact", "synthetic:tiny", *given]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in result["rows"]} == {"echo"}
    assert all(row["identical"] for row in result["rows"])
    assert [name for name, ran in result["pairs"].items() if not ran.startswith("0 of ")] == ["echo"]


@pytest.mark.parametrize(
    ("source", "entry", "named"),
    [
        ("import nothing_of_that_name", "broken:Own", "broken:Own does not load: No module named"),
        ("1 / 0", "broken:Own", "broken:Own does not load: division by zero"),
        ("", "broken:Own", "broken:Own does not load: .* has no attribute"),
        (
            "Own = 3",
            "broken:Own",
            "expected a subclass of Method with that name and a dataclass of options at broken:Own",
        ),
        (
            "from skipjack.runtime.methods.base import Method\nclass Own(Method):\n    name = 'own'",
            "broken:Own",
            "with that name and a dataclass of options at broken:Own",
        ),
        (
            "from skipjack.runtime.methods.swift import Swift as Own",
            "broken:Own",
            "expected a subclass of Method with that",
        ),
    ],
)
def test_a_method_that_does_not_load_is_an_error_that_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, entry: str, named: str
) -> None:
    install(tmp_path, "broken", source, f"own = {entry}\nswift = {entry}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(RequestError, match=f"method own: .*{named}"):
        registry.parse("own")
    with pytest.raises(RequestError, match=r"unknown method 'other', expected one of adaskip, .*unified, own$"):
        registry.parse("other")
    assert registry.parse("swift").build(CONFIG).lossless
    with pytest.raises(RequestError, match=named):
        rotation.named(["own"])
