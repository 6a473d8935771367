"""Running once what requests can reach, so that none of them waits for a compilation or a capture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

import torch

from ..kernels.compilation import Watch
from .batch import Batch, Draft
from .cache import KVCache
from .decode import decode, prefill, read_together
from .depths import cuts
from .errors import CompilationError
from .graphs import SIZES, Graphs
from .methods.base import Method, sampled
from .methods.policy import Policy
from .model import Model
from .plan import LayerPlan
from .prefill import prefill_chunk
from .request import SamplingParams, integer
from .sequence import Sequence
from .speculate import speculate

# How tokens may be chosen, each of which has kernels of its own: penalties widen the logits to float32.
PLAIN = (SamplingParams(max_tokens=2**20), SamplingParams(max_tokens=2**20, temperature=1.0))
RESHAPED = SamplingParams(max_tokens=2**20, temperature=1.0, repetition_penalty=1.1, logprobs=1)
CHOICES = (*PLAIN, RESHAPED)


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up took: kernels compiled, or loaded from Triton's cache on disk; graphs captured; seconds."""

    compilations: int
    graphs: int
    seconds: float


class Scripted(Method):
    """A drafter of `length` tokens of no meaning, in a tree or with scores if asked for."""

    name = "scripted"

    def __init__(self, like: Method, length: int, *, tree: bool, scores: bool) -> None:
        self._full, self._target = like.plan, like.target
        self._length, self._tree, self._scores = length, tree, scores
        self.rejection = like.rejection

    @property
    def target(self) -> LayerPlan:
        return self._target

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        tokens = torch.zeros(len(batch), self._length, dtype=torch.int64, device=batch.device)
        chain = torch.arange(self._length, device=batch.device).expand_as(tokens).contiguous()
        dtype = torch.float32 if batch.sequences[0].params.reshapes_logits else model.dtype
        scores = torch.zeros(*tokens.shape, model.config.vocab_size, dtype=dtype, device=batch.device)
        return Draft(
            tokens,
            torch.full_like(batch.length, self._length),
            parent=chain if self._tree and self._length else None,
            scores=scores if self._scores else None,
        )


class Rehearsal:
    """Rounds of up to a number of sequences and of tokens each, over a page that belongs to nobody.

    What a kernel is specialised on follows the rows of a pass by powers of two, or goes over one threshold in rows and
    positions. So rounds run with 1, 2, 4, … sequences and with drafts that make 1, 2, 4, … rows of one, first with
    block tables as short as can be, and the largest also with those of the longest sequence.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        graphs: Graphs | None,
        most: int,
        sequences: int | None,
        context: int | None,
    ) -> None:
        """`most` is how many sequences may run together, which `sequences` is unless it is given."""
        longest = min(model.config.max_context, cache.total_pages * cache.page_size)
        sequences, context = most if sequences is None else sequences, longest if context is None else context
        integer("warm_up: sequences", sequences, 1, most)
        integer("warm_up: context", context, 1, longest)
        self._model, self._cache, self._graphs = model, cache, graphs
        self._counts = [size for size in SIZES if size < 2 * sequences]
        self._context, self._pages = context, cache.pages_for(context)

    def run(self, methods: Iterable[Method], watch: Watch) -> WarmUp:
        """Every kind of pass of the methods, on the thread that is watched, and their round graphs."""
        start, compiled, captured = perf_counter(), watch.count, self._captured
        methods = list(methods)
        if watch.enabled:
            for method in methods:
                self._passes(method)
        if self._graphs is not None:
            for method in methods:
                self._capture(self._graphs, method)
        return WarmUp(watch.count - compiled, self._captured - captured, perf_counter() - start)

    @property
    def _captured(self) -> int:
        return self._graphs.captured if self._graphs is not None else 0

    def _passes(self, method: Method) -> None:
        rounds = max(method.period, 2 * (method.widest.bit_length() + 2))
        short = self._cache.pages_for(2 + rounds * (method.widest + 1))
        for count in self._counts:
            for params in CHOICES:
                self._rounds(method, self._prefilled(method, [0], short, count, params))
        longest = max(short, self._pages)
        self._rounds(method, self._prefilled(method, [0], longest, self._counts[-1], CHOICES[0]))
        for length in self._prompts():
            self._prefilled(method, [0] * length, longest, 1, CHOICES[0])
            for count in {2, self._counts[-1]} if method.plain_prompts and self._counts[-1] > 1 else ():
                prompt = [0] * max(1, length // count)
                made = self._sequences(prompt, self._cache.pages_for(len(prompt)), count, CHOICES[0])
                read_together(self._model, self._cache, made, method)
        method.rehearse(self._model, self._cache)

    def _prompts(self) -> Iterable[int]:
        """A length for each power of two of a prompt's rows that has kernels of its own: from a tile of them on."""
        most, tile = min(self._context - 1, prefill_chunk(self._model.device)), self._model.ops.prefill_tile or 1
        return {min(most, tile << power) for power in range((most // tile).bit_length() + 1)}

    def _prefilled(
        self, method: Method, prompt: list[int], pages: int, count: int, params: SamplingParams
    ) -> list[Sequence]:
        made = self._sequences(prompt, pages, count, params)
        for sequence in made:
            prefill(self._model, self._cache, sequence, method)
        return made

    def _sequences(self, prompt: list[int], pages: int, count: int, params: SamplingParams) -> list[Sequence]:
        length = pages * self._cache.page_size
        return [Sequence(i, 0, prompt, params, i, frozenset(), length, None, pages=[0] * pages) for i in range(count)]

    def _rounds(self, method: Method, sequences: list[Sequence]) -> None:
        model, cache = self._model, self._cache
        if isinstance(method, Policy):
            for _ in range(method.period):
                decode(model, cache, sequences, method)
            return
        batch = Batch.of(sequences, model.ops.decode_tile, model.device)
        method.propose(model, cache, batch)
        # A pass of a draft, for methods that do not draft at first.
        model.forward(batch.rows(batch.last[:, None], batch.length, torch.ones_like(batch.length)), cache, model.full)
        lengths = [2**i - 1 for i in range(method.widest.bit_length())] if len(sequences) == 1 else []
        rejection = method.rejection and sampled(sequences)
        for length in (*lengths, method.widest):
            for scores in (False, True) if rejection and length else (False,):
                speculate(model, cache, sequences, Scripted(method, length, tree=method.tree, scores=scores))

    def _capture(self, graphs: Graphs, method: Method) -> None:
        """Graphs of all sizes and numbers of draft steps; with penalties and logprobs of one size, for the kernels."""
        sizes = [(count, 1 << power) for power in range((self._pages - 1).bit_length() + 1) for count in self._counts]
        for params in CHOICES:
            sequence = Sequence(0, 0, [0], params, 0, frozenset(), 1, None)
            for recipe in (cut for whole in method.recipes([sequence]) for cut in cuts(whole)):
                drawn = recipe.choosing([sequence], self._model.config.vocab_size)
                for size in sizes if params in PLAIN else sizes[:1]:
                    graphs.prepare(drawn, *size)


def refuse(kernel: str, specialised_on: str) -> None:
    """What a strict engine says to a kernel that a warm-up has missed."""
    raise CompilationError(f"{kernel}: not compiled by warm_up and needed now, specialised on {specialised_on}")
