"""ModelConfig: what config.json says, checked, in one vocabulary for every model family."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .attention_routing import AttentionRouting
from .errors import ConfigError
from .fields import Fields
from .json_files import present, read_object
from .routing import Routing

MAX_CONFIG_BYTES = 1_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched.

    Not at all, by `factor` (linear), by Llama 3's bands of wavelengths in positions (llama3), by YaRN's ramp between
    `beta_slow` and `beta_fast` turns over the original context, whose rotations are lengthened by `attention_factor`
    (yarn), or through a base that grows with the length of a text beyond the original context (dynamic).
    """

    kind: Literal["default", "linear", "llama3", "yarn", "dynamic"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Cycle:
    """How a model trained for Direct Multi-Token Decoding (arXiv 2510.11958) is split.

    `encoding`, `thinking`, `decoding`: layers of each part, in this order; they add up to all layers. `horizon`: tokens
    of a cycle, of which the first, its head, has the thinking layers.
    """

    encoding: int
    thinking: int
    decoding: int
    horizon: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the switches of a decoder-only model.

    `max_context`, `window`: positions, the first with what a yarn or dynamic scaling adds. A windowed token sees itself
    and the `window` - 1 tokens before it.
    `rope_layers`, `window_layers`: per layer, whether it rotates, whether it uses the window.
    `routing`: the layers that decide token by token whether they run, `attention_routing` those that decide once for
    every sequence whether their attention runs; None is a dense model.
    `eos_token_ids`, `bos_token_id`: ids the model has; ids beyond the vocabulary cannot be produced and are left out.
    `cycle`: of a checkpoint made for Direct Multi-Token Decoding, None for every other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    layer_norm: bool = False
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_layers: tuple[bool, ...] = ()
    alibi: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] = ()
    tied_head: bool = False
    embedding_norm: bool = False
    routing: Routing | None = None
    attention_routing: AttentionRouting | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    cycle: Cycle | None = None

    @staticmethod
    def load(folder: Path) -> ModelConfig:
        """Read config.json, and the end-of-text ids of generation_config.json where it gives them.

        Raises:
            ConfigError: a file is missing or malformed, or describes a model that is not supported.
        """
        folder = Path(folder)
        if not os.path.isdir(folder):
            raise ConfigError(
                f"{folder}: expected a model folder, found {'a file' if os.path.exists(folder) else 'nothing'}"
            )
        path = folder / "config.json"
        fields = dict(read_object(path, MAX_CONFIG_BYTES, ConfigError))
        generation_path = folder / "generation_config.json"
        if present(generation_path, ConfigError):
            generation = read_object(generation_path, MAX_CONFIG_BYTES, ConfigError)
            Fields(generation, str(generation_path)).token_ids("eos_token_id")
            if generation.get("eos_token_id") is not None:
                fields["eos_token_id"] = generation["eos_token_id"]
        if fields.get("auto_map") is not None:
            _log.warning("%s: auto_map is ignored: no code of a model folder is executed", path)
        return ModelConfig.parse(fields, str(path))

    @staticmethod
    def parse(fields: Mapping[str, object], source: str) -> ModelConfig:
        """Check the fields of a config.json; `source` names the file in errors.

        Raises:
            ConfigError: a field is missing, of the wrong type or out of range, or the model is not supported.
        """
        from .families import parse_family  # families builds ModelConfig

        return parse_family(Fields(fields, source))
