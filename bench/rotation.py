"""Which options, draft lengths and batch sizes a method is held against plain decoding with: every two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np

from ..runtime.errors import RequestError
from ..runtime.methods import registry

BATCHES = ("1", "4", "16")
_COMMON = {"num_draft_tokens": tuple(map(str, range(1, 9))), "batch": BATCHES}
_THRESHOLD = {"threshold": ("0.0", "0.5", "0.8")}
_WEIGHTS = {"draft_weights": ("own", "int8")}
# A method's options and the values they take beside the common ones, by which alone a method rotates that is not here.
# `skip` and `exit` are drawn or scaled to the model's depth.
_FACTORS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "swift": _THRESHOLD | _WEIGHTS | {"skip": ("1/4", "1/6", "1/10"), "tree": ("false", "true")},
    "swift search": _THRESHOLD
    | {"tree": ("false", "true"), "adaptive": ("false", "true"), "bayes_interval": ("0", "3")},
    "lookup": {
        "max_ngram": ("1", "2", "3", "4"),
        "draft": ("choose=newest", "choose=likeliest,remember=1000", "choose=likeliest,tree=true"),
    },
    "layerskip": _THRESHOLD | {"exit": ("1/4", "1/2", "1/1"), "reuse": ("true", "false")},
    "kangaroo": {"threshold": ("0.0", "0.2", "0.6"), "exit": ("1/4", "1/2", "1/1")},
    "del": {"reuse": ("true", "false"), "search_budget": ("0.1", "1.0")},
    "clasp": _THRESHOLD | _WEIGHTS | {"keep_outer": ("false", "true")},
    "conflayers": _THRESHOLD | _WEIGHTS | {"tree": ("false", "true"), "spread": ("0.25", "1.0")},
    "knapspec": _THRESHOLD | {"window_rounds": ("2", "5")},
    "quantized": {"threshold": ("0.0", "0.3"), "skip": ("1/6", "1/10")},
    "auto": _WEIGHTS | {"max_ngram": ("1", "4"), "remember": ("0", "1000"), "max_loss": ("0.015", "0.5")},
}
_ALWAYS = {
    "swift search": "search_budget=0.2,skip_ratio=0.15",
    "kangaroo": "adapter=untrained",
    "clasp": "interval=8,search_budget=1.0",
    "conflayers": "interval=8,search_budget=1.0,window=8",
    "knapspec": "interval=8,search_budget=1.0",
    "auto": "search_budget=0.05,skip_ratio=0.15",
}
_OWN = {name.partition(" ")[0] for name in _FACTORS}
NAMES = (*_FACTORS, *(name for name in registry.lossless() if name not in _OWN | {"autoregressive"}))
Pair = tuple[tuple[str, str], tuple[str, str]]
_CANDIDATES = 40


@dataclass(frozen=True)
class Cell:
    """One way to run a method: a level of each of its factors."""

    name: str
    levels: tuple[tuple[str, str], ...]

    @property
    def batch(self) -> int:
        return int(dict(self.levels)["batch"])

    def method(self, layers: int, seed: int) -> str:
        """The method's name and options for a model of so many layers; skip sets and searches depend on `seed`."""
        options = [_ALWAYS[self.name]] if self.name in _ALWAYS else []
        for factor, level in self.levels:
            if factor == "skip":
                options.append(_skip_set(layers, _share(level), seed))
            elif factor == "exit":
                options.append(f"exit_layer={max(1, min(layers - 1, int(layers * _share(level))))}")
            elif factor == "draft":
                options.append(level)
            elif factor != "batch":
                options.append(f"{factor}={level}")
        if self.name == "swift search":
            options.append(f"seed={seed}")
        return f"{self.name.partition(' ')[0]}:{','.join(options)}"


def named(methods: Sequence[str] | None) -> tuple[str, ...]:
    """Those of NAMES that run one of these methods, all of them for None; and those of `methods` that packages add.

    Raises:
        RequestError: one is not held against plain decoding, or has options, which rotate.
    """
    own = {name: name.partition(" ")[0] for name in NAMES}
    others = [method for method in dict.fromkeys(methods or ()) if method not in own.values()]
    for method in others:
        if method not in registry.outside() or not registry.find(method).lossless:
            known = ", ".join(dict.fromkeys(own.values()))
            raise RequestError(f"--method: expected a lossless method without options ({known}), got {method!r}")
    return (*(name for name in NAMES if not methods or own[name] in methods), *others)


def factors(name: str) -> dict[str, tuple[str, ...]]:
    """The factors of a method and their levels."""
    return {**_COMMON, **_FACTORS.get(name, {})}


@cache
def cells(name: str) -> tuple[Cell, ...]:
    """Cells in which any two factors meet at every pair of their levels; the first ones hold the most new pairs.

    Greedy: of a number of random cells with a missing pair in each, the one with most missing pairs comes next (Cohen
    et al., The AETG System, IEEE TSE 1997).
    """
    own, random = factors(name), np.random.default_rng(0)
    missing: list[Pair] = []
    for a, b in combinations(own, 2):
        missing += [((a, x), (b, y)) for x, y in product(own[a], own[b])]
    chosen: list[Cell] = []
    while missing:
        drawn: list[Cell] = []
        for _ in range(_CANDIDATES):
            levels = {factor: str(random.choice(values)) for factor, values in own.items()}
            levels |= dict(missing[int(random.integers(len(missing)))])
            drawn.append(Cell(name, tuple(levels.items())))
        best = max(drawn, key=lambda cell: len(pairs(cell) & set(missing)))
        chosen.append(best)
        missing = [pair for pair in missing if pair not in pairs(best)]
    return tuple(chosen)


def pairs(cell: Cell) -> set[Pair]:
    """The pairs of levels that meet in a cell."""
    return set(combinations(cell.levels, 2))


def _share(level: str) -> float:
    part, whole = level.split("/")
    return int(part) / int(whole)


def _skip_set(layers: int, share: float, seed: int) -> str:
    """So many of the sub-layers of layers 1 to L - 2, drawn."""
    inner = 2 * (layers - 2)
    chosen = np.random.default_rng(seed).choice(inner, max(1, int(inner * share)), replace=False)
    attention = "+".join(str(i // 2 + 1) for i in sorted(chosen.tolist()) if i % 2 == 0)
    mlp = "+".join(str(i // 2 + 1) for i in sorted(chosen.tolist()) if i % 2)
    return f"skip_attention={attention},skip_mlp={mlp}"
