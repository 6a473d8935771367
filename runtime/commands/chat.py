"""A conversation on the terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import SkipjackError, TokenizerError
from ..prompts import request_check
from .terminal import interrupts, notes, visible, write

if TYPE_CHECKING:
    from ...loaders.config import ModelConfig
    from ...loaders.tokenizer import Tokenizer
    from ..engine import Engine
    from ..prompts import Check
    from ..request import SamplingParams

LEAVE = "/exit"
RESET = "/reset"


def chat_check(system: str | None, params: SamplingParams) -> Check:
    """What refuses a conversation before its first message: a model without chats, instructions it cannot take."""
    short = request_check([*_opening(system), {"role": "user", "content": "Hello"}], params)

    def check(config: ModelConfig, tokenizer: Tokenizer | None) -> int | None:
        if tokenizer is None:
            raise TokenizerError("MODEL: expected a folder with tokenizer.json, which chat needs, found none")
        return short(config, tokenizer)

    return check


class Chat:
    """A conversation that remembers what was said.

    A line is a message; `/reset` forgets everything but the system message, `/exit` or the end of input leaves. Ctrl-C
    ends an answer early and keeps what was written of it. A message that cannot be answered is told and forgotten.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        self.engine = engine
        self.params = params
        self.opening = _opening(system)
        self.messages = list(self.opening)
        self.asked, self.all_answered = 0, True
        self.interactive = sys.stdin.isatty()
        self.notes = notes()
        if self.interactive:
            with contextlib.suppress(ImportError):
                import_module("readline")  # gives `input` line editing

    def run(self) -> bool:
        """Read, answer, repeat until the user leaves; whether every message of a pipe was answered."""
        if self.interactive:
            self.notes.print(f"{RESET} starts over, {LEAVE} or Ctrl-D leaves, Ctrl-C stops an answer", style="dim")
        while (line := self._read()) is not None:
            message = line.strip()
            if message == LEAVE:
                break
            if message == RESET:
                self.messages = list(self.opening)
            elif message:
                self._turn(message)
        return self.interactive or self.all_answered

    def _read(self) -> str | None:
        if not self.interactive:
            return sys.stdin.readline() or None
        try:
            if sys.stdout.isatty():
                return input("> ")
            sys.stderr.write("> ")
            sys.stderr.flush()
            return sys.stdin.readline() or None
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            return ""

    def _turn(self, message: str) -> None:
        self.messages.append({"role": "user", "content": message})
        self.asked += 1
        try:
            answer, stopped = self._answer()
        except SkipjackError as error:
            self.messages.pop()
            self.all_answered = False
            where = "" if self.interactive else f"message {self.asked}: "
            self.notes.print(f"error: {where}{visible(' '.join(str(error).split()))}", style="red", markup=False)
            return
        if stopped and not self.interactive:
            raise KeyboardInterrupt
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def _answer(self) -> tuple[str, bool]:
        parts: list[str] = []
        stopped = False
        with interrupts() as pressed:
            stream = self.engine.stream(self.messages, self.params)
            for chunk in stream:
                parts.append(chunk.text)
                write(chunk.text)
                if stopped := pressed():
                    stream.close()
                    break
        write("\n")
        return "".join(parts), stopped


def _opening(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []
