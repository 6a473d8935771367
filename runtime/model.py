"""One forward pass for every method."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.attention_index import Index
from ..kernels.ops import Joined, Ops
from ..kernels.values import Heads, Layer, Matrix, Norm, Prediction, Rope, Route, Slots, Stack
from ..loaders.config import ModelConfig
from ..loaders.weights import Weights
from .cache import KVCache
from .laid import Gate, Pass
from .layers import (
    Vocabulary,
    alibi_slopes,
    matrices,
    no_matrix,
    prepare_attention_routers,
    prepare_fill,
    prepare_layer,
    prepare_projections,
    prepare_vocabulary,
)
from .plan import LayerPlan
from .ranges import Mark, unmarked
from .rope import RotaryTable
from .routes import Routed, Routes, compacted, routed_layers
from .rows import Chains, Rows
from .skip_sets import fingerprint

Streams = list[Tensor]


class Model:
    """A decoder-only transformer: weights prepared for one op table, and the pass over them."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, mark: Mark = unmarked) -> None:
        self.config, self.ops, self.mark = config, ops, mark
        self.full = LayerPlan.full(config.num_layers)
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self.fingerprint = fingerprint(weights)
        self._embedding = weights.embedding
        self._embedding_norm = (
            Norm(weights.embedding_norm, weights.embedding_norm_bias, config.norm_eps)
            if weights.embedding_norm is not None
            else None
        )
        qkv = prepare_projections(weights, config, ops)
        self.layers = [prepare_layer(weights, qkv[i], i, config, ops) for i in range(config.num_layers)]
        self.routed = routed_layers(weights, config, ops)
        self._fill = prepare_fill(weights, config, qkv) if isinstance(qkv, Stack) else None
        self.attention_routers = prepare_attention_routers(weights, config)
        self.norm = Norm(weights.norm, weights.norm_bias, config.norm_eps)
        self.head = ops.prepare(weights.head)
        self._matrices = [*matrices(self.layers, self.routed), self.head]
        self._unknown = no_matrix(weights.embedding)
        self._heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        self._rotary = RotaryTable(config, self.device) if any(config.rope_layers) else None
        self._slopes = alibi_slopes(config.num_heads).to(self.device) if config.alibi else None
        self._vocabularies: dict[int, Vocabulary] = {}
        self._tiles: dict[int, tuple[int, ...]] = {}
        self._activation = "silu_gate" if config.gated else "gelu_tanh"
        self._windows = [config.window if windowed else None for windowed in config.window_layers]
        self.joined = self._join(self.layers)

    def replaced(self, layers: list[Layer], head: Matrix) -> Model:
        """The same model with other matrices; it shares the rest."""
        other = copy(self)
        other.layers, other.head, other._vocabularies, other.joined = layers, head, {}, self._join(layers)
        return other

    def _join(self, layers: list[Layer]) -> Joined | None:
        """The sub-layers of a pass without masks in one call, where the table has that."""
        rest = self._heads, self._activation, self.config.rope_layers, self._windows, self._slopes
        return None if self.routed else self.ops.join(layers, *rest)

    def new_cache(self, pages: int) -> KVCache:
        """An empty cache of `pages` pages for this model."""
        shape = self.config.num_layers, self.config.num_kv_heads, self.config.head_dim
        return KVCache(*shape, pages=pages, page_size=self.ops.page_size, dtype=self.dtype, device=self.device)

    def tile(self, rows: int) -> int | None:
        """The tile of a decode pass of `rows` rows: the smallest that holds them, or the largest there is."""
        return next((tile for tile in self.tiles if tile >= rows), self.tiles[-1]) if self.tiles else None

    @property
    def tiles(self) -> tuple[int, ...]:
        """The tiles of a decode pass here, ascending: those that leave every row its bits; one if none is padded."""
        ops, threads = self.ops, torch.get_num_threads()
        if threads not in self._tiles:
            alike = partial(ops.rounds_alike, self._matrices, self._heads, self.dtype)
            others = [tile for tile in ops.other_tiles if ops.pads(self.dtype) and alike(tile)]
            self._tiles[threads] = tuple(tile for tile in ops.tiles if tile == ops.decode_tile or tile in others)
        return self._tiles[threads]

    @property
    def backend(self) -> str:
        """The op table in use and the path its products take, for people."""
        return self.ops.description(self.dtype, self.tiles)

    def forward(
        self,
        rows: Rows | Chains,
        cache: KVCache,
        plan: LayerPlan,
        hidden: Tensor | None = None,
        streams: Streams | None = None,
        routes: Routes | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The residual stream [R, H] of `rows` after the sub-layers of `plan`.

        It enters the plan's span as `hidden` [R, H], or as the rows' embeddings without one. Keys and values of every
        attention block that runs, or that the plan fills, are written to the rows' slots; a row attends to the slots of
        its own sequence at or before its position, which must have been written in that layer. `streams` receives the
        residual stream [R, H] before every sub-layer that runs and after the last, `routes` what every routed layer
        decided for each row. With `kept` int64 [routed layers, S], the keys each sequence has in each routed layer so
        far, tokens that skip a layer leave none there; it is advanced by those that run.
        """
        laid = self.lay(rows, cache, kept)
        x = self.embed(laid) if hidden is None else functional.pad(hidden, (0, 0, 0, len(laid.rows) - len(rows)))
        passing: Streams | None = None if streams is None else []
        self.run(laid, cache, plan, x, passing)
        if streams is not None and passing is not None:
            streams += [stream[: len(rows)] for stream in passing]
        if routes is not None:
            routes |= {layer: Route(*(part[: len(rows)] for part in route)) for layer, route in laid.routes.items()}
        return x[: len(rows)]

    def run(self, laid: Pass, cache: KVCache, plan: LayerPlan, x: Tensor, streams: Streams | None = None) -> None:
        """The sub-layers of `plan`, added in place to the residual stream x [R, H], and what it fills.

        `streams` as in `forward`; R counts padding.
        """
        fills, end = plan.fills, plan.span[1]
        if self.joined is not None and laid.rows.active is None and not fills:
            self.joined(plan.sublayers, x, cache.keys, cache.values, laid.slots, laid.index, laid.rope, streams)
            return
        for sublayer, following in zip_longest((*plan.sublayers, end), plan.sublayers[1:]):
            if sublayer in fills:
                self.fill(laid, cache, fills[sublayer], x)
            if streams is not None:
                streams.append(x.clone())
            if sublayer < end:
                known = None if laid.masked else following
                self.step(laid, cache, sublayer, x, known, settled=sublayer != plan.sublayers[0])

    def lay(self, rows: Rows | Chains, cache: KVCache, kept: Tensor | None = None) -> Pass:
        """What every sub-layer of a pass over `rows` shares."""
        if rows.tile == self.ops.decode_tile:
            rows = replace(rows, tile=self.tile(len(rows)))
        if isinstance(rows, Chains):
            return self._enter(rows, cache, kept)
        rows = rows.padded(self.ops.filled(len(rows), rows.tile, self.dtype))
        # Who shares a sequence is not known here: attention takes no wider tile, to be padded for each of them.
        tile = min(rows.tile, self.ops.decode_tile or rows.tile) if rows.tile in self.tiles else rows.tile
        index = self._index(rows, cache, tile)
        slots, real = Slots(*rows.slots(cache.page_size)), rows.sequence >= 0
        return Pass(rows, slots, index, self.rotations(rows, cache), real, {}, kept, masked=rows.active is not None)

    def _enter(self, chains: Chains, cache: KVCache, kept: Tensor | None) -> Pass:
        longest, lineage = chains.block_table.shape[1] * cache.page_size - 1, chains.lineage
        entry = self.ops.enter(
            chains.token,
            chains.first,
            chains.count,
            chains.alive,
            chains.block_table,
            self._embedding,
            self._rotary.table(longest) if self._rotary else None,
            rows=self.ops.filled(len(chains), chains.tile, self.dtype),
            ahead=chains.ahead,
            page_size=cache.page_size,
            kv_heads=self._heads.key,
            draft=chains.draft,
            depth=None if lineage is None else lineage.depth,
            path=None if lineage is None else lineage.path,
        )
        active = chains.active(entry.real)
        active = None if active is None else active.expand(2 * self.config.num_layers, -1)
        tree, width = entry.tree, chains.width
        laid = Rows(
            entry.token, entry.position, entry.sequence, chains.block_table, chains.tile, tree=tree, active=active
        )
        tile = self.tile(width)
        if tree is not None and tile is not None:
            # Every leaf is a pass of a whole tile over its page, and of a tree's rows few may be real.
            tile = min(tile, self.ops.decode_tile or tile)
        index = self._index(laid, cache, tile, width, entry.arrivals)
        masked = chains.mask is not None
        return Pass(laid, entry.slots, index, entry.rope, entry.real, {}, kept, entry.x, masked, entry.arrivals)

    def embed(self, laid: Pass) -> Tensor:
        """The residual stream [R, H] a pass starts with; R counts padding."""
        x = laid.embedded if laid.embedded is not None else functional.embedding(laid.rows.token, self._embedding)
        return x if self._embedding_norm is None else self.ops.normalise(x, self._embedding_norm)

    def step(
        self,
        laid: Pass,
        cache: KVCache,
        sublayer: int,
        x: Tensor,
        following: int | None = None,
        *,
        settled: bool = False,
    ) -> None:
        """One sub-layer, added in place to the residual stream x [R, H]; R counts padding.

        `following`: the sub-layer that is to come after it, of whose weights a GPU may be told already. `settled`: a
        kernel has been launched since the pass was laid.
        """
        active = None if laid.rows.active is None else laid.rows.active[sublayer]
        gate = Gate(active, settled and sublayer // 2 not in self.routed)
        if sublayer % 2 == 0:
            self._attention(sublayer // 2, x, cache, laid, gate, self._first_weight(following))
        else:
            self._mlp(sublayer // 2, x, laid, gate)

    def fill(self, laid: Pass, cache: KVCache, layers: range, x: Tensor, rows: Tensor | None = None) -> None:
        """Keys and values of consecutive layers whose attention is skipped, as had they run on the stream x [R, H].

        `rows` bool [layers, R] are those that skip each of them; all without it.
        """
        assert self._fill is not None, "routed layers fill their own keys and values"
        first, end = layers.start, layers.stop
        part = self._fill.part(first, end)
        self.ops.fill_kv(
            x,
            self.ops.row_map(laid.real.expand(len(layers), -1) if rows is None else rows),
            part.norm,
            part.qkv,
            part.qkv_bias,
            part.k_norm,
            laid.rope,
            part.rotated,
            cache.keys[first:end],
            cache.values[first:end],
            laid.slots,
            heads=self.config.num_heads,
            tile=laid.rows.tile,
        )

    def rotations(self, rows: Rows, cache: KVCache) -> Rope | None:
        """The rotation of each row; None for a model without rotary embedding."""
        position = rows.position if rows.angle is None else rows.angle
        return self._rotary.rows(position, rows.longest(cache.page_size), rows.prompt) if self._rotary else None

    def stretched(self, prompt: int) -> bool:
        """Whether a prompt of that length has rotations of its own, which a pass has for one prompt only."""
        return self._rotary is not None and self._rotary.stretched(prompt)

    def normalised(self, x: Tensor) -> Tensor:
        """The residual stream [R, H] after the final norm."""
        return self.ops.normalise(x, self.norm)

    def logits(self, x: Tensor, vocabulary: int = 0, active: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        """Final norm, or another `norm`, and LM head: [R, H] → [R, V], anything for rows not `active` bool [R].

        Outside the first `vocabulary` tokens, 0 being all of them, logits are −∞.
        """
        tile, norm = self.tile(len(x)), norm or self.norm
        if not self.reduces(vocabulary):
            return self.ops.logits(x, norm, self.head, tile=tile, active=active)
        head, ids = self.vocabulary(vocabulary)
        scores = x.new_full((x.shape[0], self.config.vocab_size), -torch.inf)
        return scores.index_copy_(1, ids, self.ops.logits(x, norm, head, tile=tile, active=active))

    def reduces(self, vocabulary: int) -> bool:
        """Whether a vocabulary of this size leaves anything out."""
        return 0 < vocabulary < self.config.vocab_size

    def vocabulary(self, size: int) -> Vocabulary:
        """The `size` tokens of the lowest ids, the frequent ones of most tokenizers (FR-Spec, arXiv 2502.14856), and
        those that end a text.
        """
        if size not in self._vocabularies:
            tokens = {*range(size), *self.config.eos_token_ids}
            self._vocabularies.setdefault(size, prepare_vocabulary(self.ops, self.head, tokens))
        return self._vocabularies[size]

    def predict(
        self,
        x: Tensor,
        top_k: int | None = None,
        tile: int | None = None,
        active: Tensor | None = None,
        vocabulary: int = 0,
        norm: Norm | None = None,
    ) -> Prediction:
        """The most likely token, or the `top_k` most likely, of each row of the residual stream [R, H].

        `tile` is that of decoding without one; another may round differently, which is for scoring only. Rows that are
        not `active` bool [R] get anything. `vocabulary` and `norm` as in `logits`.
        """
        head, ids = self.vocabulary(vocabulary) if self.reduces(vocabulary) else (self.head, None)
        tile = tile or self.tile(len(x))
        return self.ops.head(x, norm or self.norm, head, tile=tile, top_k=top_k, ids=ids, active=active)

    def _index(
        self, rows: Rows, cache: KVCache, tile: int | None, width: int | None = None, arrivals: Tensor | None = None
    ) -> Index:
        return self.ops.index(
            rows.sequence,
            rows.position,
            rows.block_table,
            page_size=cache.page_size,
            tile=tile,
            tree=rows.tree,
            width=width,
            arrivals=arrivals,
        )

    def _route(self, number: int, routed: Routed, x: Tensor, laid: Pass, active: Tensor | None) -> Route:
        """What a routed layer decides for rows that are about to enter it."""
        if number not in laid.routes:
            laid.routes[number] = self.ops.route(
                x,
                self.layers[number].attention_norm,
                routed.router,
                tile=laid.rows.tile,
                threshold=routed.threshold,
                active=laid.real if active is None else laid.real & active,
                arrivals=laid.arrivals,
            )
        return laid.routes[number]

    def _first_weight(self, sublayer: int | None) -> Matrix:
        """The weight a sub-layer begins with; one of no rows where that is not known before it runs."""
        if sublayer is None or sublayer // 2 in self.routed:
            return self._unknown
        first = self.layers[sublayer // 2].qkv if sublayer % 2 == 0 else self.layers[sublayer // 2].up
        return first if isinstance(first, Matrix) else self._unknown

    def _attention(self, number: int, x: Tensor, cache: KVCache, laid: Pass, gate: Gate, ahead: Matrix) -> None:
        layer, routed, config = self.layers[number], self.routed.get(number), self.config
        tile, (keys, values) = laid.rows.tile, cache.by_layer[number]
        slots, index, active, write = laid.slots, laid.index, gate.active, gate.active
        if routed is not None:
            active = self._route(number, routed, x, laid, active).run
            if laid.kept is not None:
                write, position = active, compacted(laid.rows, active, laid.kept[routed.place], index.width)
                slots = Slots(*replace(laid.rows, slot=position).slots(cache.page_size))
                rows = replace(laid.rows, position=position)
                index = self._index(rows, cache, index.tile, index.width, laid.arrivals)
        q = self.ops.qkv_rope_append(
            x,
            layer.attention_norm,
            layer.qkv,
            layer.qkv_bias,
            layer.q_norm,
            layer.k_norm,
            laid.rope if config.rope_layers[number] else None,
            keys,
            values,
            slots,
            heads=config.num_heads,
            tile=tile,
            active=active,
            write=write,
            settled=gate.settled,
        )
        mixed = self.ops.attend(
            q,
            keys,
            values,
            index,
            scale=config.head_dim**-0.5,
            window=self._windows[number],
            slopes=self._slopes,
            active=active,
            ahead=layer.output,
        )
        bias, output = layer.output_bias, layer.output
        self.ops.linear(mixed, output, tile=tile, bias=bias, residual=x, active=active, settled=True, ahead=ahead)

    def _mlp(self, number: int, x: Tensor, laid: Pass, gate: Gate) -> None:
        layer, routed, scale = self.layers[number], self.routed.get(number), None
        ops, tile, norm, activation = self.ops, laid.rows.tile, layer.mlp_norm, self._activation
        active, bias = gate.active, layer.down_bias
        if routed is not None:
            decided = number in laid.routes
            route = self._route(number, routed, x, laid, active)
            scale, rest = (route.weight, route.rest) if routed.weighted else (None, None)
            active, skip = route.run, route.skip
            first = {"norm": norm, "activation": activation, "settled": decided}
            inner = ops.linear(x, routed.adapter_up, tile=tile, active=skip, **first)
            ops.linear(inner, routed.adapter_down, tile=tile, residual=x, scale=rest, active=skip, settled=True)
        settled = gate.settled or routed is not None
        up = {"norm": norm, "bias": layer.up_bias, "activation": activation, "settled": settled}
        inner = ops.linear(x, layer.up, tile=tile, active=active, **up)
        ops.linear(inner, layer.down, tile=tile, bias=bias, residual=x, scale=scale, active=active, settled=True)
