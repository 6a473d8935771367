"""Rotary position embedding: the frequencies of each scaling, and a table of rotations that grows on demand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.elementwise import steady
from ..kernels.values import Rope
from ..loaders.config import ModelConfig, RopeScaling


def inverse_frequencies(theta: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """Radians per position, float32 [head_dim / 2], for the scalings default, linear and llama3."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


class RotaryTable:
    """Rotations of every position seen so far; a position's row never changes when the table grows."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
        self._device = device
        self._outgrown: list[Tensor] = []
        self._cos = self._sin = torch.empty(0, 1, config.head_dim, device=device)

    def rows(self, position: Tensor, longest: int) -> Rope:
        """The rotation of each row; position int64 [R], none beyond `longest`."""
        if longest >= self._cos.shape[0]:
            self._grow(max(1024, 2 * longest))
        return Rope(self._cos[position], self._sin[position])

    def _grow(self, size: int) -> None:
        # A captured graph goes on reading the table it was captured with.
        self._outgrown += [self._cos, self._sin]
        angle = torch.arange(size, dtype=torch.float32, device="cpu")[:, None] * self._frequencies
        cos, sin = steady(torch.cos, angle), steady(torch.sin, angle)
        self._cos = torch.cat([cos, cos], dim=-1)[:, None].to(self._device)
        self._sin = torch.cat([-sin, sin], dim=-1)[:, None].to(self._device)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies
