"""Requests that are cancelled, faults that are injected, and memory that must stay flat: promises R7, R8 and R10.

    python tests/endurance.py --cancels 1000 --faults 500 --requests 10000 --cycles 50 [--seed 7]

Each is left out where its number is 0. Cancels and faults come in episodes: several requests at a time, by threads, an
event loop and the main thread, some of which are struck at a chosen moment. A failure prints the seed and the episode,
and `--only EPISODE` runs that one, on an engine of its own. Threads may meet otherwise the second time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import os
import random
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from skipjack import AbortedError, Engine, RequestError, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.tokenizer import Tokenizer
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime import run as run_module
from skipjack.runtime.cache import KVCache
from skipjack.runtime.company import FAILED, Company
from skipjack.runtime.graphs import Graphs, Rounds
from skipjack.runtime.methods import registry
from skipjack.runtime.metrics import Ledger
from skipjack.runtime.round_graph import RoundGraph
from skipjack.runtime.run import Run
from skipjack.runtime.text import TextStream

LIMIT_S = 120.0
# Of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# A token that the model cannot go on after: its embedding is infinite.
POISON = 299
SHARED = FAILED.partition("{")[0]
RUNTIME = str(Path(run_module.__file__).parent)
LOSSLESS = (
    "autoregressive",
    "swift:skip_attention=1+2,num_draft_tokens=4,threshold=0.1",
    "swift:skip_attention=1,tree=true,num_draft_tokens=4",
    "swift:window=8,search_budget=1,max_opt_iter=3,num_draft_tokens=5",
    "lookup:choose=likeliest,max_ngram=2",
    "lookup:choose=likeliest,tree=true,num_draft_tokens=9,remember=256",
    "layerskip:exit_layer=2",
    "clasp:interval=6,search_budget=1",
    "kangaroo:adapter=untrained,exit_layer=2,threshold=0.1",
    "conflayers:interval=6,search_budget=1,window=8",
    "knapspec:interval=6,search_budget=1",
    "del",
    "quantized:num_draft_tokens=4",
    "auto:search_budget=0.5,max_loss=1",
    "auto:draft_weights=int8,max_loss=1",
)
LOSSY = (
    "unified:speedup=2",
    "static:skip=2",
    "skipdecode:length=9",
    "calm:threshold=0.9,least=2",
    "layerskip:exit_layer=2,verify=false",
)
CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0.7, "logprobs": 2, "n": 2},
    {"n": 3, "temperature": 1.0, "min_p": 0.02},
    {"stop": ("e", "th", "\n", "3"), "temperature": 1.2},
    {"stop_token_ids": tuple(range(40, 60)), "min_tokens": 3, "logprobs": 0},
    {"temperature": 1.0, "logit_bias": {POISON: 4.0}},
)
PHASES = ("prefill", "prefill shared", "draft", "verify", "commit", "search", "round", "between")
OPS = (
    "index", "enter", "normalise", "linear", "qkv_rope_append", "attend", "fill_kv", "logits", "head", "reshape_logits",
    "sample", "logprobs", "verify", "compact", "lookup", "extend", "branch", "commit",
)  # fmt: skip


class Interrupted(BaseException):
    """What the handler of a signal raises."""


class Injected:
    """A fault of the script's own making, whatever kind of error it is."""


class BrokenOp(Injected, RuntimeError):
    pass


class NoMemory(Injected, MemoryError):
    pass


class NoDeviceMemory(Injected, torch.OutOfMemoryError):
    pass


class BrokenCode(Injected, ZeroDivisionError):
    pass


class Consumer(Injected, Exception):
    """Of whoever reads a stream, in the body of his loop."""


ERRORS = (BrokenOp, NoMemory, NoDeviceMemory, BrokenCode)


@dataclass(frozen=True)
class Shape:
    """An engine that episodes run on."""

    graphs: bool
    compiled: bool
    max_sequences: int
    cache_tokens: int
    prefix_caching: bool = False


SHAPES = (
    Shape(False, True, 16, 256),
    Shape(True, True, 16, 256),
    Shape(False, False, 4, 2048, True),
    Shape(True, False, 3, 256),
    Shape(False, True, 64, 8192, True),
    Shape(True, True, 64, 8192, True),
    Shape(False, True, 1, 256),
    Shape(True, True, 2, 2048, True),
)


@dataclass(eq=False)
class Ask:
    """What one request asks for; its `params` are an object of its own."""

    prompts: list[list[int]]
    params: SamplingParams
    method: str


@dataclass(eq=False)
class Answer:
    """What its reader got: tokens and text by prompt and choice, and how it ended."""

    tokens: defaultdict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    text: defaultdict[tuple[int, int], str] = field(default_factory=lambda: defaultdict(str))
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    error: BaseException | None = None

    def take(self, chunk: Any) -> None:
        place = chunk.index, chunk.choice
        self.tokens[place] += chunk.token_ids
        self.text[place] += chunk.text
        if chunk.finish_reason:
            self.reasons[place] = chunk.finish_reason


class Models:
    """A small random model with a tokenizer, engines over it, and the answers that requests have alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields_ = synthetic_config("tiny") | {
            "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 300,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        }  # fmt: skip
        self.config = ModelConfig.parse(fields_, "endurance")
        weights = synthetic_weights(self.config, 0, torch.float32, 0.2)
        save_checkpoint(folder, fields_, checkpoint_tensors(weights, self.config))
        made = runpy.run_path(str(Path(__file__).with_name("fuzz_files.py")))["_tokenizer"]()
        (folder / "tokenizer.json").write_bytes(made)
        self.tokenizer = Tokenizer.load(folder, self.config)
        embedding = weights.embedding.clone()
        embedding[POISON] = torch.inf
        self.weights = replace(weights, embedding=embedding)
        self._quiet: dict[bool, Engine] = {}
        self._alone: dict[Any, Answer] = {}

    def engine(self, shape: Shape) -> Engine:
        kernels = os.environ.get("SKIPJACK_CPU_KERNELS", "") if shape.compiled else "torch"
        with mock.patch.dict(os.environ, {"SKIPJACK_CPU_KERNELS": kernels}):
            return Engine(
                self.config,
                self.weights,
                tokenizer=self.tokenizer,
                graphs=shape.graphs,
                max_sequences=shape.max_sequences,
                cache_tokens=shape.cache_tokens,
                prefix_caching=shape.prefix_caching,
            )

    def alone(self, ask: Ask, index: int, choice: int, *, compiled: bool) -> Answer:
        """What a choice of a prompt gets by itself: by a lossless method what plain decoding gives it."""
        method, params = "autoregressive" if ask.method in LOSSLESS else ask.method, ask.params
        if params.seed is not None:
            params = replace(params, n=1, seed=(params.seed + choice) % 2**64)
        key = tuple(ask.prompts[index]), repr(params), method, compiled
        if key not in self._alone:
            if compiled not in self._quiet:
                self._quiet[compiled] = self.engine(Shape(False, compiled, 16, 4096))
            answer = Answer()
            try:
                for chunk in self._quiet[compiled].stream(ask.prompts[index], params, method=method):
                    answer.take(chunk)
            except RequestError as error:
                answer.error = error
            self._alone[key] = answer
        return self._alone[key]


class Probe:
    """Sees an engine's passes from within: in which part of a round it is, and whom an error there may end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.parts: list[str] = []
        self.watchers: list[Callable[[str], None]] = []
        self.runs: list[Run] = []
        self.entered: set[Run] = set()
        # Steps that have begun, a turn each, and of each request how many had when it was stopped and had ended.
        self.steps = 0
        self.stopped: dict[Run, int] = {}
        self.ended: dict[Run, int] = {}
        # The tokens of each sequence of a company when its pass began.
        self.standing: list[tuple[Run, Any, int]] = []
        self.company: Company | None = None
        # The request whose step, or whose end, the thread that has the turn is at.
        self.leader: Run | None = None
        self.poison: Callable[[str], bool] = lambda name: False
        model = engine._loaded()[0]
        model.mark = self.mark
        known = {one.name for one in fields(model.ops)}
        model.ops = replace(model.ops, **{name: self._ticking(model.ops, name) for name in OPS if name in known})
        if (joined := model.joined) is not None:
            model.joined = self._watched("joined", joined)
        stream = engine._stream

        def noted(*given: Any) -> Any:
            made = stream(*given)
            self.runs.append(made._run)
            return made

        engine._stream = noted

    def forget(self) -> None:
        """Nothing of the episode before."""
        self.watchers.clear()
        self.runs.clear()
        self.entered.clear()
        self.stopped.clear()
        self.ended.clear()
        self.standing, self.company = [], None

    @contextlib.contextmanager
    def mark(self, part: str, sequences: int, rows: int, step: int | None = None) -> Iterator[None]:
        shared = part == "prefill" and sequences > 1
        self.parts.append(f"{part} shared" if shared else part)
        try:
            yield
        finally:
            self.parts.pop()

    @property
    def phase(self) -> str:
        return self.parts[-1] if self.parts else "between"

    def tick(self) -> None:
        for watcher in list(self.watchers):
            watcher(self.phase)

    def may_end(self) -> set[Run]:
        """Whom an error at this moment may end besides its own request, by the documentation."""
        changed = {run for run, sequence, tokens in self.standing if len(sequence.tokens) != tokens}
        rounds = None if self.company is None else self.company._rounds
        if rounds is not None:
            changed |= {run for run in self.company._members if rounds.serves(run.sequences)}
        return changed

    def stand(self, company: Company | None) -> None:
        self.company = company
        members = [] if company is None else company._members
        self.standing = [(run, sequence, len(sequence.tokens)) for run in members for sequence in run.sequences]

    def _ticking(self, ops: Any, name: str) -> Callable[..., Any]:
        return self._watched(name, getattr(ops, name))

    def _watched(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.tick()
            if name in ("head", "logits") and self.poison(self.phase):
                args = (spoilt(args[0]), *args[1:])
            return op(*args, **options)

        return watched


def spoilt(hidden: torch.Tensor) -> torch.Tensor:
    """Residual streams of which the first row is no number."""
    hidden = hidden.clone()
    hidden[0] = torch.nan
    return hidden


Finder = Callable[[Any], "Probe | None"]


@contextlib.contextmanager
def observed(probe: Finder) -> Iterator[None]:
    """Tell the probe of an engine what its companies and requests do; `probe` finds it by the cache they share."""
    with contextlib.ExitStack() as patches:
        for owner, name, around in (*_of_companies(probe), *_of_requests(probe)):
            patches.enter_context(mock.patch.object(owner, name, around(getattr(owner, name))))
        yield


def _of_companies(probe: Finder) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    def advance(real: Any) -> Any:
        def wrapped(company: Company, running: Any) -> Any:
            if (own := probe(company._cache)) is not None:
                own.stand(company)
            return real(company, running)

        return wrapped

    def standing(real: Any) -> Any:
        def wrapped(company: Company, *given: Any) -> Any:
            if (own := probe(company._cache)) is None:
                return real(company, *given)
            before = own.company, own.standing
            own.stand(company)
            try:
                return real(company, *given)
            finally:
                own.company, own.standing = before

        return wrapped

    return [
        (Company, "_advance", advance),
        *((Company, name, standing) for name in ("read", "leave", "round")),
    ]


def _of_requests(probe: Finder) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    def found(run: Run) -> Probe | None:
        return None if (shared := run._shared) is None else probe(shared.admission.cache)

    def stop(real: Any) -> Any:
        def wrapped(run: Run) -> None:
            if (own := found(run)) is not None:
                own.stopped.setdefault(run, own.steps)
            real(run)

        return wrapped

    def led(real: Any, step: int = 1) -> Any:
        def wrapped(run: Run) -> Any:
            if (own := found(run)) is None:
                return real(run)
            before, own.leader = own.leader, own.leader or run
            own.steps += step
            try:
                return real(run)
            finally:
                own.leader = before
                if run.over:
                    own.ended.setdefault(run, own.steps)

        return wrapped

    def enter(real: Any) -> Any:
        def wrapped(ledger: Ledger, run: Run) -> None:
            if (own := probe(ledger._cache)) is not None:
                own.entered.add(run)
            real(ledger, run)

        return wrapped

    return [
        (Run, "stop", stop),
        *((Run, name, led) for name in ("_advance", "_prepare")),
        (Run, "_end", partial(led, step=0)),
        (Ledger, "enter", enter),
    ]


class Request:
    """One request of an episode and whoever reads it."""

    def __init__(self, ask: Ask, reader: str) -> None:
        self.ask, self.reader, self.answer = ask, reader, Answer()
        # What strikes it, once; `leave` after so many chunks, and how.
        self.leave: tuple[int, str] | None = None
        self.cancelled = False
        self.stream: Any = None
        self.task: asyncio.Task[None] | None = None
        self.over = threading.Event()
        self.begun = threading.Event()

    def __repr__(self) -> str:
        lengths = [len(prompt) for prompt in self.ask.prompts]
        return f"{self.ask.method} by {self.reader}, prompts of {lengths}, {self.ask.params}"

    @property
    def prompt(self) -> Any:
        return self.ask.prompts if len(self.ask.prompts) > 1 else self.ask.prompts[0]

    def leaves(self, chunks: int) -> bool:
        return self.leave is not None and chunks >= self.leave[0]

    def read(self, engine: Engine) -> None:
        """On the thread that calls this."""
        try:
            self.begun.set()
            if self.reader == "generate":
                outputs = engine.generate(self.prompt, self.ask.params, method=self.ask.method)
                for i, output in enumerate(outputs if isinstance(outputs, list) else [outputs]):
                    for j, choice in enumerate(output.choices):
                        self.answer.tokens[i, j] += choice.token_ids
                        self.answer.text[i, j] += choice.text or ""
                        self.answer.reasons[i, j] = choice.finish_reason
            else:
                self._iterate(engine)
        except BaseException as error:
            self.answer.error = error.with_traceback(None)
            error.__context__ = None
        finally:
            self.over.set()

    def _iterate(self, engine: Engine) -> None:
        stream = self.stream = engine.stream(self.prompt, self.ask.params, method=self.ask.method)
        if self.leaves(0):
            self._go(stream)
        for chunks, chunk in enumerate(stream, 1):
            self.answer.take(chunk)
            if self.leaves(chunks):
                self._go(stream)
                break

    def _go(self, stream: Any) -> None:
        self.cancelled = True
        _, how = self.leave or (0, "")
        if how == "raise":
            with stream:
                raise Consumer("of the loop's body")
        if how == "close":
            stream.close()
        else:
            self.stream = None

    async def aread(self, engine: Engine) -> None:
        """On an event loop."""
        self.task = asyncio.current_task()
        self.begun.set()
        try:
            if self.leave is not None and self.leave[1] == "deadline":
                self.cancelled = True
                await asyncio.wait_for(self._aiterate(engine), self.leave[0] / 100)
            else:
                await self._aiterate(engine)
        except BaseException as error:
            self.answer.error = error.with_traceback(None)
            error.__context__ = None
        finally:
            self.over.set()

    async def _aiterate(self, engine: Engine) -> None:
        chunks = 0
        async with engine.astream(self.prompt, self.ask.params, method=self.ask.method) as stream:
            async for chunk in stream:
                self.answer.take(chunk)
                chunks += 1
                if self.leaves(chunks) and self.leave is not None and self.leave[1] != "deadline":
                    self.cancelled = True
                    if self.leave[1] == "raise":
                        raise Consumer("of the loop's body")
                    break


class Episode:
    """Some requests at once on one engine, and what strikes them."""

    crowd = 2, 5

    def __init__(self, models: Models, shape: Shape, probe: Probe, name: str) -> None:
        self.models, self.shape, self.probe, self.name = models, shape, probe, name
        self.draw = random.Random(name)
        self.engine = probe.engine
        self.struck: list[str] = []
        # Whom an error that was raised may have ended beside its own request.
        self.may_end: set[Run] = set()
        # Whether an error was raised within the engine that is nobody's but one request's.
        self.faults = 0
        self.patches = contextlib.ExitStack()
        self.requests = self._requests()

    def _requests(self) -> list[Request]:
        draw = self.draw
        methods = draw.sample([*LOSSLESS, *LOSSY], draw.choice((1, 1, 2)))
        kinds = draw.sample(CHOICES, draw.choice((1, 1, 2)))
        made = list[Request]()
        for _ in range(draw.randint(*self.crowd)):
            fields_ = dict(draw.choice(kinds))
            if "temperature" in fields_:
                fields_["seed"] = draw.choice((0, 7, 2**63 + 1))
            long = draw.random() < 0.06
            params = SamplingParams(
                max_tokens=draw.choice((3, 8, 14, 14, 30)), ignore_eos="stop" not in fields_, **fields_
            )
            prompts = [self._prompt(long) for _ in range(draw.choice((1, 1, 1, 1, 3)))]
            made.append(
                Request(Ask(prompts, params, draw.choice(methods)), draw.choice(("stream", "generate", "loop")))
            )
        return made

    def _prompt(self, long: bool) -> list[int]:
        length = self.draw.choice((140, 600)) if long else self.draw.choice((1, 4, 9, 40))
        own = random.Random(self.draw.randrange(12))
        prompt = [own.randrange(3, 290) for _ in range(length)]
        if self.draw.random() < 0.03:
            prompt[self.draw.randrange(length)] = POISON
        return prompt

    # Moments

    def at_tick(self, phase: str, ticks: int, work: Callable[[], None]) -> None:
        """Do `work` in the turn at the so-manieth op of a phase, on the thread that computes; once."""
        left = ticks

        def watcher(now: str) -> None:
            nonlocal left
            if now != phase:
                return
            left -= 1
            if left < 0 and watcher in self.probe.watchers:
                self.probe.watchers.remove(watcher)
                work()

        self.probe.watchers.append(watcher)

    def at_call(self, owner: Any, name: str, calls: int, error: Exception) -> None:
        """Have the so-manieth call of a function fail, once, before or after it has done its work."""
        real, left, late = getattr(owner, name), calls, self.draw.random() < 0.3

        def failing(*given: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1 and not late:
                self.fault(f"{getattr(owner, '__name__', 'method')}.{name}", error)
            found = real(*given, **options)
            if left == -1:
                self.fault(f"{getattr(owner, '__name__', 'method')}.{name} (after)", error)
            return found

        self.patches.enter_context(mock.patch.object(owner, name, failing))

    def fault(self, where: str, error: BaseException) -> None:
        self.may_end |= self.probe.may_end()
        self.owner = self.probe.leader if self.engine._turn.held else None
        self.faults += 1
        self.struck.append(where)
        raise error

    owner: Run | None = None

    # The course of it

    def run(self) -> None:
        probe, engine = self.probe, self.engine
        before = engine.metrics()
        loop = [request for request in self.requests if request.reader == "loop"]
        threads = [
            threading.Thread(target=request.read, args=(engine,), daemon=True)
            for request in self.requests
            if request.reader in ("stream", "generate")
        ]
        if loop:
            threads.append(threading.Thread(target=asyncio.run, args=(self._gather(loop),), daemon=True))
        with self.patches:
            for thread in threads:
                thread.start()
            for request in self.requests:
                if request.reader == "main":
                    self.main(request)
            until = time.monotonic() + LIMIT_S
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
                if thread.is_alive():
                    faulthandler.dump_traceback(all_threads=True)
                    raise AssertionError(f"a request hangs, among {self.requests}")
        probe.watchers.clear()
        probe.poison = lambda name: False
        for request in self.requests:
            request.stream = request.task = None
        self.check(before)

    async def _gather(self, requests: list[Request]) -> None:
        await asyncio.gather(*(asyncio.create_task(request.aread(self.engine)) for request in requests))

    def main(self, request: Request) -> None:
        request.read(self.engine)

    # What must hold afterwards

    def check(self, before: Any) -> None:
        probe = self.probe
        # One whose task was cancelled ends with its turn, which nobody waits for.
        until = time.monotonic() + LIMIT_S
        while (self.engine._turn.taken or any(not run.over for run in probe.runs)) and time.monotonic() < until:
            gc.collect()
            time.sleep(0.001)
        assert all(run.over for run in probe.runs), "a request has not ended"
        own = {id(request.ask.params): request for request in self.requests}
        served = {id(run.sequences[0].params) for run in probe.runs}
        for request in self.requests:
            told = request.answer.error
            if id(request.ask.params) not in served and not request.cancelled and not isinstance(told, Injected):
                raise AssertionError(f"never begun: {request}") from told
        aborted = set[Run]()
        for run in probe.runs:
            request = own[id(run.sequences[0].params)]
            told = request.answer.error
            if isinstance(told, AbortedError):
                aborted.add(run)
                assert str(told).startswith(SHARED), told
            self._expect_tokens(request, run)
        assert aborted <= self.may_end, (
            f"ended without having shared what failed: {self._named(aborted - self.may_end)}"
        )
        self._expect_rest(before)

    def _expect_tokens(self, request: Request, run: Run) -> None:
        answer, error = request.answer, request.answer.error
        lost = False
        for i in range(len(request.ask.prompts)):
            for j in range(request.ask.params.n):
                alone = self.models.alone(request.ask, i, j, compiled=self.shape.compiled)
                lost |= alone.error is not None
                expected, got = alone.tokens[0, 0], answer.tokens[i, j]
                place = f"prompt {i}, choice {j} of {request}: {got} for {expected}"
                assert got == expected[: len(got)], f"other tokens: {place}"
                if (i, j) in answer.reasons and answer.reasons[i, j] != "abort":
                    assert got == expected, f"tokens are missing: {place}"
                    assert answer.text[i, j] == alone.text[0, 0], f"another text: {place}"
                    assert answer.reasons[i, j] == alone.reasons[0, 0], f"another end: {place}"
                elif not request.cancelled and error is None:
                    raise AssertionError(f"it has no end: {place}")
        if error is None or request.cancelled:
            return
        if isinstance(error, (Injected, Interrupted)) or isinstance(error.__cause__, Injected):
            return
        if isinstance(error, AbortedError):
            return
        assert isinstance(error, RequestError), f"{error!r} of {request}"
        assert lost or (self.nan and "leave the range" in str(error)), f"{error!r} of {request}"

    nan = False

    def _named(self, runs: set[Run]) -> str:
        return ", ".join(str([len(sequence.tokens) for sequence in run.sequences]) for run in runs)

    def _expect_rest(self, before: Any) -> None:
        """Nothing is under way, every page is free, and the counters are the sums of what there was."""
        engine, probe = self.engine, self.probe
        shared, cache = engine._open(), engine._loaded()[1]
        now = engine.metrics()
        assert sorted([*cache._free, *cache._kept]) == list(range(1, cache.total_pages + 1)), "pages are lost"
        under_way = now.requests_running, now.requests_waiting, now.sequences_running, now.sequences_waiting
        assert under_way == (0, 0, 0, 0), under_way
        assert (now.pages_leaked, now.pages_held) == (0, 0), (now.pages_leaked, now.pages_held)
        turn = engine._turn
        left = [*turn._line, *turn._late, *turn._inside]
        assert (left, turn._depth) == ([], 0), "a turn was not left"
        assert not shared.admission._line, "somebody stands in the line for pages"
        assert now.first_tokens + now.accepted + now.bonus == now.completion_tokens
        ends = [getattr(now, f"requests_{end}") - getattr(before, f"requests_{end}") for end in ENDS]
        whole = sum(
            all(sequence.finish_reason not in (None, "abort") for sequence in run.sequences) for run in probe.entered
        )
        assert sum(ends) == len(probe.entered), f"{ends} of {len(probe.entered)} requests"
        assert ends[0] == whole, f"{ends[0]} have finished, {whole} were counted"
        sequences = [sequence for run in probe.entered for sequence in run.sequences]
        for name in ("accepted", "bonus", "rounds", "drafted", "graph_rounds"):
            counted = sum(getattr(sequence.counters, name) for sequence in sequences)
            assert getattr(now, name) - getattr(before, name) == counted, name
        first = sum(bool(sequence.generated) for sequence in sequences)
        assert now.first_tokens - before.first_tokens == first, "first tokens"
        if not self.faults:
            made = sum(sequence.generated for sequence in sequences)
            assert now.completion_tokens - before.completion_tokens == made, "completion tokens"


ENDS = ("finished", "aborted", "failed")


class Cancels(Episode):
    """Some of the requests are cancelled: of each that was struck, `struck` has how and in what phase."""

    crowd = 3, 9

    def run(self) -> None:
        draw, requests = self.draw, self.requests
        self.actors = list[threading.Thread]()
        for request in draw.sample(requests, draw.randint(1, len(requests) - 1)):
            self._plan(request)
        super().run()
        for actor in self.actors:
            actor.join(LIMIT_S)
            assert not actor.is_alive(), "who closes a stream hangs"
        # A step was under way when it was stopped, or one began before its end could be left to that one.
        for run, stopped in self.probe.stopped.items():
            waited = self.probe.ended[run] - stopped
            assert waited <= 1, f"{waited} steps began before a request that was stopped had given its pages back"

    def _plan(self, request: Request) -> None:
        draw = self.draw
        ways = {
            "stream": ("leave", "drop", "raise", "close", "close", "abandon", "inline", "queued", "pages"),
            "generate": ("signal", "line", "line"),
            "loop": ("leave", "raise", "deadline", "task", "task", "task", "queued", "pages"),
        }
        way = draw.choice(ways[request.reader])
        if way in ("signal", "line"):
            if any(other.reader == "main" for other in self.requests):
                return
            request.reader = "main"
            self.interrupt = partial(self._by_signal, request) if way == "signal" else partial(self._by_line, request)
            return
        if way in ("leave", "drop", "raise", "deadline"):
            chunks = draw.choice((0, 1, 1, 2, 3, 5, 8)) + (request.reader == "loop")
            how = {"leave": "close"}.get(way, way)
            request.leave = chunks, how
            self.struck.append(f"{request.reader}: {way}, mid-stream")
            return
        act = partial(self._act, request, "task" if request.reader == "loop" else way)
        if way in ("queued", "pages"):
            actor = threading.Thread(target=self._poll, args=(request, way, act), daemon=True)
            actor.start()
            self.actors.append(actor)
            return
        phase = draw.choice(PHASES)
        self.at_tick(phase, draw.choice((0, 1, 3, 10, 30, 90)), partial(self._from_tick, request, way, phase, act))

    def _from_tick(self, request: Request, way: str, phase: str, act: Callable[[str], bool]) -> None:
        """In a turn: act here, or on another thread while this one goes on as soon as the request is told."""
        if way == "inline":
            act(phase)
            return
        actor = threading.Thread(target=act, args=(phase,), daemon=True)
        actor.start()
        self.actors.append(actor)
        run = self._run_of(request)
        until = time.monotonic() + 0.05
        while run is not None and not run.stopped and not run.over and time.monotonic() < until:
            time.sleep(0)

    def _poll(self, request: Request, way: str, act: Callable[[str], bool]) -> None:
        """Act where the request stands in a line: for a turn, or for pages."""
        until = time.monotonic() + LIMIT_S
        while not request.over.is_set() and time.monotonic() < until:
            run = self._run_of(request)
            if run is not None:
                waits = run.waits if way == "pages" else bool(run.queued) and self.engine._turn.taken
                if waits and act(way):
                    return
            time.sleep(0)

    def _run_of(self, request: Request) -> Run | None:
        found = (run for run in list(self.probe.runs) if run.sequences[0].params is request.ask.params)
        return next(found, None)

    def _act(self, request: Request, way: str, where: str) -> bool:
        run = self._run_of(request)
        if run is None or run.over or run.stopped:
            return False
        request.cancelled = True
        if way == "task":
            task = request.task
            assert task is not None
            with contextlib.suppress(RuntimeError):
                task.get_loop().call_soon_threadsafe(task.cancel)
        else:
            stream = request.stream
            if stream is None:
                return False
            if way == "abandon":
                stream.abandon()
            else:
                stream.close()
                inside = threading.get_ident() in self.engine._turn._inside.values()
                assert inside or (run.over and not any(sequence.pages for sequence in run.sequences)), "not closed"
        self.struck.append(f"{request.reader}: {way}, {where}")
        return True

    interrupt: Callable[[], None]

    def main(self, request: Request) -> None:
        self.interrupt()

    def _strike(self, request: Request, where: str) -> None:
        request.cancelled = True
        self.may_end |= self.probe.may_end()
        self.faults += 1
        self.struck.append(f"main: {where}, {self.probe.phase}")
        raise Interrupted

    def _by_signal(self, request: Request) -> None:
        """The handler of a signal raises, whenever that is."""
        armed = True

        def handler(*_: object) -> None:
            nonlocal armed
            if armed and not request.over.is_set():
                armed = False
                self._strike(request, "signal")

        usual = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, self.draw.choice((0.001, 0.005, 0.02, 0.05, 0.1)))
            try:
                request.read(self.engine)
            except Interrupted as error:
                request.answer.error = error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, usual)

    def _by_line(self, request: Request) -> None:
        """As the handler of a signal that comes before a line of the runtime."""
        left = int(10 ** self.draw.uniform(0, 4.2))

        def local(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if event == "line":
                left -= 1
                if left == 0:
                    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                    self.line = where
                    self._strike(request, "line")
            return local

        def trace(frame: Any, event: str, argument: object) -> Any:
            code = frame.f_code
            inner = code.co_filename.startswith(RUNTIME) and "lent" not in code.co_name
            return local(frame, event, argument) if inner and left > 0 else None

        usual = sys.gettrace()
        sys.settrace(trace)
        try:
            request.read(self.engine)
        except Interrupted as error:
            request.answer.error = error
        finally:
            sys.settrace(usual)


class Faults(Episode):
    """Something fails, once."""

    def run(self) -> None:
        draw = self.draw
        error = draw.choice(ERRORS)("injected")
        kind = draw.choice(
            ("op", "op", "op", "op", "method", "method", "text", "cache", "nan", "consumer", "line", "line", "prepare")
            + (("device",) * 4 if self.shape.graphs else ())
        )
        calls = draw.choice((0, 0, 1, 2, 5, 12))
        request, other = draw.sample(self.requests, 2)
        if draw.random() < 0.4:
            # Somebody leaves meanwhile, and that may be where it fails.
            other.reader = "loop" if other.reader == "loop" else "stream"
            other.leave = draw.choice((1, 2, 3, 6)), draw.choice(("close", "drop"))
        if kind == "op":
            phase = draw.choice(PHASES)
            ticks = draw.choice((0, 0, 1, 3, 10, 30))
            self.at_tick(phase, ticks, partial(self.fault, f"op in {phase}", error))
        elif kind == "method":
            method = self.engine._method(registry.parse(request.ask.method))
            name = draw.choice(
                ("propose", "observe", "count", "recipe", "phase", "tell", "admits", "unites", "prompt_pass", "memory")
                + (("step", "read") if not method.lossless and hasattr(method, "step") else ())
            )
            self.at_call(method, name, calls, error)
        elif kind == "text":
            self.at_call(TextStream, draw.choice(("push", "push", "finish")), calls, error)
        elif kind == "cache":
            self.at_call(KVCache, draw.choice(("reserve", "_zero", "copy")), calls, error)
        elif kind == "device":
            places = (
                (Graphs, "take"), (Graphs, "_take"), (Graphs, "give"), (RoundGraph, "load"), (RoundGraph, "enqueue"),
                (RoundGraph, "report"), (RoundGraph, "unload"), (RoundGraph, "stop"), (Rounds, "_steer"),
                (Rounds, "_read"), (Rounds, "_speculated"),
            )  # fmt: skip
            self.at_call(*draw.choice(places), calls, error)
        elif kind == "nan":
            self._spoil(draw.choice(("prefill", "prefill shared", "draft", "verify")), calls)
        elif kind == "consumer":
            if request.reader == "generate":
                request.reader = "stream"
            request.leave = draw.choice((1, 2, 4)), "raise"
            self.struck.append(f"{request.reader}: its consumer")
        elif kind == "prepare":
            spec = registry.parse(request.ask.method)
            if self.engine._default != spec:
                self.engine._methods().forget(spec)
            self.at_tick("between", calls, partial(self.fault, "op of a preparation", error))
        else:
            self._at_line(request, error)
        super().run()
        told = [one for one in self.requests if self._has(one, error)]
        assert len(told) <= 1, f"several have the error of one: {told}"
        if told and self.owner is not None and kind != "line":
            assert told[0].ask.params is self.owner.sequences[0].params, f"a stranger has the error: {told}"

    @staticmethod
    def _has(request: Request, error: BaseException) -> bool:
        own = request.answer.error
        return own is error or (own is not None and own.__cause__ is error)

    def _spoil(self, phase: str, calls: int) -> None:
        left = calls

        def poison(now: str) -> bool:
            nonlocal left
            if now != phase:
                return False
            left -= 1
            if left == -1:
                self.nan = True
                self.struck.append(f"NaN in {phase}")
            return left == -1

        self.probe.poison = poison

    def _at_line(self, request: Request, error: BaseException) -> None:
        """Memory runs out at a line of the runtime, on the thread that reads one of the requests."""
        if request.reader == "loop":
            request.reader = "stream"
        left, read = int(10 ** self.draw.uniform(0, 4.2)), request.read

        def local(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if event == "line":
                left -= 1
                if left == 0:
                    self.line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                    self.fault(f"line in {self.probe.phase}", error)
            return local

        def trace(frame: Any, event: str, argument: object) -> Any:
            code = frame.f_code
            inner = code.co_filename.startswith(RUNTIME) and "lent" not in code.co_name
            return local(frame, event, argument) if inner and left > 0 else None

        def traced(engine: Engine) -> None:
            sys.settrace(trace)
            try:
                read(engine)
            finally:
                sys.settrace(None)

        request.read = traced


def episodes(kind: type[Episode], wanted: int, seed: int = 0, only: int | None = None) -> Counter[str]:
    """Run until so many requests were struck; what struck them. Raises AssertionError on the first broken promise."""
    struck: Counter[str] = Counter()
    probes: dict[Any, Probe] = {}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as engines:
        models = Models(Path(root))
        engines.enter_context(observed(probes.get))
        number = 0 if only is None else only
        while sum(struck.values()) < wanted:
            shape = SHAPES[number % len(SHAPES)]
            if shape not in probes:
                probe = probes[shape] = Probe(engines.enter_context(models.engine(shape)))
                probes[probe.engine._loaded()[1]] = probe
            probe = probes[shape]
            probe.forget()
            name = f"{kind.__name__} {seed} {number}"
            episode = None
            try:
                episode = kind(models, shape, probe, name)
                episode.run()
            except BaseException as problem:
                line = getattr(episode, "line", "")
                raise AssertionError(
                    f"--seed {seed} --only {number} ({kind.__name__}, {shape}), struck by "
                    f"{episode and episode.struck} {line}: {type(problem).__name__}: {problem}"
                ) from problem
            struck.update(episode.struck)
            number += 1
            if only is not None:
                break
    return struck


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident: int
    threads: int
    files: int

    @staticmethod
    def now() -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        threads, files = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
        return Held(pages * os.sysconf("SC_PAGE_SIZE"), threads, files)


def flat(requests: int, seed: int = 0, *, graphs: bool = False, drift: float = 0.02) -> str:
    """Short requests of all kinds on one engine: from the first fifth of them on its memory stays as it is."""
    draw, warm = random.Random(f"flat {seed}"), requests // 5
    with tempfile.TemporaryDirectory() as root:
        models = Models(Path(root))
        with models.engine(Shape(graphs, True, 16, 4096)) as engine:
            for number in range(requests):
                if number == warm:
                    before = Held.now()
                _short(engine, draw)
            after = Held.now()
            metrics = engine.metrics()
            assert (metrics.requests_running, metrics.pages_held, metrics.pages_leaked) == (0, 0, 0)
    grown = after.resident / before.resident - 1
    told = f"{before.resident / 2**20:.1f} MiB after {warm} requests, {after.resident / 2**20:.1f} after {requests}"
    assert grown < drift, f"--seed {seed}: {told}"
    # An engine has two threads of its own, each begun when it is first needed.
    assert after.threads <= before.threads + 2, f"--seed {seed}: {before}, {after}"
    assert after.files == before.files, f"--seed {seed}: {before}, {after}"
    return told


def _short(engine: Engine, draw: random.Random) -> None:
    """One request by any method, read to its end or not, by a thread or an event loop."""
    chosen = dict(draw.choice(CHOICES[:-1]))
    if "temperature" in chosen:
        chosen["seed"] = draw.randrange(2**32)
    params = SamplingParams(max_tokens=draw.choice((3, 4, 6)), ignore_eos="stop" not in chosen, **chosen)
    prompts = [[draw.randrange(3, 290) for _ in range(draw.randint(1, 24))] for _ in range(draw.choice((1, 1, 1, 2)))]
    method = draw.choice((*LOSSLESS, *LOSSY))

    async def read() -> None:
        async with engine.astream(prompts, params, method=method) as stream:
            async for _ in stream:
                pass

    way = draw.random()
    try:
        if way < 0.1:
            asyncio.run(read())
        elif way < 0.2:
            next(engine.stream(prompts, params, method=method), None)
        else:
            engine.generate(prompts, params, method=method)
    except RequestError as error:
        if "leave the range" not in str(error):
            raise


def reloaded(cycles: int, seed: int = 0, *, warm: int = 5, drift: float = 0.02) -> str:
    """Load, generate, close: after the first few cycles threads, files and memory are as they were."""
    draw = random.Random(f"cycles {seed}")
    with tempfile.TemporaryDirectory() as root:
        Models(Path(root))
        for cycle in range(warm + cycles):
            if cycle == warm:
                before = Held.now()
            with Engine.load(root, graphs=cycle % 2 == 1, cache_tokens=4096) as engine:
                assert engine.generate("the cat sat on", SamplingParams(max_tokens=4, ignore_eos=True)).text
                for _ in range(6):
                    _short(engine, draw)
            if cycle % 3 == 0:
                del engine
        after = Held.now()
    told = (
        f"{before.resident / 2**20:.1f} MiB, {before.threads} threads and {before.files} files after {warm} cycles, "
        f"{after.resident / 2**20:.1f} MiB, {after.threads} and {after.files} after {cycles} more"
    )
    assert after.resident / before.resident - 1 < drift, f"--seed {seed}: {told}"
    assert (after.threads, after.files) == (before.threads, before.files), f"--seed {seed}: {told}"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cancels", "faults", "requests", "cycles"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.requests:
        for graphs in (False, True):
            print(
                f"{'device' if graphs else 'host'}: {flat(options.requests, options.seed, graphs=graphs)}", flush=True
            )
    if options.cycles:
        # What is freed goes back to the system: by itself glibc keeps more of it for later with every large block.
        libc = ctypes.CDLL(None)
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(threshold, 1 << 16)
        print(f"load and close: {reloaded(options.cycles, options.seed)}", flush=True)
    for kind, wanted in ((Cancels, options.cancels), (Faults, options.faults)):
        if wanted:
            start = time.monotonic()
            struck = episodes(kind, wanted, options.seed, options.only)
            print(f"{kind.__name__}: {sum(struck.values())} in {time.monotonic() - start:.0f} s, seed {options.seed}")
            for what, count in sorted(struck.items()):
                print(f"  {count:5} {what}", flush=True)


if __name__ == "__main__":
    main()
