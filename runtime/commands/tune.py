"""`skipjack tune`: a search with its progress, and the file it ends in."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

from ..calibration import PROMPTS, read_texts
from ..engine import Engine
from ..errors import RequestError
from ..prompts import to_ids
from ..tune import tune_knapspec, tune_swift
from .report import print_json
from .terminal import answers, interrupts, progress_bar


def tune_and_save(
    engine: Engine,
    output: Path,
    method: str,
    prompts: Path | None,
    candidates: int | None,
    seconds: float,
    skip_ratio: float | None,
    window: int,
    seed: int | None,
    *,
    as_json: bool,
) -> None:
    """Search with `method` over the prompts of a file, or a few of our own, and write the best set to `output`.

    `candidates`, `skip_ratio` and `seed` are of SWIFT's search: None are 500, 0.45 and 0.

    Raises:
        RequestError: an argument is not one of its choices, or a file cannot be read or written.
    """
    if method not in ("swift", "knapspec"):
        raise RequestError(f"--method: expected swift or knapspec, got {method!r}")
    own = {"--candidates": candidates, "--skip-ratio": skip_ratio, "--seed": seed}
    given = next((option for option, value in own.items() if value is not None), None)
    if method == "knapspec" and given:
        raise RequestError(f"{given}: expected with swift only, as knapspec computes its sets, got {own[given]}")
    candidates = 500 if candidates is None else candidates
    if "," in str(output):
        raise RequestError(f"--output: expected a name without a comma, which ends a method's option, got {output}")
    if not output.parent.is_dir():
        raise RequestError(f"--output: no such folder: {output.parent}")
    if (output.exists() and not output.is_file()) or not os.access(output.parent, os.W_OK):
        raise RequestError(f"--output: expected a file that can be written, got {output}")
    if engine.tokenizer is None:
        raise RequestError(f"{engine.model_path}: expected tokenizer.json, which tune needs, found none")
    texts = PROMPTS if prompts is None else read_texts(prompts, "--prompts")
    ids = [to_ids(text, engine.tokenizer, engine.config) for text in texts]
    with progress_bar() as progress, interrupts() as stop:
        if method == "swift":
            found = tune_swift(
                engine,
                ids,
                window=window,
                skip_ratio=0.45 if skip_ratio is None else skip_ratio,
                candidates=candidates,
                seconds=seconds,
                seed=seed or 0,
                stop=stop,
                report=lambda done, best: progress("candidates", done, candidates),
            )
        else:
            found = tune_knapspec(
                engine,
                ids,
                max_tokens=4 * window,
                seconds=seconds,
                stop=stop,
                report=lambda done, best: progress("sets", done, len(ids)),
            )
    found.save(output)
    summary = {
        "output": str(output),
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
        f"{output}: score {found.score:.3f} after {found.candidates} candidates, "
        f"{kept:g} of {found.num_layers} layers kept; use it with --method {quote(f'swift:set={output}')}",
        markup=False,
    )
