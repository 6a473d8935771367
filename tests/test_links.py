"""Files of a model folder that are links: those that lead nowhere are named, not taken for absent."""

from pathlib import Path

import pytest
import torch

from skipjack import CheckpointError, ConfigError, Engine, SkipjackError, TokenizerError
from skipjack.loaders.attach import attach_routers
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors

NAMES = {
    "config.json": ConfigError,
    "generation_config.json": ConfigError,
    "tokenizer.json": TokenizerError,
    "tokenizer_config.json": TokenizerError,
    "special_tokens_map.json": TokenizerError,
    "chat_template.jinja": TokenizerError,
    "model.safetensors": CheckpointError,
    "model.safetensors.index.json": CheckpointError,
}


@pytest.fixture
def folder(tmp_path: Path, demo: Engine) -> Path:
    config = ModelConfig.parse(synthetic_config("tiny") | {"vocab_size": demo.config.vocab_size}, "tiny")
    weights = synthetic_weights(config, 0, torch.float32)
    fields = synthetic_config("tiny") | {"vocab_size": demo.config.vocab_size}
    save_checkpoint(tmp_path / "m", fields, checkpoint_tensors(weights, config))
    assert demo.model_path is not None
    (tmp_path / "m" / "tokenizer.json").write_bytes((demo.model_path / "tokenizer.json").read_bytes())
    return tmp_path / "m"


@pytest.mark.parametrize("target", ["nowhere", "itself"])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_that_leads_nowhere_is_named(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).symlink_to(folder / (name if target == "itself" else "nowhere"))
    with pytest.raises(NAMES[name]) as refused:
        Engine.load(folder, device="cpu")
    assert str(folder / name) in str(refused.value)
    assert "link" in str(refused.value)


def test_a_shard_that_is_a_dangling_link_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        Engine.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_folder_is_not_copied_without_what_a_dangling_link_promised(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "nowhere")
    with pytest.raises(SkipjackError, match=name):
        attach_routers(folder, tmp_path / "out", None)


def test_a_link_to_a_file_is_the_file(folder: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    with Engine.load(folder, device="cpu") as engine:
        assert engine.tokenizer is not None
