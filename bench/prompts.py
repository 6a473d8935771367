"""Prompts by category: the packaged ones, or a JSON-lines file with the fields category and turns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.prompts import Prompt as Source


@dataclass(frozen=True)
class Prompt:
    """The first turn of a conversation."""

    category: str
    text: str


def load(path: Path | None, per_category: int) -> list[Prompt]:
    """The first `per_category` prompts of each category, in the file's order."""
    source = path if path is not None else files("skipjack.bench") / "prompts.jsonl"
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise RequestError(f"--prompts: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompts: {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    chosen: list[Prompt] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt = Prompt(str(fields["category"]), str(fields["turns"][0]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RequestError(f"{source}, line {number}: expected an object with category and turns") from error
        if taken.get(prompt.category, 0) < per_category:
            taken[prompt.category] = taken.get(prompt.category, 0) + 1
            chosen.append(prompt)
    if not chosen:
        raise RequestError(f"--prompts: no prompts in {path}")
    return chosen


def source(prompt: Prompt, engine: Engine) -> Source:
    """What to send: a chat message; to a model without a tokenizer, up to 32 token ids made of the prompt's bytes."""
    if engine.tokenizer is not None:
        return [{"role": "user", "content": prompt.text}]
    return [3 + byte % (engine.config.vocab_size - 3) for byte in prompt.text.encode()[:32]]


def question(engine: Engine, prompt: Prompt, number: int) -> Source:
    """What to generate from: the prompt as a user's message, or token ids drawn with seed `number` for a model without
    a tokenizer.
    """
    if engine.tokenizer is not None:
        return [{"role": "user", "content": prompt.text}]
    generator = torch.Generator().manual_seed(number)
    return [int(i) for i in torch.randint(3, engine.config.vocab_size, (32,), generator=generator)]
