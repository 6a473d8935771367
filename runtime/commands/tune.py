"""`skipjack tune`: a search with its progress, and the file it ends in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from ...loaders.config import ModelConfig
from ...loaders.tokenizer import Tokenizer
from ..engine import Engine
from ..errors import RequestError, TokenizerError
from ..prompts import longest, to_ids
from ..skip_sets import SkipSet
from ..tune import tune_knapspec, tune_swift
from .report import print_json
from .terminal import answers, interrupts, progress_bar


@dataclass(frozen=True)
class Tuning:
    """A search with `method` over `texts`, or token ids, whose best set goes to `output`.

    `candidates`, `skip_ratio` and `seed` are of SWIFT's search: None are 500, 0.45 and 0.

    Raises:
        RequestError: an argument is not one of its choices, or the file cannot be written.
    """

    output: Path
    method: str
    texts: Sequence[str | list[int]]
    candidates: int | None
    seconds: float
    skip_ratio: float | None
    window: int
    seed: int | None

    def __post_init__(self) -> None:
        if self.method not in ("swift", "knapspec"):
            raise RequestError(f"--method: expected swift or knapspec, got {self.method!r}")
        own = {"--candidates": self.candidates, "--skip-ratio": self.skip_ratio, "--seed": self.seed}
        given = next((option for option, value in own.items() if value is not None), None)
        if self.method == "knapspec" and given:
            raise RequestError(f"{given}: expected with swift only, as knapspec computes its sets, got {own[given]}")
        output = self.output
        if "," in str(output):
            raise RequestError(f"--output: expected a name without a comma, which ends a method's option, got {output}")
        if not output.parent.is_dir():
            raise RequestError(f"--output: no such folder: {output.parent}")
        if (output.exists() and not output.is_file()) or not os.access(output.parent, os.W_OK):
            raise RequestError(f"--output: expected a file that can be written, got {output}")

    def check(self, config: ModelConfig, tokenizer: Tokenizer | None) -> int:
        """Refuse a model without a tokenizer, and a text that it cannot take; the tokens that it will hold at once."""
        ids = self._ids(config, tokenizer)
        if self.method == "knapspec":
            return max(longest(one, 4 * self.window, config) for one in ids)
        return sum(longest(one, self.window + 1, config) for one in ids)

    def run(self, engine: Engine, *, as_json: bool) -> None:
        """Search until it ends or Ctrl-C ends it, write the best set and say what it is."""
        found = self._search(engine)
        found.save(self.output)
        summary = {
            "output": str(self.output),
            "method": found.method,
            "score": found.score,
            "candidates": found.candidates,
            "skip_attention": list(found.skip_attention),
            "skip_mlp": list(found.skip_mlp),
        }
        if as_json:
            print_json(summary)
            return
        kept = found.num_layers - (len(found.skip_attention) + len(found.skip_mlp)) / 2
        answers().print(
            f"{self.output}: score {found.score:.3f} after {found.candidates} candidates, "
            f"{kept:g} of {found.num_layers} layers kept; use it with --method {quote(f'swift:set={self.output}')}",
            markup=False,
        )

    def _search(self, engine: Engine) -> SkipSet:
        ids = self._ids(engine.config, engine.tokenizer)
        candidates = 500 if self.candidates is None else self.candidates
        with progress_bar() as progress, interrupts() as stop:
            if self.method == "knapspec":
                return tune_knapspec(
                    engine,
                    ids,
                    max_tokens=4 * self.window,
                    seconds=self.seconds,
                    stop=stop,
                    report=lambda done, best: progress("sets", done, len(ids)),
                )
            return tune_swift(
                engine,
                ids,
                window=self.window,
                skip_ratio=0.45 if self.skip_ratio is None else self.skip_ratio,
                candidates=candidates,
                seconds=self.seconds,
                seed=self.seed or 0,
                stop=stop,
                report=lambda done, best: progress("candidates", done, candidates),
            )

    def _ids(self, config: ModelConfig, tokenizer: Tokenizer | None) -> list[list[int]]:
        if tokenizer is None:
            raise TokenizerError("MODEL: expected a folder with tokenizer.json, which tune needs, found none")
        found: list[list[int]] = []
        for number, text in enumerate(self.texts, start=1):
            try:
                found.append(to_ids(text, tokenizer, config))
            except RequestError as error:
                raise RequestError(f"--prompts: text {number}: {str(error).removeprefix('prompt: ')}") from None
        return found
