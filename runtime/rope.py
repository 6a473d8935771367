"""Rotary position embedding: the frequencies of each scaling, and tables of rotations that grow on demand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.elementwise import steady
from ..kernels.values import Rope
from ..loaders.config import ModelConfig, RopeScaling


def inverse_frequencies(theta: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """Radians per position, float32 [head_dim / 2]; for the scaling dynamic those up to `original_max_position`."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, theta, scaling)
    return frequencies


def dynamic_frequencies(theta: float, head_dim: int, scaling: RopeScaling, length: Tensor) -> Tensor:
    """Radians per position for texts of `length` [N] tokens, float32 [N, head_dim / 2] (NTK-aware, by length).

    The base grows once a text is longer than `original_max_position`.
    """
    stretch = (scaling.factor * length.double() / scaling.original_max_position - (scaling.factor - 1)).clamp(min=1)
    logarithm = math.log(theta) + steady(torch.log, stretch) * (head_dim / (head_dim - 2))
    share = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    return steady(torch.exp, -logarithm[:, None] * share).float()


class RotaryTable:
    """Rotations of every position seen so far; a position's row never changes when the table grows.

    With the scaling dynamic, a generated token turns as the last one of a text that ends with it, and a prompt's tokens
    as those of a text of the prompt's length, whatever comes later: the frequencies of a row depend on nothing else.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config = config
        self._scaling = config.rope_scaling
        self._frequencies = inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
        self._device = device
        empty = torch.empty(0, 1, config.head_dim, device=device)
        self._prompt = Rope(empty, empty)
        # That of generated tokens last. A captured graph goes on reading the table it was captured with.
        self._tables = [self._prompt]

    def rows(self, position: Tensor, longest: int, prompt: int | None = None) -> Rope:
        """The rotation of each row; position int64 [R], none beyond `longest`.

        `prompt` is the length of the prompt the rows are of; None for generated tokens.
        """
        if prompt is not None and self.stretched(prompt):
            if len(self._prompt.cos) != prompt:
                self._prompt = self._table(prompt, torch.tensor([prompt], device="cpu"))
            return Rope(self._prompt.cos[position], self._prompt.sin[position])
        table = self.table(longest)
        return Rope(table.cos[position], table.sin[position])

    def stretched(self, prompt: int) -> bool:
        """Whether the tokens of a prompt of that length turn otherwise than those of shorter ones."""
        return self._scaling.kind == "dynamic" and prompt > self._scaling.original_max_position

    def table(self, longest: int) -> Rope:
        """The rotations of generated tokens at every position up to `longest` and beyond."""
        table = self._tables[-1]
        if longest >= len(table.cos):
            size = max(1024, 2 * longest)
            table = self._table(size, torch.arange(1, size + 1, device="cpu"))
            self._tables.append(table)
        return table

    def _table(self, size: int, length: Tensor) -> Rope:
        """Rotations of the first `size` positions in texts of `length` int64 [size or 1] tokens."""
        frequencies, config = self._frequencies, self._config
        if self._scaling.kind == "dynamic":
            long = dynamic_frequencies(config.rope_theta, config.head_dim, self._scaling, length)
            frequencies = torch.where((length > self._scaling.original_max_position)[:, None], long, frequencies)
        angle = torch.arange(size, dtype=torch.float32, device="cpu")[:, None] * frequencies
        cos, sin = (steady(function, angle) * self._scaling.attention_factor for function in (torch.cos, torch.sin))
        return Rope(
            torch.cat([cos, cos], dim=-1)[:, None].to(self._device),
            torch.cat([-sin, sin], dim=-1)[:, None].to(self._device),
        )


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071): frequencies of few turns divided by `factor`, those of many kept, a ramp between."""
    half = len(frequencies)

    def index(turns: float) -> float:
        """The frequency that makes this many turns over the original context, as a place among them."""
        return half * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
    divided = ramp.clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)
