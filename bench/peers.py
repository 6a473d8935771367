"""Plain decoding against other libraries on the same weights, dtype, prompts and token counts, in pairs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from ..loaders.demo import demo_folder
from ..loaders.synthetic import write_synthetic
from ..runtime.engine import Engine
from ..runtime.request import SamplingParams
from .methods import synthetic
from .peer_loops import PLAIN, Generate, Setting, load_model, peers
from .prompts import Prompt, source
from .record import Spread

TIE = 1e-3


@dataclass(frozen=True)
class Row:
    """One prompt, run skipjack, peer, peer, skipjack; tokens per second of whole calls, prompt included."""

    peer: str
    category: str
    prompt_tokens: int
    tokens: int
    identical: bool
    tokens_per_s: float
    skipjack_tokens_per_s: float
    ratio: float


@dataclass(frozen=True)
class Agreement:
    """Greedy ids of a peer against skipjack's in float32, over all prompts.

    `tied` prompts part where transformers' own logits of the two tokens lie within 0.001 of each other: rounding
    decides there. `reason` says why a peer has no speed; None if it has one.
    """

    peer: str
    prompts: int
    identical: int
    tied: int
    reason: str | None


@dataclass(frozen=True)
class Line:
    """A peer. `ratio` is skipjack's speed ÷ the peer's: the median of the pairs, with p10 and p90.

    `identical` prompts had skipjack's ids in the measured dtype, where rounding differs between libraries.
    """

    peer: str
    unavailable: str | None
    prompts: int
    tokens: int
    identical_float32: str
    identical: int
    tokens_per_s: float
    skipjack_tokens_per_s: float
    ratio: float
    ratio_p10: float
    ratio_p90: float


@contextmanager
def folder_of(model: str) -> Generator[Path]:
    """The folder of a model, of "demo", or of a synthetic model, which is written for the purpose.

    Raises:
        RequestError: a synthetic model is not spelled so.
    """
    named = synthetic(model)
    if named is None:
        yield demo_folder() if model == "demo" else Path(model)
        return
    shape, late_scale = named
    with TemporaryDirectory(prefix="skipjack-") as parent:
        folder = Path(parent) / shape
        write_synthetic(folder, shape, 0, late_scale, "cuda" if torch.cuda.is_available() else "cpu")
        yield folder


class Contest:
    """The peers of one loaded model, readied one by one; one that breaks is noted with its reason.

    Only those whose names contain one of `only` are measured, all without any; `PLAIN` has to agree in any case.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        prompts: Sequence[Prompt],
        setting: Setting,
        count: int,
        only: Sequence[str] = (),
    ) -> None:
        self._engine, self._count, self._only = engine, count, only
        self._categories, self._prompts = [prompt.category for prompt in prompts], [_ids(engine, p) for p in prompts]
        self._model = load_model(folder, engine.dtype, engine._loaded()[0].device)
        longest = max(len(ids) for ids in self._prompts)
        makers = peers(self._model, setting, -(-(longest + count) // 64) * 64)
        self._makers = {name: make for name, make in makers.items() if name == PLAIN or self._wanted(name)}
        self._ours = [self._skipjack(ids) for ids in self._prompts]

    @property
    def names(self) -> list[str]:
        return list(self._makers)

    def agree(self, progress: Callable[[str], None]) -> list[Agreement]:
        """Every peer's ids against skipjack's."""
        found: list[Agreement] = []
        for name in self._makers:
            progress(f"float32 ids: {name}")
            run, made, reason = self._ready(name)
            identical = tied = 0
            for prompt, ours, theirs in zip(self._prompts, self._ours, made, strict=False):
                at = difference(ours, theirs)
                identical += at is None
                if at is not None and self._is_tie([*prompt, *ours[:at]], ours[at : at + 1], theirs[at : at + 1]):
                    tied += 1
                elif at is not None and reason is None:
                    reason = f"other tokens than the full model's from token {at} of a prompt on"
            del run
            found.append(Agreement(name, len(self._prompts), identical, tied, reason))
        return found

    def measure(
        self, agreements: Sequence[Agreement], progress: Callable[[str], None]
    ) -> Iterator[tuple[list[Row], Line]]:
        """Peer by peer: the speeds of those whose ids agreed; the others keep their reason."""
        for agreement in filter(lambda agreement: self._wanted(agreement.peer), agreements):
            own: list[Row] = []
            reason = agreement.reason
            if reason is None:
                progress(f"warming up: {agreement.peer}")
                run, made, reason = self._ready(agreement.peer)
                if run is not None and reason is None:
                    for number, theirs in enumerate(made):
                        progress(f"{agreement.peer}: prompt {number + 1} of {len(made)}")
                        own.append(self._pair(agreement.peer, run, number, theirs))
            yield own, _line(agreement, reason, own)

    def _wanted(self, name: str) -> bool:
        return not self._only or any(part in name for part in self._only)

    def _ready(self, name: str) -> tuple[Generate | None, list[list[int]], str | None]:
        """A peer that has generated for every prompt, longest first; or the reason why it cannot."""
        order = sorted(range(len(self._prompts)), key=lambda i: -len(self._prompts[i]))
        made: list[list[int]] = [[] for _ in order]
        try:
            torch.compiler.reset()
            run = self._makers[name]()
            for i in order:
                made[i] = run(self._prompts[i], self._count)
        except Exception as error:  # another library's: whatever it raises is why it cannot run
            return None, [], _reason(error)
        return run, made, None

    def _pair(self, name: str, run: Generate, number: int, theirs: list[int]) -> Row:
        prompt = self._prompts[number]

        def seconds(generate: Callable[[], list[int]]) -> float:
            start = perf_counter()
            generate()
            return perf_counter() - start

        first = seconds(lambda: self._skipjack(prompt))
        peer = sum(seconds(lambda: run(prompt, self._count)) for _ in range(2)) / 2
        ours = (first + seconds(lambda: self._skipjack(prompt))) / 2
        return Row(
            name,
            self._categories[number],
            len(prompt),
            len(theirs),
            theirs == self._ours[number],
            len(theirs) / peer,
            len(self._ours[number]) / ours,
            peer / ours,
        )

    def _skipjack(self, prompt: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=self._count, ignore_eos=True)
        return self._engine.generate(prompt, params, method="autoregressive").token_ids

    def _is_tie(self, context: list[int], ours: list[int], theirs: list[int]) -> bool:
        if not ours or not theirs:
            return False
        with torch.inference_mode():
            logits: Any = self._model(torch.tensor([context], device=self._model.device)).logits[0, -1].float()
        return abs(float(logits[ours[0]] - logits[theirs[0]])) < TIE


def difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place at which two lists part; None if they are equal."""
    if list(ours) == list(theirs):
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def trusted(agreements: Sequence[Agreement]) -> bool:
    """Whether transformers' plain greedy decoding says what skipjack says: without that no speed means anything."""
    return any(a.peer == PLAIN and a.reason is None for a in agreements)


def _ids(engine: Engine, prompt: Prompt) -> list[int]:
    return engine.generate(source(prompt, engine.tokenizer, engine.config), SamplingParams(max_tokens=1)).prompt_ids


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
    return text[:200] if type(error).__name__ == "Unavailable" else f"{type(error).__name__}: {text[:200]}"


def _line(agreement: Agreement, reason: str | None, rows: Sequence[Row]) -> Line:
    matched = f"{agreement.identical} of {agreement.prompts}" + (f", {agreement.tied} tied" if agreement.tied else "")
    ratio = Spread.of([row.ratio for row in rows])
    speed, ours = (
        Spread.of([getattr(row, name) for row in rows]) for name in ("tokens_per_s", "skipjack_tokens_per_s")
    )
    return Line(
        agreement.peer,
        reason,
        len(rows),
        sum(row.tokens for row in rows),
        matched,
        sum(row.identical for row in rows),
        speed.p50 if speed else 0.0,
        ours.p50 if ours else 0.0,
        ratio.p50 if ratio else 0.0,
        ratio.p10 if ratio else 0.0,
        ratio.p90 if ratio else 0.0,
    )
