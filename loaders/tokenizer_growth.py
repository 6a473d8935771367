"""How far a tokenizer.json may make a text grow, looked at before any text is given to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import tokenizers

from .errors import TokenizerError
from .json_files import as_list, as_object

MAX_GROWTH: Final = 100
MAX_ADDED_IDS: Final = 1024
_PARTS: Final = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


def check_growth(backend: tokenizers.Tokenizer, source: str) -> None:
    """Refuse replacements that multiply, one after another, and post-processors that add more ids than a prompt has.

    Raises:
        TokenizerError: text would grow more than `MAX_GROWTH` times, or by more than `MAX_ADDED_IDS` ids.
    """
    for field in ("normalizer", "decoder"):
        growth = 1.0
        for part in parts(backend, field):
            growth *= _growth(part)
        if growth > MAX_GROWTH:
            raise TokenizerError(f"{source}: {field}: expected text to grow at most {MAX_GROWTH} times, found more")
    added = sum(map(_added_ids, parts(backend, "post_processor")))
    if added > MAX_ADDED_IDS:
        raise TokenizerError(
            f"{source}: post_processor: expected at most {MAX_ADDED_IDS} ids to be added, found {added}"
        )


def parts(backend: tokenizers.Tokenizer, field: str) -> Iterator[dict[str, object]]:
    """The parts of a component in the order they work in; sequences of them are opened."""
    component: Any = getattr(backend, field)
    if component is None:
        return
    pending: list[object] = [json.loads(component.__getstate__())]
    while pending:
        part = as_object(pending.pop())
        if part is None:
            continue
        inner = as_list(part.get(_PARTS[field])) if part.get("type") == "Sequence" else None
        if inner is None:
            yield part
        else:
            pending += reversed(inner)


def _growth(part: dict[str, object]) -> float:
    """How many times longer a replacement makes what it matches; a regular expression may match nothing."""
    content = part.get("content")
    if part.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    pattern = (as_object(part.get("pattern")) or {}).get("String")
    if isinstance(pattern, str) and pattern:
        return max(1.0, len(content) / len(pattern))
    return 1.0 + len(content)


def _added_ids(part: dict[str, object]) -> int:
    """The ids that a template puts around a text."""
    tokens, added = as_object(part.get("special_tokens")) or {}, 0
    for piece in as_list(part.get("single")) or []:
        special = as_object((as_object(piece) or {}).get("SpecialToken"))
        if special is not None:
            token = as_object(tokens.get(str(special.get("id")))) or {}
            added += len(as_list(token.get("ids")) or [])
    return added
