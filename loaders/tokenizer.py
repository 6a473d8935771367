"""Tokenizer: text to ids and back, streams, and chats, from the files of a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import tokenizers

from .chat_template import ChatTemplate, checked_messages
from .config import ModelConfig
from .errors import TokenizerError
from .json_files import present, read_bytes
from .tokenizer_density import Density
from .tokenizer_growth import check_growth

MAX_TOKENIZER_BYTES: Final = 64_000_000
_UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"
_CHARACTER_BYTES: Final = 4
# About ten milliseconds' worth.
_LONG_CHARACTERS: Final = 10_000

# By the tokenizers library, and by what makes its arguments of Python's.
_RAISED: Final = (Exception, ValueError, TypeError, OverflowError, UnicodeEncodeError)

_T = TypeVar("_T")


class Tokenizer:
    """A tokenizer.json, with the chat template that lies beside it. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str, max_ids: int, template: ChatTemplate | None) -> None:
        self._backend = backend
        self._source = source
        self._max_ids = max_ids
        self._template = template
        self._density = Density.of(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(token for token, entry in added.items() if entry.special)

    @staticmethod
    def load(folder: Path, config: ModelConfig) -> Tokenizer | None:
        """The tokenizer of a model folder; None where there is no tokenizer.json.

        Raises:
            TokenizerError: a file is malformed, the tokenizer has ids that the model does not, or a text may grow in it
            beyond measure.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not present(path, TokenizerError):
            return None
        content = read_bytes(path, MAX_TOKENIZER_BYTES, TokenizerError)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise TokenizerError(f"{path}: expected UTF-8, found byte {problem.start} that is not") from None
        backend = _guarded(f"{path}: expected a tokenizer", lambda: tokenizers.Tokenizer.from_str(text))
        # A tokenizer.json may ask for prompts to be cut or padded; neither may happen unseen.
        backend.no_truncation()
        backend.no_padding()
        check_growth(backend, str(path))
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= config.vocab_size:
            raise TokenizerError(
                f"{path}: vocab: expected ids below vocab_size {config.vocab_size} of config.json, found {highest}"
            )
        return Tokenizer(backend, str(path), config.vocab_size, ChatTemplate.load(folder))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer's post-processor adds.

        Raises:
            TokenizerError: the text is not valid Unicode, or the tokenizer fails on it.
        """
        ids = _guarded(
            f"{self._source}: cannot encode",
            lambda: self._encoding(text, add_special_tokens).ids,
        )
        if ids and max(ids) >= self._max_ids:
            raise TokenizerError(f"{self._source}: expected ids below vocab_size {self._max_ids}, found {max(ids)}")
        return ids

    def fewest_tokens(self, text: str) -> int:
        """How many tokens a text has at least, told by its length alone; 0 where that tells nothing."""
        return self._density.fewest(text) if self._density else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is negative or too large.
        """
        return self._decode(list(ids))

    def token_text(self, token: int) -> str:
        """What one token adds to a text, special tokens written out; bytes that are no whole character become U+FFFD.

        Raises:
            TokenizerError: the id is negative or too large.
        """
        # Twice, for a decoder may drop the space that a text begins with.
        once, twice = (self._decode([token] * times, special=True) for times in (1, 2))
        return twice[len(once) :]

    def stream(self) -> TokenStream:
        """A decoder that takes one id at a time."""
        return TokenStream(self._decode, self._silent)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat by the model's template, which writes the special tokens itself.

        Every message has a `role` and a `content`.

        Raises:
            TokenizerError: there is no template, the messages are malformed, or the template fails or exceeds limits.
        """
        entries = checked_messages(messages)
        if self._template is None:
            raise TokenizerError(
                f"{self._source}: expected a chat template in chat_template.jinja or tokenizer_config.json "
                "(named 'default' if it has several), found none"
            )
        return self._template.render(entries, add_generation_prompt)

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        if len(text) < _LONG_CHARACTERS:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        # Of one text, but unlike `encode` it lets other threads of Python run.
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def _silent(self, token: int) -> bool:
        """Whether `decode` leaves an id out: a special token, or one that the tokenizer does not have."""
        return token in self.special_ids or self._backend.id_to_token(token) is None

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        decoded = partial(self._backend.decode, ids, skip_special_tokens=not special)
        return _guarded(f"{self._source}: cannot decode", decoded)


class TokenStream:
    """Text as tokens arrive. What `step` and `finish` return adds up to what `decode` says of all the ids.

    Not where a decoder with byte fallback (Llama 2's) takes a whole run of bytes for broken because its end is: what
    is out by then stays, such as a line break before half of a character.
    """

    def __init__(self, decode: Callable[[list[int]], str], silent: Callable[[int], bool]) -> None:
        self._decode, self._silent = decode, silent
        # Ids whose text is out, kept because a decoder may treat the first id of a text differently; then new ids.
        self._context: list[int] = []
        self._pending: list[int] = []
        # How much of the text of both is out.
        self._start = 0

    def step(self, token: int) -> str:
        """The text that this token completes; empty while it ends within a UTF-8 character."""
        if self._silent(token):
            return ""
        self._pending.append(token)
        text, start = self._decode(self._context + self._pending), self._start
        complete = text.rstrip(_UNFINISHED)
        if len(complete) < len(text):
            if len(self._pending) > 2 * _CHARACTER_BYTES and (end := self._cut(text)) is not None:
                return text[start:end]
            self._start = max(len(complete), start)
            return complete[start:]
        if text[start:]:
            self._advance()
        return text[start:]

    def finish(self) -> str:
        """What is held back at the end of the text: characters that never became whole, as U+FFFD."""
        text, start = self._decode(self._context + self._pending), self._start
        self._advance()
        return text[start:]

    def _cut(self, text: str) -> int | None:
        """Let go of ids whose text cannot change any more, and say where in `text` it ends; None where there are none.

        A character lies across three ends of ids at most. Of the ids before it, some that are no UTF-8 stay as context:
        a decoder may take a whole run of bytes for broken.
        """
        for ids in range(1, _CHARACTER_BYTES + 1):
            head, tail = self._pending[:-ids], self._pending[-ids:]
            context = head[-_CHARACTER_BYTES:]
            before, after = self._decode(context), self._decode(tail)
            whole = self._decode(self._context + head) + after == text
            if whole and before.endswith(_UNFINISHED) and self._decode(context + tail) == before + after:
                end = len(text) - len(after)
                self._context, self._pending, self._start = context, tail, len(before) + max(0, self._start - end)
                return end
        return None

    def _advance(self) -> None:
        self._context, self._pending = self._pending, []
        self._start = len(self._decode(self._context))


def _guarded(what: str, operation: Callable[[], _T]) -> _T:
    """Run a call into the tokenizers library; what the handler of a signal raises meanwhile is let through."""
    try:
        return operation()
    except BaseException as problem:
        # Its panics are no `Exception`.
        if type(problem) not in _RAISED and type(problem).__name__ != "PanicException":
            raise
        reason = " ".join(str(problem).split())[:200]
        raise TokenizerError(f"{what}, found: {reason}") from problem
