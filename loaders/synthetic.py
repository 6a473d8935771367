"""Random models of named shapes, for tests and benchmarks without a download."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import ConfigError
from .naming import field_shapes
from .routing import routed_fields
from .save import save_checkpoint
from .weights import Weights, checkpoint_tensors

_LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_TINY: Final[dict[str, object]] = {
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_SHAPES: Final[dict[str, dict[str, object]]] = {
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-mistral": {"model_type": "mistral", **_TINY, "sliding_window": 32},
    "tiny-qwen2": {"model_type": "qwen2", **_TINY, "tie_word_embeddings": True},
    "tiny-qwen3": {"model_type": "qwen3", **_TINY, "head_dim": 32},
    "tiny-smollm3": {"model_type": "smollm3", **_TINY, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
    "tiny-mindskip": {
        "model_type": "llama_mindskip",
        **_TINY,
        "is_mindskip": [False, False, False, True, True, True, True, False],
        "granularity": "attn_sequence",
        "threshold": 0.5,
    },
    "tiny-bloom": {
        "model_type": "bloom",
        "n_layer": 8,
        "hidden_size": 64,
        "n_head": 4,
        "vocab_size": 512,
        "seq_length": 1024,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "torch_dtype": "float32",
    },
    # The shape of SmolLM2-135M.
    "135m": {
        **_TINY,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    # The shape of Llama-3.2-1B.
    "1b": {
        **_TINY,
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "torch_dtype": "bfloat16",
    },
    # The shape of Llama-3.1-8B.
    "8b": {
        **_TINY,
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 8.0},
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "torch_dtype": "bfloat16",
    },
    # The shape of Qwen3-4B.
    "4b": {
        **_TINY,
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    },
}
# Direct Multi-Token Decoding: a small one, and the shape of the published checkpoints.
_SHAPES["tiny-dmtd"] = {
    **_SHAPES["tiny-qwen3"],
    "model_type": "mtpqwen3",
    "num_encoding_layers": 0,
    "num_thinking_layers": 6,
    "num_decoding_layers": 2,
    "mtp_horizon": 4,
}
_SHAPES["4b-dmtd"] = {
    **_SHAPES["4b"],
    "model_type": "mtpqwen3",
    "num_encoding_layers": 0,
    "num_thinking_layers": 28,
    "num_decoding_layers": 8,
    "mtp_horizon": 4,
}
_SHAPES["tiny"] = _SHAPES["tiny-llama"]
NAMES: Final = tuple(sorted(_SHAPES))
# Before a Llama shape's name: its late half of layers is routed.
ROUTED: Final = "routed-"
# The standard deviation of a router's logits, about: half of the tokens skip a layer.
_ROUTE_SCALE: Final = 2.0
# The mean over a prompt that MindSkip's routers see is smaller than any of its tokens.
_MEAN_ROUTE_SCALE: Final = 4.0
# The standard deviation of the logits, and of q and k per channel (attention scores deviate by its square).
_LOGIT_SCALE: Final = 2.0
_SHARPNESS: Final = 1.5


def synthetic_config(name: str) -> dict[str, object]:
    """The config.json fields of a named shape; "routed-NAME" has FlexiDepth's routers in the late half of its layers.

    Raises:
        ConfigError: no such shape; the message lists them.
    """
    shape = name.removeprefix(ROUTED)
    if shape not in _SHAPES:
        raise ConfigError(f"synthetic model: expected one of {', '.join(NAMES)}, found {name!r}")
    fields = dict(_SHAPES[shape])
    if shape == name:
        return fields
    if fields["model_type"] != "llama":
        raise ConfigError(f"synthetic model: expected a Llama shape after {ROUTED}, found {shape!r}")
    layers = int(str(fields["num_hidden_layers"]))
    return routed_fields(fields, range(layers // 2, layers), trained=False)


def synthetic_weights(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    late_scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Weights:
    """Random weights whose greedy text wanders: attention is sharp, and the head looks away from the
    last token.

    `late_scale` multiplies what the late half of the layers adds to the residual (their output and down matrices):
    1 is plainly random, 0 makes the late layers do nothing, so that a draft that skips them always agrees; between
    them the rate at which it agrees falls as the scale grows (measured on tiny-llama and tiny-qwen3, random tokens,
    greedy choices of the first half alone: 0.1 agrees on 84 %, 0.2 on 68 %, 0.3 on 56 %, 0.5 on 38 %).
    The same seed gives the same weights per device kind.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shapes = field_shapes(config)
    tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        stacked = len(shapes[name]) == (2 if _is_vector(name) else 3)
        for block in tensor if stacked else (tensor,):
            block.copy_(draw(name, tuple(block.shape), config, generator))
    late = config.num_layers // 2
    for name in ("output", "output_bias", "down", "down_bias"):
        if name in tensors:
            tensors[name][late:] *= late_scale
    if config.routing:
        tensors["adapter_down"][[layer >= late for layer in config.routing.layers]] *= late_scale
    return Weights.of(tensors)


def write_synthetic(
    folder: Path, name: str, seed: int, late_scale: float = 1.0, device: torch.device | str = "cpu"
) -> None:
    """Write a named shape with random weights as a model folder, in the dtype of its configuration; they are drawn on
    `device`, a GPU in a fraction of the time.

    Raises:
        ConfigError: no such shape.
        CheckpointError: the folder is there already and not empty, or cannot be written.
    """
    fields = synthetic_config(name)
    config = ModelConfig.parse(fields, f"synthetic model {name}")
    weights = synthetic_weights(config, seed, getattr(torch, config.dtype), late_scale, device)
    save_checkpoint(folder, fields, checkpoint_tensors(weights, config))


def _is_vector(name: str) -> bool:
    return name.endswith(("norm", "bias"))


def draw(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Random float32 values for one tensor of a field of Weights, of one layer where it is stacked."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("bias"):
        return values * 0.02
    if name in ("q_norm", "k_norm"):
        return (1 + 0.1 * values) * _SHARPNESS
    if name == "norm":
        # Random signs: a tied head would otherwise find the token it was given most likely, for ever.
        return (1 + 0.1 * values.abs()) * values.sign()
    if name.endswith("norm"):
        return 1 + 0.1 * values
    # Each sub-layer adds 1/sqrt(L), so that half of the layers add up to a residual of about one per channel.
    per_layer = 1 / math.sqrt(config.num_layers)
    gain = {
        "embedding": _LOGIT_SCALE,
        "head": _LOGIT_SCALE,
        "output": 1.5 * per_layer,
        "down": 1.7 * per_layer,
        "router_head": _ROUTE_SCALE,
        "attention_router": _MEAN_ROUTE_SCALE,
        "adapter_down": 1.7 * per_layer,
    }
    values *= gain.get(name, 1.0) / math.sqrt(shape[-1])
    if name == "qkv" and not config.qk_norm:
        queries_and_keys = (config.num_heads + config.num_kv_heads) * config.head_dim
        values[:queries_and_keys] *= _SHARPNESS
    return values
