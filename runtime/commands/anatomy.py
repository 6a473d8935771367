"""What a model folder holds, from its config.json and the headers of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...loaders.chat_template import ChatTemplate
from ...loaders.checkpoint import Checkpoint
from ...loaders.config import ModelConfig
from ...loaders.routing import Routing

PARTS = ("embedding", "attention", "mlp", "norms", "head", "routers", "other")
_MATCHES = (
    ("routers", re.compile(r"\brouter(_proj)?\.")),
    ("norms", re.compile(r"norm|\bln_")),
    ("head", re.compile(r"^lm_head\.")),
    ("embedding", re.compile(r"embed_tokens|word_embeddings")),
    ("attention", re.compile(r"\b(self_attn|self_attention)\.")),
    ("mlp", re.compile(r"\bmlp\.")),
)


def examine(folder: Path) -> dict[str, Any]:
    """The model's sizes, its parameters and stored bytes by part, and what decoding a token reads of them.

    `h` is the head's parameters over those of one layer: what a draft that skips layers still pays for.

    Raises:
        ConfigError: config.json is missing, malformed or describes a model that is not supported.
        CheckpointError: the checkpoint is missing or malformed.
        TokenizerError: tokenizer_config.json or the chat template is malformed.
    """
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        sizes = {name: (prod(checkpoint.shape(name)), checkpoint.size(name)) for name in checkpoint.names()}
    parts = {part: _sum(size for name, size in sizes.items() if _part(name) == part) for part in PARTS}
    tied = config.tied_head or not parts["head"]["parameters"]
    if tied:
        parts["head"] = {**parts["embedding"], "tied": True}
    read = [parts[part] for part in PARTS if part != "embedding"]
    layer = sum(parts[part]["parameters"] for part in ("attention", "mlp")) / config.num_layers
    itemsize: int = getattr(torch, config.dtype).itemsize
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return {
        "folder": str(folder),
        "model_type": config.model_type,
        "dtype": config.dtype,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_context": config.max_context,
        "tied_head": tied,
        "position": _position(config),
        "cycle": None if config.cycle is None else asdict(config.cycle),
        "window": None if config.window is None else {"size": config.window, "layers": sum(config.window_layers)},
        **({"routing": _routing(config.routing)} if config.routing else {}),
        "parts": parts,
        **_sum(sizes.values()),
        "read_per_token": {"weight_bytes": sum(part["bytes"] for part in read), "kv_bytes_per_position": kv_bytes},
        "h": parts["head"]["parameters"] / layer if layer else None,
        **_text_files(folder),
        "methods": _methods(config),
    }


def show(anatomy: dict[str, Any]) -> None:
    """The anatomy as two tables on standard output."""
    from rich.table import Table

    from .terminal import answers

    position, window, read = anatomy["position"], anatomy["window"], anatomy["read_per_token"]
    cycle: dict[str, int] | None = anatomy["cycle"]
    rows = [
        ("folder", anatomy["folder"]),
        ("architecture", f"{anatomy['model_type']}, {anatomy['dtype']}"),
        (
            "layers",
            f"{anatomy['layers']}, hidden {anatomy['hidden_size']}, intermediate {anatomy['intermediate_size']}",
        ),
        ("heads", f"{anatomy['heads']} of {anatomy['head_dim']}, {anatomy['kv_heads']} for keys and values"),
        ("vocabulary", f"{anatomy['vocab_size']}, head {'tied' if anatomy['tied_head'] else 'separate'}"),
        ("context", str(anatomy["max_context"])),
        ("position", ", ".join(f"{key} {value}" for key, value in position.items()).removeprefix("kind ")),
        ("window", "none" if window is None else f"{window['size']} in {window['layers']} layers"),
        *([("cycle", ", ".join(f"{part} {value}" for part, value in cycle.items()))] if cycle else []),
        *([("routed layers", _routed(anatomy["routing"]))] if "routing" in anatomy else []),
        ("tokenizer", "present" if anatomy["tokenizer"] else "absent: use --prompt-ids"),
        ("chat template", "present" if anatomy["chat_template"] else "absent"),
        ("read per token", f"{_readable(read['weight_bytes'])} of weights"),
        ("", f"{_readable(read['kv_bytes_per_position'])} of keys and values per position in the context"),
        ("h", f"{anatomy['h']:.2f} (head parameters / one layer's parameters)"),
        ("methods", ", ".join(anatomy["methods"])),
    ]
    facts = Table.grid(padding=(0, 2))
    for name, value in rows:
        facts.add_row(name, value)
    sizes = Table("part", "parameters", "stored")
    for name, part in anatomy["parts"].items():
        if part["parameters"]:
            note = " (tied: the embedding again)" if part.get("tied") else ""
            sizes.add_row(name, f"{part['parameters']:,}{note}", _readable(part["bytes"]))
    sizes.add_row("total", f"{anatomy['parameters']:,}", _readable(anatomy["bytes"]))
    console = answers()
    console.print(facts, markup=False)
    console.print(sizes, markup=False)


def _routed(routing: dict[str, Any]) -> str:
    layers = ", ".join(map(str, routing["layers"]))
    return f"{layers} by token, gate {routing['gate']}{'' if routing['trained'] else ', routers untrained'}"


def _part(name: str) -> str:
    return next((part for part, pattern in _MATCHES if pattern.search(name)), "other")


def _sum(sizes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Of tensors with so many parameters and bytes each."""
    counted = list(sizes)
    return {"parameters": sum(count for count, _ in counted), "bytes": sum(size for _, size in counted)}


def _position(config: ModelConfig) -> dict[str, Any]:
    if config.alibi:
        return {"kind": "alibi"}
    scaling = config.rope_scaling
    stretched = {} if scaling.kind == "default" else {"factor": scaling.factor}
    layers = sum(config.rope_layers)
    return {"kind": "rope", "theta": config.rope_theta, "layers": layers, "scaling": scaling.kind, **stretched}


def _text_files(folder: Path) -> dict[str, bool]:
    template = ChatTemplate.load(folder)
    return {"tokenizer": (folder / "tokenizer.json").is_file(), "chat_template": template is not None}


def _routing(routing: Routing) -> dict[str, Any]:
    return {
        "layers": list(routing.layers),
        "router_width": routing.router_width,
        "adapter_width": routing.adapter_width,
        "gate": routing.gate,
        "trained": routing.trained,
    }


def _methods(config: ModelConfig) -> list[str]:
    from ..methods import registry

    return registry.names(config.model_type)


def _readable(count: int) -> str:
    unit, size = next((unit for unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= unit[1]), ("B", 1))
    return f"{count / size:,.1f} {unit}" if size > 1 else f"{count} B"
