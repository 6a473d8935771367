"""Weights: a model's tensors stacked by layer and fused, streamed from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import CheckpointError
from .json_files import shown
from .naming import Piece, field_shapes, naming, pieces

# The fields of Weights that have no leading axis of layers.
UNSTACKED: Final = frozenset({"embedding", "embedding_norm", "embedding_norm_bias", "norm", "norm_bias", "head"})


@dataclass(frozen=True)
class Weights:
    """L layers, H hidden, D head_dim, I intermediate, V vocabulary; the layer is the leading axis of a stacked tensor.

    `qkv`: q rows, then k rows, then v rows. `up`: gate rows, then up rows where the MLP is gated.
    `head` is `embedding` itself where the head is tied. N routed layers have routers of width r and adapters of width
    m, gate rows above up rows. A tensor that the model does not have is None.
    """

    embedding: Tensor  # [V, H]
    embedding_norm: Tensor | None  # [H]
    embedding_norm_bias: Tensor | None  # [H]
    attention_norm: Tensor  # [L, H]
    attention_norm_bias: Tensor | None  # [L, H]
    qkv: Tensor  # [L, (heads + 2 * kv_heads) * D, H]
    qkv_bias: Tensor | None  # [L, (heads + 2 * kv_heads) * D]
    q_norm: Tensor | None  # [L, D]
    k_norm: Tensor | None  # [L, D]
    output: Tensor  # [L, H, heads * D]
    output_bias: Tensor | None  # [L, H]
    mlp_norm: Tensor  # [L, H]
    mlp_norm_bias: Tensor | None  # [L, H]
    up: Tensor  # [L, 2 * I, H] gated, [L, I, H] not
    up_bias: Tensor | None  # [L, 2 * I] or [L, I]
    down: Tensor  # [L, H, I]
    down_bias: Tensor | None  # [L, H]
    norm: Tensor  # [H]
    norm_bias: Tensor | None  # [H]
    head: Tensor  # [V, H]
    attention_router: Tensor | None = None  # [N, 1, H]
    router_encoder: Tensor | None = None  # [N, r, H]
    router_norm: Tensor | None = None  # [N, r]
    router_decoder: Tensor | None = None  # [N, H, r]
    router_head: Tensor | None = None  # [N, 1, H]
    adapter_up: Tensor | None = None  # [N, 2 * m, H]
    adapter_down: Tensor | None = None  # [N, H, m]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Weights:
        """Weights from tensors by field name; fields left out are None, a head left out is the embedding."""
        head = tensors.get("head", tensors["embedding"])
        return Weights(**{f.name: tensors.get(f.name) for f in fields(Weights)} | {"head": head})  # pyright: ignore[reportArgumentType]

    def to(self, device: torch.device) -> Weights:
        """The same weights on `device`; a tied head stays one tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.head is self.embedding:
            del tensors["head"]
        return Weights.of({name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, progress: Callable[[int, int], None] | None = None
) -> Weights:
    """Read every tensor of a model folder once, cast to `dtype`, into the fused and stacked layout on the CPU.

    `progress` is called with the bytes read so far and the bytes in all.

    Raises:
        CheckpointError: a file is malformed, a tensor is missing, left over or not of the shape config.json implies, or
            holds a NaN or an infinity, which a number beyond `dtype` becomes, or a tied head has values of its own.
    """
    folder = Path(folder)
    with Checkpoint.open(folder) as checkpoint:
        plan = checked_plan(folder, checkpoint, config)
        _check_tied(checkpoint, config, plan)
        fused = {name: torch.empty(shape, dtype=dtype) for name, shape in field_shapes(config).items()}
        interleaved = naming(config.model_type).interleaved_qkv
        total = sum(checkpoint.size(piece.name) for piece in plan)
        done = 0
        for piece in plan:
            source = checkpoint.read(piece.name)
            if interleaved and piece.field in ("qkv", "qkv_bias"):
                source = split_heads(source, config.num_heads)
            fill(fused, piece, source, checkpoint)
            done += checkpoint.size(piece.name)
            if progress is not None:
                progress(done, total)
    return Weights.of(fused)


def _check_tied(checkpoint: Checkpoint, config: ModelConfig, plan: list[Piece]) -> None:
    """A copy of the embedding beside a tied head, which some writers leave, is one; of another, libraries disagree."""
    head, embedding = _spare_head(config, checkpoint.names()), next(p.name for p in plan if p.field == "embedding")
    if head is None or head == embedding:
        return
    if checkpoint.shape(head) != checkpoint.shape(embedding) or not torch.equal(
        found := checkpoint.read(head), checkpoint.read(embedding).to(found.dtype)
    ):
        raise CheckpointError(
            f"{checkpoint.file(head)}: {head}: expected a copy of {embedding}, because config.json says "
            "tie_word_embeddings, found other values (if this head is meant, say false there, else leave it out)"
        )


def fill(tensors: Mapping[str, Tensor], piece: Piece, source: Tensor, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensor to where it belongs. Raises CheckpointError where a number is not finite there."""
    target = place(tensors, piece).copy_(source)
    low, high = (float(end) for end in torch.aminmax(target))
    if not (math.isfinite(low) and math.isfinite(high)):
        dtype = str(target.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{checkpoint.file(piece.name)}: {piece.name}: expected finite numbers in {dtype}, found {low} to {high}"
        )


def place(tensors: Mapping[str, Tensor], piece: Piece) -> Tensor:
    """The view of a field of Weights where a checkpoint's tensor belongs."""
    target = tensors[piece.field] if piece.layer is None else tensors[piece.field][piece.layer]
    return target[piece.start : piece.start + piece.shape[0]]


def split_heads(fused: Tensor, heads: int) -> Tensor:
    """[heads, 3, D] rows of a fused q/k/v tensor to [3, heads, D] rows."""
    return fused.view(heads, 3, -1, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)


def join_heads(fused: Tensor, heads: int) -> Tensor:
    """The inverse of `split_heads`."""
    return fused.view(3, heads, -1, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)


def checkpoint_tensors(weights: Weights, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors under the names of a model folder: views of `weights`, copies where rows must be reordered."""
    fused = {name: getattr(weights, name) for name in field_shapes(config)}
    tensors = {piece.name: place(fused, piece) for piece in pieces(config)}
    if naming(config.model_type).interleaved_qkv:
        for piece in pieces(config):
            if piece.field in ("qkv", "qkv_bias"):
                tensors[piece.name] = join_heads(tensors[piece.name], config.num_heads)
    return tensors


def checked_plan(folder: Path, checkpoint: Checkpoint, config: ModelConfig) -> list[Piece]:
    """Which tensor goes where. Every shape is compared before memory is taken, and no tensor is left over.

    Raises:
        CheckpointError: a tensor is missing, left over or not of the shape config.json implies.
    """
    table = naming(config.model_type)
    present = checkpoint.names()
    bare = table.prefix_optional and not any(name.startswith(table.prefix) for name in present)
    plan = list(pieces(config, "" if bare else None))
    if head := _spare_head(config, present):
        # Of two names of one tensor some writers keep the first by the alphabet.
        plan = [replace(p, name=head) if p.field == "embedding" and p.name not in present else p for p in plan]
    ignored = {name for name in present if name == head or table.ignorable.fullmatch(name)}
    check_pieces(folder, checkpoint, plan, ignored, f"a {config.model_type} model of this config.json")
    return plan


def check_pieces(folder: Path, checkpoint: Checkpoint, plan: Sequence[Piece], ignored: set[str], kind: str) -> None:
    """Compare the tensors of a checkpoint of a `kind` with those of a plan.

    Raises:
        CheckpointError: one is missing, misshapen, or left over and not `ignored`.
    """
    present = checkpoint.names()
    for piece in plan:
        if piece.name not in present:
            raise CheckpointError(f"{folder}: {piece.name}: expected shape {list(piece.shape)}, found no such tensor")
        found = checkpoint.shape(piece.name)
        if found != piece.shape:
            raise CheckpointError(
                f"{checkpoint.file(piece.name)}: {piece.name}: expected shape {list(piece.shape)} by config.json, "
                f"found {list(found)}"
            )
        checkpoint.check_dtype(piece.name)
    left_over = sorted(present - {piece.name for piece in plan} - ignored)
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.file(left_over[0])}: {shown(left_over[0])}: expected no such tensor in {kind}, "
            f"found shape {list(checkpoint.shape(left_over[0]))}{more}"
        )


def _spare_head(config: ModelConfig, present: set[str]) -> str | None:
    """The head's tensor where it is tied and needs none."""
    names = naming(config.model_type).bare["head"]
    return next((name for name in names if config.tied_head and name in present), None)
