"""Checkpoints in several files, in the published format of every family there is a synthetic shape of."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from skipjack import CheckpointError
from skipjack.loaders.checkpoint import INDEX_FILE, Checkpoint
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import NAMES, synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors, load_weights

SHAPES = [name for name in NAMES if name.startswith("tiny-")]


@pytest.fixture(params=SHAPES)
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ModelConfig, dict[str, torch.Tensor]]:
    """A folder of several shards, its configuration and its tensors."""
    fields = synthetic_config(request.param)
    config = ModelConfig.parse(fields, request.param)
    tensors = checkpoint_tensors(synthetic_weights(config, 1, torch.float32), config)
    save_checkpoint(tmp_path / "m", fields, tensors, sum(tensor.nbytes for tensor in tensors.values()) // 4)
    return tmp_path / "m", config, tensors


def edit(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_shards_load_as_the_tensors_they_were_cut_from(sharded) -> None:
    folder, config, tensors = sharded
    assert len(list(folder.glob("model-*.safetensors"))) >= 4
    loaded = checkpoint_tensors(load_weights(folder, ModelConfig.load(folder), torch.float32), config)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_what_an_index_gets_wrong_is_named(sharded) -> None:
    folder, config, tensors = sharded
    norm = next(name for name in tensors if "norm" in name)  # Its shard has other tensors too.
    shard = Checkpoint.open(folder).file(norm)

    edit(folder, lambda places: places.pop(norm))
    with pytest.raises(CheckpointError) as unlisted:
        load_weights(folder, config, torch.float32)
    assert f"{shard}: '{norm}': expected in no shard by {INDEX_FILE}, found here" in str(unlisted.value)

    edit(folder, lambda places: places.update({norm: shard.name, "extra.weight": shard.name}))
    with pytest.raises(CheckpointError) as promised:
        load_weights(folder, config, torch.float32)
    assert f"{INDEX_FILE}: weight_map: expected 'extra.weight' in '{shard.name}', found it absent" in str(
        promised.value
    )

    shard.unlink()
    with pytest.raises(CheckpointError) as gone:
        load_weights(folder, config, torch.float32)
    assert f"weight_map: expected the file '{shard.name}' beside it, found none" in str(gone.value)


def test_a_tensor_no_shard_has_is_named(sharded) -> None:
    folder, config, tensors = sharded
    last = list(tensors)[-1]
    save_checkpoint(folder.parent / "less", {}, {name: tensors[name] for name in tensors if name != last}, 100_000)
    with pytest.raises(CheckpointError, match=f"{last}: expected shape .* found no such tensor"):
        load_weights(folder.parent / "less", config, torch.float32)
