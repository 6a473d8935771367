"""`skipjack merge`: a model whose layers LaCo merged, written as a folder that any engine loads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...kernels import ops
from ...loaders.config import MAX_CONFIG_BYTES, ModelConfig
from ...loaders.json_files import present, read_object
from ...loaders.save import staged_folder, write_checkpoint
from ...loaders.tokenizer import Tokenizer
from ...loaders.weights import Weights, checkpoint_tensors, load_weights
from ..choices import dtype_of
from ..errors import CheckpointError, ConfigError, RequestError
from ..merging import Build
from ..methods import registry
from ..methods.laco import LaCo
from ..model import Model
from .report import print_json
from .terminal import Progress, answers, progress_bar

_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def merge(folder: Path, output: Path, method: str, *, as_json: bool) -> None:
    """Merge layers as `method` laco says, and write the model with its tokenizer to the new folder `output`.

    Raises:
        RequestError: the method is another, its options do not fit the model, or they merge nothing.
        ConfigError: config.json has no words for the layers that are left.
        CheckpointError: `output` is there already and not empty, or the disk refuses.
    """
    config = ModelConfig.load(folder)
    laco = registry.parse(method).build(config)
    if not isinstance(laco, LaCo):
        raise RequestError(f"--method: expected laco, which edits weights, got {laco.name}")
    tokenizer = Tokenizer.load(folder, config)
    encode = tokenizer.encode if tokenizer else None
    files = [folder / name for name in _TEXT_FILES if present(folder / name, CheckpointError)]
    with staged_folder(output) as stage, progress_bar() as progress:
        weights = load_weights(folder, config, dtype_of("auto", config), partial(progress, "loading weights"))
        merged = laco.merged(config, weights, _counted(progress, laco.candidates), encode)
        if not merged.steps:
            raise RequestError(f"method laco: {laco.none_found(merged.trace)}")
        fields = _fields(folder / "config.json", config, merged.config)
        write_checkpoint(stage, fields, checkpoint_tensors(merged.weights, merged.config), files=files)
    summary = {"output": str(output), "of": config.num_layers, "kept": merged.config.num_layers, **merged.report()}
    if as_json:
        print_json(summary)
        return
    names = ", ".join("+".join(map(str, layers)) for layers in merged.origins if len(layers) > 1)
    answers().print(
        f"{output}: {merged.config.num_layers} of {config.num_layers} layers, merged: {names}", markup=False
    )


def _counted(progress: Progress, total: int) -> Build:
    """Prepares candidates and tells how many of `total` there were, 0 where nobody knows; the first is the original."""
    built = itertools.count()

    def build(config: ModelConfig, weights: Weights) -> Model:
        progress("candidates", next(built), total)
        return Model(config, weights, ops.TORCH)

    return build


def _fields(path: Path, config: ModelConfig, merged: ModelConfig) -> dict[str, Any]:
    """config.json for the layers that are left."""
    fields: dict[str, Any] = dict(read_object(path, MAX_CONFIG_BYTES, ConfigError))
    fields |= {name: merged.num_layers for name in ("num_hidden_layers", "n_layer") if name in fields}
    if any(merged.window_layers) and "max_window_layers" in fields:
        fields["max_window_layers"] = merged.window_layers.index(True)
    if "layer_types" in fields:
        fields["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in merged.window_layers]
    if not all(merged.rope_layers) and any(merged.rope_layers):
        fields["no_rope_layers"] = [int(rotates) for rotates in merged.rope_layers]
    # generation_config.json, which is copied, has a say in the end of a text.
    if replace(ModelConfig.parse(fields, str(path)), eos_token_ids=merged.eos_token_ids) != merged:
        raise ConfigError(f"{path}: the {merged.num_layers} layers left of {config.num_layers} cannot be written down")
    return fields
