"""Text to judge layers by: a file's, our own, or drawn token ids where a model has no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..kernels.host import ints
from ..loaders.config import ModelConfig
from ..loaders.json_files import shown
from .errors import RequestError

PROMPTS = (
    "The lighthouse keeper wrote in his diary every evening. On the night of the great storm he noted that",
    "Question: Why do leaves change their colour in autumn?\nAnswer:",
    "def moving_average(values, size):\n    ",
    "Summarise the following paragraph. Bees live in colonies of many thousands; each has its task, and",
)
TEXTS = (
    "The lighthouse keeper wrote in his diary every evening. On the night of the great storm he noted that the "
    "lamp had burned without a flicker, although the wind had torn two slates from the roof and the sea had come "
    "up as far as the garden wall. In the morning he walked along the beach, found a broken oar and a barrel of "
    "salt, and carried both home before breakfast.",
    "Question: Why do leaves change their colour in autumn?\nAnswer: In summer the green of chlorophyll hides the "
    "other pigments of a leaf. When the days become shorter and cooler, a tree stops making chlorophyll and draws "
    "what is of use back into its branches. The yellow and orange carotenoids that were there all along become "
    "visible, and some trees make red anthocyanins as well.",
    "def moving_average(values, size):\n    if size < 1:\n        raise ValueError('size must be at least 1')\n    "
    "total, means = 0.0, []\n    for i, value in enumerate(values):\n        total += value\n        if i >= "
    "size:\n            total -= values[i - size]\n        if i >= size - 1:\n            means.append(total / "
    "size)\n    return means\n",
    "A train leaves the station at nine o'clock and covers 180 kilometres in two hours. A second train leaves an "
    "hour later and needs an hour and a half for the same way. The first is at 90 kilometres per hour, the second "
    "at 120, so the second gains 30 kilometres in every hour. It starts 90 kilometres behind and would catch up "
    "after three hours.",
    "Bees live in colonies of many thousands; each has its task, and the task changes with age. Young workers "
    "clean the cells and feed the larvae, older ones build the comb and guard the entrance, and only the oldest "
    "fly out to gather nectar, pollen and water. The parliament of the small republic met twice a year to vote on "
    "taxes, roads and schools.",
)
Encode: TypeAlias = Callable[[str], list[int]]
_DRAWN_TEXTS, _DRAWN_TOKENS = 5, 64


def read_lines(path: Path, option: str) -> list[str]:
    """The lines of a file, without a byte-order mark.

    Raises:
        RequestError: the file cannot be read or is not UTF-8; `option` is named.
    """
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{option}: {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"{option}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_texts(path: Path, option: str) -> list[str | list[int]]:
    """One text a line: plain, a JSON object with `turns`, of which the first counts, or a JSON list of token ids.

    Raises:
        RequestError: the file cannot be read or holds no text; `option` is named.
    """
    texts: list[str | list[int]] = []
    for number, line in enumerate(read_lines(path, option), start=1):
        try:
            texts += [_text(line)] if line.strip() else []
        except (ValueError, KeyError, IndexError, TypeError) as error:
            expected = "a text, an object with turns, or a list of token ids"
            raise RequestError(f"{option}: {path}, line {number}: expected {expected}, found {shown(line)}") from error
    if not texts:
        raise RequestError(f"{option}: {path}: expected at least one text, found none")
    return texts


@dataclass(frozen=True)
class Calibration:
    """The texts of a file, or our own where there is none: what layers are judged by. `source` is told in errors."""

    texts: Sequence[str | list[int]] | None
    source: str

    @staticmethod
    def read(file: str, option: str) -> Calibration:
        """Those of `file`, or our own where that is empty; RequestError as `read_texts`."""
        return Calibration(read_texts(Path(file), option) if file else None, f"{option}: {file}")

    def ids(self, config: ModelConfig, encode: Encode | None) -> list[list[int]]:
        """Token ids of every text. A model without a tokenizer (`encode`) gets ids drawn with seed 0, or those listed.

        Raises:
            RequestError: there is text and the model has no tokenizer, ids the model does not have, or no token at all.
        """
        if self.texts is None and encode is None:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(config.vocab_size, (_DRAWN_TEXTS, _DRAWN_TOKENS), generator=generator)
            return [ints(text) for text in drawn]
        found: list[list[int]] = []
        for text in TEXTS if self.texts is None else self.texts:
            if isinstance(text, list):
                found.append(text)
            elif encode is not None:
                found.append(encode(text))
            else:
                raise RequestError(
                    f"{self.source}: expected lists of token ids, as the model has no tokenizer, got text"
                )
            wrong = next((token for token in found[-1] if not 0 <= token < config.vocab_size), None)
            if wrong is not None:
                raise RequestError(f"{self.source}: token {wrong} is outside the vocabulary of {config.vocab_size}")
        if not any(found):
            raise RequestError(f"{self.source}: expected a token, found none")
        return found


def _text(line: str) -> str | list[int]:
    if line.startswith("{"):
        return str(json.loads(line)["turns"][0])
    if not line.startswith("["):
        return line
    try:
        ids: Any = json.loads(line)
    except ValueError:
        return line
    return [int(token) for token in ids]
