"""Kangaroo's adapter (arXiv 2404.18911): attention of a draft's own between an early exit and the LM head."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor

from ..kernels.values import Matrix, Norm
from ..loaders.adapter import AdapterWeights, adapter_config, load_adapter, untrained_adapter, untrained_config
from ..loaders.config import ModelConfig
from .cache import KVCache
from .laid import Pass
from .layers import no_matrix
from .model import Model
from .plan import LayerPlan
from .rope import RotaryTable
from .rows import Chains, Rows

# What names no folder but an adapter drawn at random.
UNTRAINED = "untrained"
_LOADED: WeakKeyDictionary[Model, WeakValueDictionary[str, Adapter]] = WeakKeyDictionary()


class DraftPass(NamedTuple):
    """The residual streams [R, H] after a draft's layers, those its tokens are chosen from, and by which final norm."""

    stream: Tensor
    hidden: Tensor
    norm: Norm | None


class _Attention(NamedTuple):
    norm: Norm
    qkv: Matrix
    output: Matrix


class Adapter:
    """Layers of attention, a residual each, and a final norm of their own; their keys and values lie in an annex.

    Every row whose stream after the exit is known leaves keys and values there, a token of a prompt or the newest of a
    draft too, so that the next draft finds those of all tokens before it.
    """

    def __init__(self, config: ModelConfig, weights: AdapterWeights, model: Model) -> None:
        ops, eps = model.ops, config.norm_eps
        self.norm = model.norm if weights.norm is None else Norm(weights.norm.to(model.device), None, eps)
        tensors = (t.to(model.device) for t in (weights.attention_norm, weights.qkv, weights.output))
        self._layers = [
            _Attention(Norm(norm, None, eps), ops.prepare(qkv), ops.prepare(output))
            for norm, qkv, output in zip(*tensors, strict=True)
        ]
        own, theirs = ((c.rope_theta, c.rope_scaling, {*c.rope_layers}) for c in (config, model.config))
        # None where the rows of a pass are rotated alike already.
        self._rotary = None if own == theirs else RotaryTable(config, model.device)
        self._unknown = no_matrix(weights.qkv.to(model.device))

    @staticmethod
    def of(model: Model, name: str) -> Adapter:
        """The adapter in a folder, or an `UNTRAINED` one; that which is in use already.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded, or not for this model.
        """
        loaded = _LOADED.setdefault(model, WeakValueDictionary())
        key = name if name == UNTRAINED else str(Path(name).resolve())
        adapter = loaded.get(key)
        if adapter is None:
            if name == UNTRAINED:
                config = untrained_config(model.config)
                weights = untrained_adapter(config, model.dtype)
            else:
                config = adapter_config(Path(name), model.config)
                weights = load_adapter(Path(name), config, model.dtype)
            adapter = loaded[key] = Adapter(config, weights, model)
        return adapter

    def exit(self, model: Model, cache: KVCache, rows: Rows | Chains, plan: LayerPlan) -> Tensor:
        """The residual streams [R, H] after `plan`; the adapter has the rows' keys and values then."""
        laid, x = self._enter(model, cache, rows, plan)
        stream = x.clone()
        self._run(model, cache, laid, x, cached=True)
        return stream[: len(rows)]

    def draft(self, model: Model, cache: KVCache, rows: Rows | Chains, plan: LayerPlan) -> DraftPass:
        """The pass of a draft: `plan`, then the adapter."""
        laid, x = self._enter(model, cache, rows, plan)
        stream = x.clone()
        self._run(model, cache, laid, x, cached=False)
        return DraftPass(stream[: len(rows)], x[: len(rows)], self.norm)

    def _enter(self, model: Model, cache: KVCache, rows: Rows | Chains, plan: LayerPlan) -> tuple[Pass, Tensor]:
        laid = model.lay(rows, cache)
        x = model.embed(laid)
        model.run(laid, cache, plan, x)
        return laid, x

    def _run(self, model: Model, cache: KVCache, laid: Pass, x: Tensor, *, cached: bool) -> None:
        """The layers, added in place to x [R, H]; of the last one only keys and values if they are to be `cached`."""
        ops, tile, heads, scale = model.ops, laid.rows.tile, model.config.num_heads, model.config.head_dim**-0.5
        active = None if laid.rows.active is None else laid.rows.active[0]
        rope = laid.rope
        if self._rotary is not None:
            longest = laid.rows.longest(cache.page_size)
            rope = self._rotary.rows(laid.rows.position, longest, laid.rows.prompt)
        for layer, (keys, values) in zip(self._layers, cache.annex(self, len(self._layers)), strict=True):
            q = ops.qkv_rope_append(
                x,
                layer.norm,
                layer.qkv,
                None,
                None,
                None,
                rope,
                keys,
                values,
                laid.slots,
                heads=heads,
                tile=tile,
                active=active,
                write=active,
                settled=True,
            )
            if cached and layer is self._layers[-1]:
                return
            ahead = layer.output
            mixed = ops.attend(
                q, keys, values, laid.index, scale=scale, window=None, slopes=None, active=active, ahead=ahead
            )
            ops.linear(mixed, ahead, tile=tile, residual=x, active=active, settled=True, ahead=self._unknown)


def draft_pass(
    model: Model, cache: KVCache, rows: Rows | Chains, plan: LayerPlan, adapter: Adapter | None
) -> DraftPass:
    """The pass of a draft by `plan` and, where there is one, an `adapter`."""
    if adapter is not None:
        return adapter.draft(model, cache, rows, plan)
    hidden = model.forward(rows, cache, plan)
    return DraftPass(hidden, hidden, None)
