"""Prompts by category: the packaged ones, or a JSON-lines file with the fields category and turns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..loaders.config import ModelConfig
from ..loaders.tokenizer import Tokenizer
from ..runtime.calibration import read_lines
from ..runtime.errors import RequestError
from ..runtime.prompts import Prompt as Source


@dataclass(frozen=True)
class Prompt:
    """The first turn of a conversation."""

    category: str
    text: str


def load(path: Path | None, per_category: int) -> list[Prompt]:
    """The first `per_category` prompts of each category, in the file's order."""
    source = path or Path(__file__).with_name("prompts.jsonl")
    chosen: list[Prompt] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(read_lines(source, "--prompts"), start=1):
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


def source(prompt: Prompt, tokenizer: Tokenizer | None, config: ModelConfig) -> Source:
    """What to send: a chat message; to a model without a tokenizer, up to 32 token ids made of the prompt's bytes."""
    if tokenizer is not None:
        return [{"role": "user", "content": prompt.text}]
    return [3 + byte % (config.vocab_size - 3) for byte in prompt.text.encode()[:32]]
