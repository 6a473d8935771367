"""The engine: a loaded model that generates."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import cast, overload
from weakref import WeakValueDictionary

import torch

from ..kernels.compilation import Watch
from ..loaders.config import ModelConfig
from ..loaders.locate import locate
from ..loaders.tokenizer import Tokenizer
from ..loaders.weights import Weights, load_weights
from . import choices
from .admission import Admission
from .cache import KVCache, expect_room, pages_of
from .calibration import Encode
from .company import Alike, Company
from .errors import AbortedError, RequestError
from .forced import Forced, Scored, expect_pairs
from .graphs import Graphs
from .memory import cache_size, loading
from .methods import registry
from .methods.autoregressive import Autoregressive
from .methods.base import Method
from .metrics import Ledger, Metrics
from .model import Model
from .prefixes import Prefixes
from .prompts import Check, Prompt, Prompts, TokenIds, check_params, is_many, to_ids
from .quantised import quantised
from .ranges import marks
from .request import SEQUENCES, Output, SamplingParams
from .roster import Roster
from .run import Run, Shared
from .sequence import Sequence
from .stepwise import Stepwise
from .stream import AsyncStream, Stream
from .text import TextStream
from .turns import Turns
from .warm_up import Rehearsal, WarmUp, refuse

CLOSED = "engine: it is closed"
Progress = Callable[[str, int, int], None]


class Engine:
    """A model in memory and everything needed to generate with it.

    Threads and event loops may share an engine: their requests take turns, a round or a part of a prompt at a time,
    and share rounds where they are alike. Those that need pages which others hold wait for them in the order they
    came, as long as anything moves; 30 seconds after nothing has, it is a BusyError. A forked process may use a
    copy of an engine that is on the CPU, had no request under way, and whose process had not computed with threads
    of PyTorch's own. `model_path` is where the weights lie, `tokenizer` None where no tokenizer.json lies there,
    `dtype` the type computed in, `backend` the op table in use and the path its products take, `numerics` "exact"
    or "fast", `config` the model's shape, `cache_tokens` what requests can hold together, `max_sequences` how many run
    together, `cache_note` why the cache is smaller than the model's context, else None, `load_s` the seconds `load`
    took, 0 for an engine made without it, and `warmed_up` what the latest `warm_up` did.
    """

    load_s = 0.0
    warmed_up: WarmUp | None = None

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        tokenizer: Tokenizer | None = None,
        model_path: Path | None = None,
        method: str = "autoregressive",
        backend: str = "auto",
        numerics: str = "exact",
        cache_tokens: int | None = None,
        max_sequences: int = SEQUENCES,
        graphs: bool | None = None,
        ranges: str | None = None,
        strict: bool = False,
        prefix_caching: bool = False,
    ) -> None:
        """An engine over weights that are already in memory, on their device; `load` reads them from a folder.

        `graphs`: whether rounds run on the device alone where their method can, captured as CUDA graphs on a GPU; None
        does so on a GPU. `ranges` "nvtx" or "torch" shows a profiler the parts of every round; None asks the variable
        SKIPJACK_RANGES. `strict`: once warmed up, a kernel that would have to be compiled is a CompilationError.
        """
        self.tokenizer, self.model_path, self.dtype = tokenizer, model_path, weights.embedding.dtype
        table = choices.table_of(backend, weights.embedding.device, numerics)
        choices.check_switches(graphs, strict, prefix_caching)
        self.numerics, self.max_sequences = numerics, choices.check_max_sequences(max_sequences)
        self._default = registry.parse(method)
        own = self._default.build(config)
        config, weights = own.edit(config, weights, lambda c, w: Model(c, w, table), self._encode)
        self.config = config
        self._turn, self._process = Turns(weights.embedding.device), os.getpid()
        self._strict, self._watch = strict, Watch(enabled=table.name == "triton")
        model = Model(config, weights, table, marks(ranges))
        self.backend = model.backend
        if own.quantised:  # Before the cache takes what is left.
            quantised(model)
        self.cache_tokens, self.cache_note = cache_size(model, self.max_sequences, cache_tokens)
        cache = model.new_cache(pages_of(self.cache_tokens, table.page_size))
        cache.prefixes = Prefixes(cache.page_size) if prefix_caching else None
        on_device = model.device.type == "cuda" if graphs is None else graphs
        rounds = Graphs(model, cache, self._watch) if on_device else None
        roster = Roster(model, self._encode, self._watch, self._default)
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "skipjack-engine")
        # With fast numerics a token may depend on who is in its round.
        companies = None if numerics == "fast" else WeakValueDictionary[Alike, Company]()
        # What goes when the engine is closed.
        common = model, Admission(cache), self._turn, self._watch, rounds, roster, Ledger(cache), companies
        self._shared: Shared | None = Shared(*common, self.max_sequences)
        self._turn.rest()
        self._turn.take(partial(roster.add, self._default, own))

    @staticmethod
    def load(
        model: str | Path,
        *,
        method: str = "autoregressive",
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        numerics: str = "exact",
        cache_tokens: int | None = None,
        max_sequences: int = SEQUENCES,
        graphs: bool | None = None,
        ranges: str | None = None,
        strict: bool = False,
        prefix_caching: bool = False,
        progress: Progress | None = None,
        check: Check | None = None,
    ) -> Engine:
        """Load a model folder, "demo" for the packaged one, or `org/name` (`org/name@revision`) from the hub.

        `device` auto is the GPU where there is one; `backend` auto is "triton" on a GPU and "torch" on the CPU. `dtype`
        auto is the checkpoint's own. `numerics` "fast" lets sums follow the number of rows if that is faster; a token
        may then depend on drafts and neighbours. `cache_tokens` bounds the tokens all running requests hold together,
        by default a context, or `max_sequences` of at most 2048 tokens if that is more, as far as four fifths of the
        free memory go; `max_sequences`, 1 to 64, bounds how many run together. `prefix_caching`: what a prompt has in
        common with an earlier one is copied, not read again.
        `progress` is called with a label, what is done and what there is to do; `check` with the model's config and its
        tokenizer or None, before any weight is read: what it raises ends the loading, and so do more tokens than
        `cache_tokens` hold, where it returns how many a request will need.

        Raises:
            ConfigError, CheckpointError, TokenizerError: there is no such model, or this version does not run it.
            RequestError: an argument is not one of its choices.
            CapacityError: the weights, or the cache that was asked for, do not fit into the memory there is.
        """
        start, spec, place = perf_counter(), registry.parse(method), choices.place_of(device)
        choices.one_of("dtype", dtype, ("auto", *choices.DTYPES))
        told: Progress = progress or (lambda label, done, total: None)
        told("preparing kernels", 0, 1)
        table = choices.table_of(backend, place, numerics)
        told("preparing kernels", 1, 1)
        choices.check_cache_tokens(cache_tokens)
        choices.check_max_sequences(max_sequences)
        choices.check_switches(graphs, strict, prefix_caching)
        folder = locate(model, progress)
        config = ModelConfig.load(folder)
        spec.build(config)
        tokenizer = Tokenizer.load(folder, config)
        needed = None if check is None else check(config, tokenizer)
        if needed is not None and cache_tokens is not None:
            expect_room(needed, pages_of(cache_tokens, table.page_size), table.page_size)
        kind = choices.dtype_of(dtype, config)
        with loading(folder, config, kind, place):
            engine = Engine(
                config,
                load_weights(folder, config, kind, partial(told, "loading weights")).to(place),
                tokenizer=tokenizer,
                model_path=folder,
                method=method,
                backend=backend,
                numerics=numerics,
                cache_tokens=cache_tokens,
                max_sequences=max_sequences,
                graphs=graphs,
                ranges=ranges,
                strict=strict,
                prefix_caching=prefix_caching,
            )
        engine.load_s = perf_counter() - start
        return engine

    @overload  # Only an empty sequence is both; it is refused.
    def generate(self, prompt: Prompt, params: SamplingParams = ..., *, method: str | None = ...) -> Output: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def generate(self, prompt: Prompts, params: SamplingParams = ..., *, method: str | None = ...) -> list[Output]: ...

    def generate(
        self, prompt: Prompt | Prompts, params: SamplingParams | None = None, *, method: str | None = None
    ) -> Output | list[Output]:
        """Generate for one prompt (text, token ids or chat messages), or for a list of prompts, decoded together.

        `method` overrides the engine's own for this request.

        Raises:
            RequestError: the request cannot be served; nothing was generated.
            TokenizerError: chat messages are malformed, or the model's template refuses them or is missing.
            CapacityError: it needs more cache than there is, or, a BusyError, than others leave for long.
        """
        with self.stream(prompt, params, method=method) as stream:
            for _ in stream:
                pass
        return stream.outputs if is_many(prompt) else stream.outputs[0]

    def stream(
        self, prompt: Prompt | Prompts, params: SamplingParams | None = None, *, method: str | None = None
    ) -> Stream:
        """As `generate`, yielding what every round adds; `Stream.outputs` holds the results when it is exhausted.

        Any thread may close it. When the engine is closed, the next chunk is an AbortedError.
        """
        return self._asked(prompt, params, method).begun()

    def score(
        self, prompts: Prompts, continuations: Collection[TokenIds], *, method: str | None = None
    ) -> list[Scored]:
        """What a method makes of given continuations, token ids, one for every prompt: teacher forcing.

        The prompt is read and every token decoded as `generate` would, together with the other prompts; only the token
        that goes into the next pass is the given one. A lossless method other than plain decoding has nothing to score.

        Raises:
            RequestError, TokenizerError, CapacityError: as `generate`, or the method is one of those.
        """
        spec = self._default if method is None else registry.parse(method)
        expect_pairs(prompts, continuations)
        prompt_ids = [to_ids(prompt, self.tokenizer, self.config) for prompt in prompts]
        forced = Forced.all(prompt_ids, continuations, self.config)
        # The host replaces every token, so it steers the rounds, and nobody else's are among them.
        alone = replace(self._open(), graphs=None, companies=None)
        with self._stream(alone, [*forced], spec, 0).begun() as stream:
            if self._method(spec).lossless and spec.name != Autoregressive.name:
                raise RequestError(f"score: expected a lossy method or {Autoregressive.name}, got {spec.name}")
            for _ in stream:
                pass
        return [sequence.scored() for sequence in forced]

    @property
    def compilations(self) -> int:
        """Kernels compiled for the requests of this engine, since it was warmed up if it was."""
        return self._watch.count

    def metrics(self) -> Metrics:
        """What the engine has done and has under way, for any thread at any time; it waits for no turn.

        Raises:
            AbortedError: the engine is closed.
        """
        shared = self._open()
        return shared.ledger.metrics(shared.graphs, self.compilations)

    def warm_up(
        self, methods: str | Iterable[str] = (), *, sequences: int | None = None, context: int | None = None
    ) -> WarmUp:
        """Compile every kernel, and capture every round graph, that requests can reach: later ones wait for neither.

        That is requests of `methods`, by default the engine's own, and of plain decoding, of up to `sequences` that
        run together, by default `max_sequences`, with up to `context` tokens each, by default what the cache holds;
        greedy or sampled, with penalties and logprobs; graphs with either, or of a skip set not yet found, are captured
        when they are needed.

        Raises:
            RequestError: a method cannot run here, or there are never so many sequences or tokens.
            CapacityError: a method's search needs pages of the cache that requests hold.
        """
        if not isinstance(cast(object, methods), Iterable):
            raise RequestError(f"warm_up: methods: expected a method or several, got {methods!r}")
        shared = self._open()
        rehearsal = Rehearsal(
            shared.model, shared.admission.cache, shared.graphs, self.max_sequences, sequences, context
        )
        names = [methods] if isinstance(methods, str) else methods
        specs = [registry.parse(name) for name in names] or [self._default]
        if Autoregressive.name in registry.names(self.config.model_type) and not self._default.edits:
            specs.append(registry.parse(Autoregressive.name))
        return self._turn.take(partial(self._warm, rehearsal, dict.fromkeys(specs)))

    def _warm(self, rehearsal: Rehearsal, specs: Iterable[registry.MethodSpec]) -> WarmUp:
        with self._watch, torch.inference_mode():
            self._watch.refuse = None
            shared = self._open()
            self.warmed_up = done = rehearsal.run(map(shared.roster.unlearned, specs), self._watch)
            shared.admission.move()
            self._watch.count, self._watch.refuse = 0, refuse if self._strict else None
            self._turn.rest()
            return done

    def astream(
        self, prompt: Prompt | Prompts, params: SamplingParams | None = None, *, method: str | None = None
    ) -> AsyncStream:
        """As `stream`, for an event loop: all that may wait for the engine runs in a worker thread.

        `async for` takes its chunks; `async with` checks it before that and ends it after, whatever happened.
        """
        self._loaded()
        return AsyncStream(partial(self._asked, prompt, params, method), self._pool)

    def close(self) -> None:
        """Give back the weights and the cache, after the turn under way.

        Streams that have not ended do so with an AbortedError. A closed engine refuses requests.
        """
        shared = self._shared
        if self._process == os.getpid() or not self._turn.taken:
            self._turn.alone(self._close)
            if shared and shared.graphs:
                # Not within the turn: a finaliser that its builder's thread comes upon may wait for one.
                shared.graphs.close()
        else:  # Forked while another thread had the turn, which nobody gives back here.
            self._shared = self._pool = None

    def _close(self) -> None:
        shared = self._shared
        runs = list(shared.runs) if shared else []
        for run in runs:
            run.doom(CLOSED)
        for run in runs:
            run.fail(CLOSED)
        self._shared = self._pool = None
        # Memory that `shared` still has goes back when nothing works with it.
        self._turn.settle()

    def __enter__(self) -> Engine:
        self._loaded()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> tuple[Model, KVCache]:
        shared = self._open()
        return shared.model, shared.admission.cache

    def _open(self) -> Shared:
        if self._shared is None:
            raise AbortedError(CLOSED)
        if self._process != os.getpid():
            self._adopt(self._shared)
        return self._shared

    def _adopt(self, shared: Shared) -> None:
        """Work in a forked process: it has a copy of everything but the threads, and of a GPU nothing."""
        if shared.model.device.type != "cpu" or shared.graphs or shared.runs or self._turn.taken:
            raise RequestError(
                f"engine: it was loaded in process {self._process} and this is {os.getpid()}, forked from it: expected "
                "one on the CPU, and no request under way when it was forked; load it in this process"
            )
        self._process, self._pool = os.getpid(), ThreadPoolExecutor(1, "skipjack-engine")

    @property
    def _encode(self) -> Encode | None:
        return self.tokenizer.encode if self.tokenizer else None

    def _methods(self) -> Roster:
        return self._open().roster

    def _method(self, spec: registry.MethodSpec) -> Method:
        return self._turn.take(lambda: self._methods().get(spec))

    def _entering(self, spec: registry.MethodSpec) -> Stepwise[Method]:
        return (yield from self._methods().entering(spec))

    def _sequence(self, index: int, choice: int, ids: list[int], params: SamplingParams, seed: int) -> Sequence:
        text = TextStream(self.tokenizer, params.stop) if self.tokenizer else None
        eos = frozenset[int]() if params.ignore_eos else frozenset(self.config.eos_token_ids)
        return Sequence(index, choice, ids, params, seed, eos, self.config.max_context, text)

    def _asked(self, prompt: Prompt | Prompts, params: SamplingParams | None, method: str | None) -> Stream:
        """A request that has been checked, as a stream that is still to be prepared."""
        params = SamplingParams() if params is None else params
        spec = self._default if method is None else registry.parse(method)
        check_params(params, self.tokenizer, self.config)
        prompts = cast(Prompts, prompt) if is_many(prompt) else [cast(Prompt, prompt)]
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequences = [
            self._sequence(i, choice, ids, params, (seed + choice) % 2**64)
            for i, ids in enumerate(to_ids(p, self.tokenizer, self.config) for p in prompts)
            for choice in range(params.n)
        ]
        return self._stream(self._open(), sequences, spec, seed)

    def _stream(self, shared: Shared, sequences: list[Sequence], spec: registry.MethodSpec, seed: int) -> Stream:
        shared.admission.expect_room(max(sequence.max_length for sequence in sequences))
        return Stream(Run(shared, sequences, self._entering(spec)), self.backend, self.numerics, seed)
