"""The options bench commands share, and what they mean."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..runtime.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from ..loaders.config import ModelConfig
    from ..loaders.tokenizer import Tokenizer
    from ..runtime.prompts import Check
    from .prompts import Prompt

Model = Annotated[str, typer.Argument(metavar="MODEL", help='A model folder, "demo", or synthetic:SHAPE[:LATE_SCALE].')]
Methods = Annotated[list[str] | None, typer.Option("--method", metavar="NAME[:key=value,…]", help="Repeatable.")]
Prompts = Annotated[
    Path | None, typer.Option(envvar="SKIPJACK_PROMPTS", help="JSON lines with category and turns; default: our own.")
]
PerCategory = Annotated[int, typer.Option(min=1, help="Prompts taken of each category.")]
Category = Annotated[list[str] | None, typer.Option(help="Only this category; repeatable.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Tokens generated for each prompt.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
CacheTokens = Annotated[
    int | None,
    typer.Option(help="Tokens the KV cache holds.", show_default="a context, or 16 times 2048, as memory allows"),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy; above, tokens are drawn with seed 0.")]


def writable(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A file that can be written, with the folders above it: asked before anything is measured.

    Raises:
        RequestError: it cannot.
    """
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RequestError(f"{param.opts[0]}: cannot write {path}: {problem.strerror}") from None
    places = [path] if path.exists() and not path.is_file() else [path.parent, *([path] if path.exists() else [])]
    if path.is_dir() or not all(os.access(place, os.W_OK) for place in places):
        raise RequestError(f"{param.opts[0]}: cannot write {path}: expected a file that may be written")
    return path


def drawable(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A picture that can be drawn and written, as `writable`.

    Raises:
        RequestError: the file cannot be written.
        SkipjackError: its name ends otherwise than a picture's, or matplotlib is not installed.
    """
    if path is not None and writable(param, path):
        from .charts import kind_of, pyplot_svg

        kind_of(path)
        pyplot_svg()
    return path


Output = Annotated[Path | None, typer.Option(help="Write the result as JSON here.", callback=writable)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def chosen(path: Path | None, per_category: int, categories: Sequence[str] | None = None) -> list[Prompt]:
    """Prompts of a file or our own, so many of each of these categories.

    Raises:
        ConfigError: there are none.
    """
    from .prompts import load

    prompts = [p for p in load(path, per_category) if not categories or p.category in categories]
    if not prompts:
        raise ConfigError(f"--category: expected categories of the prompts, got {', '.join(categories or [])}")
    return prompts


def able(methods: Sequence[str], prompts: Sequence[Prompt] = (), max_tokens: int = 1) -> Check:
    """What refuses methods that a model cannot run, and prompts it has no room for, before its weights are read.

    The cache has to hold the longest with `max_tokens` more.

    Raises:
        RequestError: there is no such method or option, or the method is one that an engine must be loaded with.
    """
    from ..runtime.methods import registry
    from ..runtime.prompts import longest, to_ids
    from .prompts import source

    specs = [registry.parse(method) for method in methods]
    if edits := next((spec.name for spec in specs if spec.edits), None):
        raise RequestError(f"--method: expected methods that share an engine, got {edits}, which edits the weights")

    def check(config: ModelConfig, tokenizer: Tokenizer | None) -> int | None:
        needed: int | None = None
        for spec in specs:
            spec.build(config)
        for prompt in prompts:
            try:
                ids = to_ids(source(prompt, tokenizer, config), tokenizer, config)
            except RequestError as error:
                told = str(error).removeprefix("prompt: ")
                raise RequestError(f"--prompts: a prompt of category {prompt.category}: {told}") from None
            needed = max(needed or 0, longest(ids, max_tokens, config))
        return needed

    return check


def notes() -> Callable[[str], None]:
    """Progress on standard error: one line that changes on a terminal, elsewhere a line each."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def note(text: str) -> None:
        end = "\r" if sys.stderr.isatty() else "\n"
        console.print(f"{text:<78}" if end == "\r" else text, end=end, markup=False)

    return note


def alarm(text: str) -> None:
    """Why there is no result, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="bold red", markup=False)


def counted(note: Callable[[str], None], total: int, every: int = 1) -> Callable[[object], None]:
    """Notes how many of `total` rows there are by now, on no terminal every so many of them."""
    numbers = count(1)

    def progress(_: object) -> None:
        done = next(numbers)
        if sys.stderr.isatty() or done % every == 0:
            note(f"{done} of {total}")

    return progress
