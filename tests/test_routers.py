"""Routed checkpoints on disk: published tensors, shards, what is refused by name, and routers for a plain model."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.loaders.attach import ROUTERS_FILE, attach_routers
from skipjack.loaders.checkpoint import Checkpoint
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import CheckpointError, ConfigError
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.loaders.weights import checkpoint_tensors, load_weights
from skipjack.runtime.commands import cli

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = [5, 9, 200, 31]


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed") / "m"
    write_synthetic(folder, "routed-tiny", seed=0, late_scale=0.3)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "m"
    write_synthetic(folder, "tiny", seed=0, late_scale=0.3)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (folder / "notes.md").write_text("not a file of the model")
    return folder


def test_tensors_go_where_the_published_names_say(routed: Path) -> None:
    state, config = load_file(routed / "model.safetensors"), ModelConfig.load(routed)
    assert config.routing.layers == (4, 5, 6, 7)
    weights = load_weights(routed, config, torch.float32)
    for place, layer in enumerate(config.routing.layers):
        lead = f"model.layers.{layer}."
        assert torch.equal(weights.router_encoder[place], state[lead + "router.router_enc.weight"])
        assert torch.equal(weights.router_norm[place], state[lead + "router.router_norm.weight"])
        assert torch.equal(weights.router_decoder[place], state[lead + "router.router_dec.weight"])
        assert torch.equal(weights.router_head[place], state[lead + "router.router_head.weight"])
        gate, up = (state[f"{lead}router_proj.{part}_proj.weight"] for part in ("gate", "down"))
        assert torch.equal(weights.adapter_up[place], torch.cat([gate, up]))
        assert torch.equal(weights.adapter_down[place], state[lead + "router_proj.up_proj.weight"])


def test_shards_load_and_give_the_same_tokens(routed: Path, tmp_path: Path) -> None:
    fields = json.loads((routed / "config.json").read_text())
    save_checkpoint(tmp_path / "m", fields, load_file(routed / "model.safetensors"), max_shard_bytes=200_000)
    assert len(list((tmp_path / "m").glob("model-*"))) > 3
    one, other = (Engine.load(folder, method="flexidepth", cache_tokens=512) for folder in (routed, tmp_path / "m"))
    assert one.generate(PROMPT, PARAMS).token_ids == other.generate(PROMPT, PARAMS).token_ids


def changed(folder: Path, target: Path, name: str, tensor: Tensor | None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_checkpoint(target, json.loads((folder / "config.json").read_text()), tensors)
    return target


@pytest.mark.parametrize(
    "name", ["router.router_enc", "router.router_norm", "router.router_head", "router_proj.up_proj"]
)
def test_missing_and_misshapen_router_tensors_are_named(routed: Path, tmp_path: Path, name: str) -> None:
    name = f"model.layers.5.{name}.weight"
    shape = list(load_file(routed / "model.safetensors")[name].shape)
    for target, tensor, found in (("a", None, "no such tensor"), ("b", torch.zeros(3, 5), r"\[3, 5\]")):
        folder = changed(routed, tmp_path / target, name, tensor)
        with pytest.raises(CheckpointError, match=rf"{name}: expected shape \{shape}.*found {found}"):
            Engine.load(folder, method="flexidepth")


def test_routers_in_layers_that_are_not_routed_are_refused(routed: Path, tmp_path: Path) -> None:
    name = "model.layers.1.router.router_norm.weight"
    folder = changed(routed, tmp_path / "m", name, torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"layers\.1\.router.*expected no such tensor in a ddllama model"):
        Engine.load(folder, method="flexidepth")
    fields = json.loads((routed / "config.json").read_text()) | {"model_type": "llama", "architectures": None}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"router.*expected no such tensor in a llama model"):
        Engine.load(folder)


def test_weights_without_routers_are_refused() -> None:
    fields = synthetic_config("routed-tiny")
    config = ModelConfig.parse(fields, "x")
    weights = synthetic_weights(ModelConfig.parse(synthetic_config("tiny"), "x"), 0, torch.float32)
    with pytest.raises(ConfigError, match="expected routers for layers"):
        Engine(config, weights, method="flexidepth")


def test_attached_routers_leave_the_model_as_it_was(plain: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.run(["route", str(plain), str(out), "--layers", "2+5-6", "--seed", "7"]) == 0
    assert "untrained" in capsys.readouterr().err
    config = ModelConfig.load(out)
    assert config.routing.layers == (2, 5, 6)
    assert not config.routing.trained
    before = load_weights(plain, ModelConfig.load(plain), torch.float32)
    after = load_weights(out, config, torch.float32)
    for field, tensor in vars(before).items():
        assert tensor is None or torch.equal(tensor, getattr(after, field)), field
    assert not after.adapter_down.any()
    assert after.router_encoder.any()
    assert sorted(os.listdir(out)) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        ROUTERS_FILE,
        "tokenizer_config.json",
    ]
    assert (out / "model-00001-of-00001.safetensors").samefile(plain / "model.safetensors")
    output = Engine.load(out, method="flexidepth", cache_tokens=512).generate(PROMPT, PARAMS)
    assert output.stats.executed_skips > 0
    with pytest.raises(CheckpointError, match="out: cannot be written"):
        attach_routers(plain, out)
    assert os.listdir(tmp_path) == ["out"]


def test_a_seed_beyond_64_bits_is_refused(plain: Path, tmp_path: Path, capsys) -> None:
    assert cli.run(["route", str(plain), str(tmp_path / "out"), "--seed", str(1 << 70)]) == 2
    assert "seed: expected an integer from 0 to 2^63 - 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_trained_routers_come_from_a_file(routed: Path, plain: Path, tmp_path: Path, monkeypatch) -> None:
    """The synthetic routed model is the plain one and routers: taken apart and put together it says the same."""

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    tensors = load_file(routed / "model.safetensors")
    routers = {name: tensor for name, tensor in tensors.items() if ".router" in name}
    save_file(routers, tmp_path / "routers.safetensors")
    save_checkpoint(
        tmp_path / "sharded",
        json.loads((plain / "config.json").read_text()),
        load_file(plain / "model.safetensors"),
        max_shard_bytes=200_000,
    )
    config = attach_routers(tmp_path / "sharded", tmp_path / "out", routers=tmp_path / "routers.safetensors")
    assert config.routing.trained
    ours = Engine.load(tmp_path / "out", method="flexidepth", cache_tokens=512).generate(PROMPT, PARAMS)
    theirs = Engine.load(routed, method="flexidepth", cache_tokens=512).generate(PROMPT, PARAMS)
    assert ours.token_ids == theirs.token_ids
    assert ours.stats.notes == ()
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.names() == set(tensors)


def test_routers_that_do_not_fit_are_named(routed: Path, plain: Path, tmp_path: Path) -> None:
    tensors = load_file(routed / "model.safetensors")
    routers = {name: tensor for name, tensor in tensors.items() if ".router" in name}
    path = tmp_path / "routers.safetensors"
    save_file(routers, path)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.4\.router.*: expected the routers of the chosen"):
        attach_routers(plain, tmp_path / "out", [5, 6, 7], routers=path)
    with pytest.raises(CheckpointError, match=r"layers\.3\.router\.router_enc.*found no such tensor"):
        attach_routers(plain, tmp_path / "out", [3, 4, 5, 6, 7], routers=path)
    with pytest.raises(CheckpointError, match=r"router_enc.weight: expected shape \[8, 64\] .* found \[4, 64\]"):
        attach_routers(plain, tmp_path / "out", routers=path, router_reduction=8)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: expected a safetensors file, found none"):
        attach_routers(plain, tmp_path / "out", routers=tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="model_type: expected 'llama', which routers fit, found 'ddllama'"):
        attach_routers(routed, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^layers: expected .* got \[7, 8\]"):
        attach_routers(plain, tmp_path / "out", [7, 8])
    assert os.listdir(tmp_path) == ["routers.safetensors"]


@pytest.mark.parametrize("layers", ["x", "", "3-", "-3", "1++2", "1-100000", "9-3", "1,2"])
def test_layers_are_numbers_and_spans(plain: Path, tmp_path: Path, capsys, layers: str) -> None:
    assert cli.run(["route", str(plain), str(tmp_path / "out"), f"--layers={layers}"]) == 2
    assert "--layers: expected" in capsys.readouterr().err


def test_a_routed_checkpoint_survives_the_round_trip(routed: Path) -> None:
    config = ModelConfig.load(routed)
    assert config == ModelConfig.parse(synthetic_config("routed-tiny"), "x")
    state = load_file(routed / "model.safetensors")
    written = checkpoint_tensors(load_weights(routed, config, torch.float32), config)
    assert set(written) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--layers=9", "layers: expected different layers from 0 to 7, at least one, got [9]"),
        ("--layers=2+2", "layers: expected different layers"),
        ("--gate=soft", "gate: expected one of released, ste_hard, got 'soft'"),
        ("--router-reduction=100000", "router_reduction: expected an integer from 1 to "),
        ("--adapter-reduction=100000", "adapter_reduction: expected an integer from 1 to "),
    ],
)
def test_what_the_new_model_cannot_be_is_said_of_the_option(plain, tmp_path, capsys, option, message):
    assert cli.run(["route", str(plain), str(tmp_path / "out"), option]) == 2
    assert f"error: {message}" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
