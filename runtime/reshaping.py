"""Penalties, bias and minimum length of the sequences of a round, as tensors."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..kernels.values import Reshaping
from .sequence import Sequence


def neutral(sequences: int, vocabulary: int, device: torch.device) -> Reshaping:
    """What changes no logits, for S `sequences`."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Reshaping(
        torch.ones(sequences, device=device),
        zeros(sequences, dtype=torch.float32),
        zeros(sequences, dtype=torch.float32),
        zeros(sequences, vocabulary, dtype=torch.float32),
        zeros(sequences, vocabulary, dtype=torch.bool),
        zeros(sequences, dtype=torch.int64),
        zeros(sequences, vocabulary, dtype=torch.bool),
        zeros(sequences, vocabulary, dtype=torch.int32),
    )


def reshaping(sequences: list[Sequence], vocabulary: int, device: torch.device) -> Reshaping:
    """What the parameters of these sequences ask for, and their tokens as they stand."""
    params = [s.params for s in sequences]
    made = neutral(len(sequences), vocabulary, device)

    def each(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def fill(target: Tensor, ids: list[Collection[int]], values: Tensor, *, add: bool = False) -> None:
        row = [s for s, own in enumerate(ids) for _ in own]
        column = [token for own in ids for token in own]
        target.index_put_(tuple(torch.tensor([row, column], dtype=torch.int64, device=device)), values, accumulate=add)

    one, true = torch.ones((), dtype=torch.int32, device=device), torch.ones((), dtype=torch.bool, device=device)
    fill(made.bias, [p.logit_bias for p in params], each([bias for p in params for bias in p.logit_bias.values()]))
    fill(made.forbidden, [s.forbidden for s in sequences], true)
    fill(made.prompt, [set(s.prompt) for s in sequences], true)
    fill(made.times, [s.tokens[len(s.prompt) :] for s in sequences], one, add=True)
    return made._replace(
        repetition=each([p.repetition_penalty for p in params]),
        presence=each([p.presence_penalty for p in params]),
        frequency=each([p.frequency_penalty for p in params]),
        least=torch.tensor(
            [len(s.prompt) + p.min_tokens for s, p in zip(sequences, params, strict=True)], device=device
        ),
    )
