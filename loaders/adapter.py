"""A draft's adapter (Kangaroo, arXiv 2404.18911): attention layers without MLPs and a final norm, in its own folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .config import ModelConfig, RopeScaling
from .errors import ConfigError
from .json_files import shown
from .naming import Piece, field_shapes, pieces
from .synthetic import draw
from .weights import check_pieces, fill

_FIELDS: Final = ("attention_norm", "qkv", "output", "norm")
_IGNORABLE: Final = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_LITTLE: Final = 0.1
# What an adapter has of the model it drafts for: it lies in the cache's pages and reads the model's residual stream.
_SHARED: Final = (
    ("hidden_size", "hidden_size"),
    ("num_attention_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("head_dim", "head_dim"),
)


@dataclass(frozen=True)
class AdapterWeights:
    """A layers of attention, stacked and fused as in `Weights`; the norm after them is None where it is the model's."""

    attention_norm: Tensor  # [A, H]
    qkv: Tensor  # [A, (heads + 2 * kv_heads) * D, H]
    output: Tensor  # [A, H, heads * D]
    norm: Tensor | None  # [H]


def adapter_config(folder: Path, model: ModelConfig) -> ModelConfig:
    """The configuration of an adapter for a model of this shape; the headers of its weights are checked too.

    Raises:
        ConfigError: config.json is missing or malformed, or does not describe an adapter for this model.
        CheckpointError: model.safetensors is missing or malformed, or a tensor is missing, left over or misshapen.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ConfigError(f"{folder}: expected the folder of an adapter, found {found}")
    config, source = ModelConfig.load(folder), folder / "config.json"
    if config.model_type != "llama":
        raise ConfigError(f"{source}: model_type: expected 'llama', found {shown(config.model_type)}")
    if config.qkv_bias:
        raise ConfigError(f"{source}: attention_bias: expected false, as adapters have no biases, found true")
    if config.rope_scaling.kind == "dynamic":
        expected = "a scaling that does not follow a text's length"
        raise ConfigError(f"{source}: rope_scaling: expected {expected}, found dynamic")
    for field, name in _SHARED:
        expected, found = getattr(model, name), getattr(config, name)
        if found != expected:
            raise ConfigError(f"{source}: {field}: expected the model's {expected}, found {found}")
    with Checkpoint.open(folder) as checkpoint:
        _check(folder, checkpoint, config)
    return config


def load_adapter(folder: Path, config: ModelConfig, dtype: torch.dtype) -> AdapterWeights:
    """Read an adapter of that configuration, cast to `dtype`, on the CPU.

    Raises:
        CheckpointError: as `adapter_config`, or a number is not finite in `dtype`.
    """
    folder = Path(folder)
    with Checkpoint.open(folder) as checkpoint:
        plan, shapes = _check(folder, checkpoint, config), field_shapes(config)
        tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in _FIELDS}
        for piece in plan:
            fill(tensors, piece, checkpoint.read(piece.name), checkpoint)
    return AdapterWeights(**tensors)


def untrained_config(model: ModelConfig) -> ModelConfig:
    """That of an adapter of one layer for a model of this shape."""
    return replace(
        model,
        model_type="llama",
        num_layers=1,
        layer_norm=False,
        qkv_bias=False,
        output_bias=False,
        qk_norm=False,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(),
        rope_layers=(True,),
        routing=None,
        attention_routing=None,
        cycle=None,
    )


def untrained_adapter(config: ModelConfig, dtype: torch.dtype) -> AdapterWeights:
    """An adapter drawn at random, the same whenever it is drawn, that adds little to the residual stream."""
    generator, shapes = torch.Generator().manual_seed(0), field_shapes(config)
    tensors = {name: draw(name, shapes[name], config, generator).to(dtype) for name in _FIELDS[:-1]}
    tensors["output"] *= _LITTLE
    return AdapterWeights(**tensors, norm=None)


def _check(folder: Path, checkpoint: Checkpoint, config: ModelConfig) -> list[Piece]:
    plan = [piece for piece in pieces(config, "") if piece.field in _FIELDS]
    ignored = {name for name in checkpoint.names() if _IGNORABLE.fullmatch(name)}
    check_pieces(folder, checkpoint, plan, ignored, "an adapter of this config.json")
    return plan
