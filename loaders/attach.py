"""Routers for a plain Llama checkpoint: a new folder with its shards, and beside them routers drawn or given."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from .checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from .config import MAX_CONFIG_BYTES, ModelConfig
from .errors import CheckpointError, ConfigError
from .json_files import present, read_object, shown
from .naming import ROUTED_FIELDS, Piece, pieces
from .routing import GATES, REDUCTION, routed_fields
from .save import staged_folder, write_json, write_tensors
from .synthetic import draw
from .weights import checked_plan

ROUTERS_FILE: Final = "routers.safetensors"
# Other libraries prefer a file of the single name to an index, and would miss the routers.
_FIRST_SHARD: Final = "model-00001-of-00001.safetensors"
_TEXT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def attach_routers(
    folder: Path,
    target: Path,
    layers: Sequence[int] | None = None,
    *,
    routers: Path | None = None,
    seed: int = 0,
    gate: str = "released",
    router_reduction: int = REDUCTION,
    adapter_reduction: int = REDUCTION,
) -> ModelConfig:
    """Write `target`: the Llama model in `folder` with FlexiDepth's routers in `layers`, the late half without them.

    The routers are those of the safetensors file `routers`, under their published names, or drawn from `seed`, in
    which case the configuration says that they are untrained. Shards are hard links where the disk allows, copies
    elsewhere; `folder` is not changed. Returns the new configuration.

    Raises:
        ConfigError: `folder` is not a Llama model, or a layer, the seed, the gate or a reduction is out of range.
        CheckpointError: a file is malformed, a router's tensor is missing, left over or misshapen, or `target` is
            there already and not empty.
    """
    folder, target = Path(folder), Path(target)
    plain = ModelConfig.load(folder)
    source = folder / "config.json"
    if plain.model_type != "llama":
        raise ConfigError(f"{source}: model_type: expected 'llama', which routers fit, found {shown(plain.model_type)}")
    layers = range(plain.num_layers // 2, plain.num_layers) if layers is None else layers
    _check(plain, layers, seed, gate, router_reduction, adapter_reduction)
    fields = routed_fields(
        read_object(source, MAX_CONFIG_BYTES, ConfigError),
        layers,
        router_reduction=router_reduction,
        adapter_reduction=adapter_reduction,
        gate=gate,
        trained=routers is not None,
    )
    config = ModelConfig.parse(fields, str(target / "config.json"))
    with Checkpoint.open(folder) as checkpoint:
        checked_plan(folder, checkpoint, plain)
        weight_map = {name: checkpoint.file(name) for name in sorted(checkpoint.names())}
    wanted = [piece for piece in pieces(config) if piece.field in ROUTED_FIELDS]
    tensors = _drawn(config, wanted, seed) if routers is None else _given(Path(routers), wanted)
    shards = {file: _FIRST_SHARD if file.name == SINGLE_FILE else file.name for file in weight_map.values()}
    with staged_folder(target) as stage:
        write_json(stage / "config.json", fields)
        for file, name in shards.items():
            _link(file, stage / name)
        for name in _TEXT_FILES:
            if present(folder / name, CheckpointError):
                shutil.copyfile(folder / name, stage / name)
        write_tensors(stage / ROUTERS_FILE, tensors)
        places = {name: shards[file] for name, file in weight_map.items()} | dict.fromkeys(tensors, ROUTERS_FILE)
        write_json(stage / INDEX_FILE, {"metadata": {}, "weight_map": places})
    return config


def _check(
    plain: ModelConfig, layers: Sequence[int], seed: int, gate: str, router_reduction: int, adapter_reduction: int
) -> None:
    """What config.json of the new folder would be refused for, said of the argument it comes from."""
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(plain.num_layers)):
        expected = f"different layers from 0 to {plain.num_layers - 1}, at least one"
        raise ConfigError(f"layers: expected {expected}, got {shown(list(layers))}")
    if gate not in GATES:
        raise ConfigError(f"gate: expected one of {', '.join(GATES)}, got {shown(gate)}")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed: expected an integer from 0 to 2^63 - 1, got {seed}")
    for name, reduction, size in (
        ("router_reduction", router_reduction, plain.hidden_size),
        ("adapter_reduction", adapter_reduction, plain.intermediate_size),
    ):
        if not 1 <= reduction <= size:
            raise ConfigError(f"{name}: expected an integer from 1 to {size}, got {reduction}")


def _drawn(config: ModelConfig, wanted: Sequence[Piece], seed: int) -> dict[str, Tensor]:
    """Routers that let about half of the tokens skip a layer, and adapters that add nothing until they are trained."""
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, config.dtype)
    drawn = {piece.name: draw(piece.field, piece.shape, config, generator).to(dtype) for piece in wanted}
    for piece in wanted:
        if piece.field == "adapter_down":
            drawn[piece.name].zero_()
    return drawn


def _given(path: Path, wanted: Sequence[Piece]) -> dict[str, Tensor]:
    with Checkpoint.of_file(path) as routers:
        present = routers.names()
        for piece in wanted:
            if piece.name not in present:
                raise CheckpointError(f"{path}: {piece.name}: expected shape {list(piece.shape)}, found no such tensor")
            if routers.shape(piece.name) != piece.shape:
                raise CheckpointError(
                    f"{path}: {piece.name}: expected shape {list(piece.shape)} by the layers and reductions asked for, "
                    f"found {list(routers.shape(piece.name))}"
                )
        left_over = sorted(present - {piece.name for piece in wanted})
        if left_over:
            raise CheckpointError(f"{path}: {shown(left_over[0])}: expected the routers of the chosen layers alone")
        return {piece.name: routers.read(piece.name).clone() for piece in wanted}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
