"""How few tokens a text may have, told by its length: what cannot fit is refused before it is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import tokenizers
from tokenizers import models, pre_tokenizers

from .json_files import as_list, as_object
from .tokenizer_growth import parts

# Code points that a normaliser may make one of; no canonical decomposition has more than four.
_COMPOSED: Final = {
    "NFC": 4,
    "NFKC": 4,
    "NFD": 1,
    "NFKD": 1,
    "Lowercase": 1,
    "Prepend": 1,
    "ByteLevel": 1,
    "Replace": 1,
}
_CONTROL: Final = "".join(map(chr, (*range(32), 127)))
_CUTTING: Final = ("ByteLevel", "Split", "Digits", "Metaspace", "Punctuation")


@dataclass(frozen=True)
class Density:
    """A token stands for `most` characters of a text at most, not counting those that are dropped, `silent`."""

    most: int
    silent: str

    @staticmethod
    def of(backend: tokenizers.Tokenizer) -> Density | None:
        """None where there is no bound, or none that is known here.

        There is one for byte-pair encoding of bytes, after normalisers and cuts that keep everything.
        """
        silent = _silent(backend)
        if silent is None or not all(_keeps(part, silent) for part in parts(backend, "normalizer")):
            return None
        if any(
            p.get("type") not in _CUTTING or p.get("behavior") == "Removed" for p in parts(backend, "pre_tokenizer")
        ):
            return None
        if not all(_holds_text(part) for part in parts(backend, "post_processor")):
            return None
        longest = max(map(len, backend.get_vocab(with_added_tokens=False)), default=0)
        for token in backend.get_added_tokens_decoder().values():
            if token.lstrip or token.rstrip:
                return None  # They take any number of spaces with them.
            found = token.content if backend.normalizer is None else backend.normalizer.normalize_str(token.content)
            longest = max(longest, len(token.content), len(found))
        for part in parts(backend, "normalizer"):
            longest *= _COMPOSED[str(part["type"])]
        return Density(longest, silent) if longest else None

    def fewest(self, text: str) -> int:
        """Tokens that a text has at least."""
        return -(-(len(text) - sum(map(text.count, self.silent))) // self.most)


def _silent(backend: tokenizers.Tokenizer) -> str | None:
    """Characters the vocabulary has no byte of; None where that is not told by their bytes."""
    model = backend.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None  # With an affix, what has no token of its own in the middle of a word or at its end is dropped.
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if model.byte_fallback:
        return "" if all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) else None
    # Published vocabularies lack some control characters, which are then dropped without a word.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [part for field in ("normalizer", "pre_tokenizer") for part in parts(backend, field)]
    if not any(part.get("type") == "ByteLevel" for part in spelled):
        return None
    unknown = [c for c in map(chr, range(128)) if byte_level.pre_tokenize_str(c)[0][0] not in vocabulary]
    # Every other character has a byte of these.
    rest = set(byte_level.pre_tokenize_str("".join(map(chr, range(0x80, 0xC0))))[0][0])
    return "".join(unknown) if all(c in vocabulary for c in rest) else None


def _keeps(normaliser: dict[str, object], silent: str) -> bool:
    """Whether no text becomes shorter than `_COMPOSED` says, nor has more of what is dropped."""
    kind = normaliser.get("type")
    if kind != "Replace":
        # Only control characters are never what lower case or a composition makes of another.
        return kind in _COMPOSED and (kind in ("Prepend", "ByteLevel") or not silent.strip(_CONTROL))
    pattern, content = (as_object(normaliser.get("pattern")) or {}).get("String"), normaliser.get("content")
    return (
        isinstance(pattern, str)
        and isinstance(content, str)
        and len(content) >= len(pattern)
        and not set(content) & set(silent)
    )


def _holds_text(processor: dict[str, object]) -> bool:
    pieces = as_list(processor.get("single")) or []
    return processor.get("type") != "TemplateProcessing" or any("Sequence" in (as_object(p) or {}) for p in pieces)
