"""Where the checks of a GPU run and how large, and what one of them finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from ..loaders.config import ModelConfig
from ..loaders.synthetic import synthetic_config
from .op_cases import CASES

SEVERAL_ROWS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 32, 33, 64, 144)
# A length for every block that the products of a prompt may have.
PROMPTS = (20, 64, 65, 130, 300, 520, 1024)
DRY_FIELDS = {"num_hidden_layers": 5}
# What runs in captured rounds, by the shape of the model it is for.
CAPTURED = {
    "tiny": (
        "autoregressive",
        "swift:skip_attention=2+3,threshold=0.1",
        "swift:skip_attention=2+3,acceptance=rejection",
        "swift:skip_attention=2+3,threshold=0.1,tree=true",
        "swift:skip_attention=2+3,tree=true,acceptance=rejection",
        "swift:window=8,search_budget=1,max_opt_iter=2,restart_drop=0,num_draft_tokens=3,threshold=0",
        "layerskip:exit_layer=5",
        "kangaroo:adapter=untrained,exit_layer=5,threshold=0.1",
        "kangaroo:adapter=untrained,exit_layer=5,acceptance=rejection",
        "lookup",
        "lookup:choose=likeliest,acceptance=rejection",
        "lookup:choose=likeliest,tree=true,num_draft_tokens=12",
        "lookup:choose=likeliest,tree=true,remember=200,acceptance=rejection",
        "auto:max_loss=1,search_budget=0",
        "unified:speedup=2",
        "skipdecode:length=12",
        "calm:threshold=0.9,least=1",
        "calm:measure=softmax,threshold=0.05,decay=4,length=12",
        "adaskip:n=5,online=4",
        "clasp:interval=9,search_budget=1,threshold=0.1",
        "conflayers:interval=6,search_budget=1,window=8,threshold=0.1",
        "conflayers:interval=6,search_budget=1,window=8,max_opt_iter=2,threshold=0.1,tree=true",
        "knapspec:interval=9,search_budget=1,window_rounds=2,threshold=0.1",
        "del",
        "quantized",
        "swift:draft_weights=int8,skip_attention=2+3,threshold=0.1,tree=true,draft_vocab=128",
    ),
    "tiny-dmtd": ("dmtd", "dmtd:phase=absolute", "dmtd:history=shadow"),
    "tiny-mindskip": ("mindskip",),
    "routed-tiny": ("flexidepth", "flexidepth:kv=none"),
}
# Processes that check the ops of one shape and dtype.
SHARES = 4


@dataclass(frozen=True)
class Finding:
    """One check: what was compared, whether it held (None: it was not run), and the figure it rests on."""

    part: str
    name: str
    passed: bool | None
    detail: str
    count: int | None = None


@dataclass(frozen=True)
class Setting:
    """Where the check runs and how large; single kernels are compared at the shapes of `large` models too."""

    device: torch.device
    shapes: tuple[str, ...]
    large: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    long_run: int
    dry: bool
    captured: tuple[tuple[str, str], ...] = tuple((shape, name) for shape, names in CAPTURED.items() for name in names)
    cases: tuple[str, ...] = tuple(CASES)

    def models(self) -> list[tuple[str, torch.dtype]]:
        """The models whole passes are made with: the smallest shape in every dtype, the others in the first."""
        return [(self.shapes[0], dtype) for dtype in self.dtypes] + [(s, self.dtypes[0]) for s in self.shapes[1:]]

    def split(self, part: str) -> list[Setting]:
        """Settings that together make up this one, for a part that may run in several processes."""
        if part == "graphs":
            return [replace(self, captured=(one,)) for one in self.captured]
        if part in ("settled", "widths"):
            return [replace(self, shapes=(shape,), large=()) for shape in self.shapes + self.large]
        if part not in ("ops", "rows", "prompts", "exact"):
            return [self]
        models = list(product(self.shapes, self.dtypes)) if part == "ops" else self.models()
        settings: list[Setting] = [replace(self, shapes=(shape,), dtypes=(dtype,)) for shape, dtype in models]
        if part != "ops":
            return settings
        # Most of their time is compilation.
        return [replace(one, cases=self.cases[i::SHARES]) for one in settings for i in range(SHARES)]

    def config(self, shape: str) -> ModelConfig:
        """The configuration of a named shape, of which a dry run has only a few layers."""
        return ModelConfig.parse(
            synthetic_config(shape) | (DRY_FIELDS if self.dry and shape in self.shapes else {}), shape
        )

    def named(self, shapes: Sequence[str]) -> dict[str, str]:
        """The shape to run for each of these; a dry run has a tiny one for the first of them."""
        return {shapes[0]: self.shapes[0]} if self.dry else {shape: shape for shape in shapes}


GPU = Setting(
    torch.device("cuda"),
    ("135m", "1b"),
    ("8b",),
    (torch.bfloat16, torch.float16),
    SEVERAL_ROWS,
    PROMPTS,
    2100,
    dry=False,
)
DRY = Setting(torch.device("cpu"), ("tiny-llama",), (), (torch.float32,), (1, 2, 9), (9, 70), 21, dry=True)
