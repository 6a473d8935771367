"""The method that docs/methods.md shows how to write works as it stands there."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from skipjack import Engine, RequestError, SamplingParams
from skipjack.bench import rotation
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.methods import registry

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    module = ModuleType("skipjack.runtime.methods.echo")
    module.__package__ = "skipjack.runtime.methods"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    line = re.search(r"`\"(echo)\": \(echo\.(\w+), echo\.(\w+)\)`", PAGE.read_text(encoding="utf-8"))
    assert line is not None
    name, method, options = line.groups()
    monkeypatch.setitem(registry._METHODS, name, (getattr(module, method), getattr(module, options)))


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
    assert "echo" in registry.lossless()
    assert (
        registry.parse(rotation.Cell("echo", (("num_draft_tokens", "4"), ("batch", "1"))).method(8, 0)).name == "echo"
    )
    assert set(rotation.factors("echo")) == {"num_draft_tokens", "batch"}
