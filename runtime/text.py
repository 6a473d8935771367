"""Tokens to text as they come: whole characters only, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ..loaders.tokenizer import Tokenizer


class TextStream:
    """The text of one continuation.

    `push` returns what a token makes safe to show: incomplete UTF-8 and text that could still grow into a stop string
    are held back. When a stop string is complete, `stopped` is set and the text ends just before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that is safe to show now; a stop string that is complete before it `may_stop` is plain text."""
        known = len(self._held)
        self._held += self._decoder.step(token)
        # One that was complete before this token is plain text, held back for a longer one's sake.
        places = (self._held.find(stop, max(0, known + 1 - len(stop))) for stop in self._stop)
        found = min((at for at in places if at >= 0), default=-1)
        if found >= 0 and may_stop:
            self.stopped = True
            return self._release(found, keep=False)
        return self._release(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """What was held back, when generation ended for another reason than a stop string; broken UTF-8 included."""
        if self.stopped:
            return ""
        self._held += self._decoder.finish()
        return self._release(len(self._held))

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(len(stop) > size and stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, end: int, *, keep: bool = True) -> str:
        released, rest = self._held[:end], self._held[end:]
        self._held = rest if keep else ""
        self.text += released
        return released
