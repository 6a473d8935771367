"""Chat templates: found in a model folder, compiled once, rendered within limits."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import jinja2

from .errors import TokenizerError
from .json_files import as_list, as_object, present, read_bytes, read_object, shown
from .sandbox import BoundedEnvironment

MAX_TEMPLATE_BYTES: Final = 64 * 1024
MAX_SETTINGS_BYTES: Final = 8_000_000
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A Jinja chat template and the special tokens that it may name. `source` names its file in errors."""

    def __init__(self, template: str, source: str, special_tokens: Mapping[str, str]) -> None:
        size = len(template.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"{source}: chat template: expected at most {MAX_TEMPLATE_BYTES} bytes, found {size}")
        self._template = template
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._compiled: jinja2.Template | None = None
        self._environment = BoundedEnvironment()
        self._lock = threading.Lock()

    @staticmethod
    def load(folder: Path) -> ChatTemplate | None:
        """The template of chat_template.jinja, else of tokenizer_config.json; None where neither gives one, or many
        and none of them is named "default".

        Raises:
            TokenizerError: a file is malformed or the template is too long.
        """
        settings_path = folder / "tokenizer_config.json"
        settings: dict[str, object] = {}
        if present(settings_path, TokenizerError):
            settings = read_object(settings_path, MAX_SETTINGS_BYTES, TokenizerError)
        special_tokens = _special_tokens(settings, str(settings_path))
        map_path = folder / "special_tokens_map.json"
        # Until transformers 4.34 tokens were named there; settings with "added_tokens_decoder" are newer, and name all.
        if "added_tokens_decoder" not in settings and present(map_path, TokenizerError):
            named = read_object(map_path, MAX_SETTINGS_BYTES, TokenizerError)
            special_tokens |= _special_tokens(named, str(map_path))
        template_path = folder / "chat_template.jinja"
        if present(template_path, TokenizerError):
            content = read_bytes(template_path, MAX_TEMPLATE_BYTES, TokenizerError)
            try:
                return ChatTemplate(content.decode("utf-8"), str(template_path), special_tokens)
            except UnicodeDecodeError:
                raise TokenizerError(f"{template_path}: expected UTF-8, found other bytes") from None
        template = _chosen(settings.get("chat_template"), str(settings_path))
        return None if template is None else ChatTemplate(template, str(settings_path), special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The prompt text of a chat.

        Raises:
            TokenizerError: the template is malformed, refuses the chat, or exceeds its time or output.
        """
        with self._lock:
            try:
                if self._compiled is None:
                    self._compiled = self._environment.compiled(self._template)
                self._environment.start(sum(len(value) for message in messages for value in message.values()))
                return self._compiled.render(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
            except TimeoutError:
                raise  # No template's: that of a signal's handler, a deadline.
            # Whatever a template from a stranger makes Jinja or Python's compiler raise is the template's fault.
            except Exception as problem:
                reason = " ".join(str(problem).split())[:300]
                raise TokenizerError(f"{self._source}: chat template: {reason or type(problem).__name__}") from problem


def checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages as plain dictionaries of `role` and `content`.

    Raises:
        TokenizerError: no messages, or one without a role and a content, or with a field that is no string; a field
        that is None counts as absent.
    """
    entries = _as_sequence(messages)
    if not entries:
        raise TokenizerError(f"messages: expected a non-empty list, found {shown(messages)}")
    checked: list[dict[str, str]] = []
    for number, message in enumerate(entries):
        if not isinstance(message, Mapping):
            raise TokenizerError(f"messages[{number}]: expected an object, found {shown(message)}")
        fields = cast("Mapping[str, object]", message)
        given = {name: value for name, value in fields.items() if value is not None}
        for name, value in ({"role": None, "content": None} | given).items():
            if not isinstance(value, str):
                raise TokenizerError(f"messages[{number}].{name}: expected a string, found {shown(value)}")
        checked.append({str(name): cast("str", value) for name, value in given.items()})
    return checked


def _as_sequence(value: object) -> Sequence[object] | None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return None
    return cast("Sequence[object]", value)


def _special_tokens(settings: Mapping[str, object], source: str) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = settings.get(name)
        entry = as_object(value)
        if entry is not None:
            value = entry.get("content")
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"{source}: {name}: expected a string, found {shown(value)}")
        if value is not None:
            tokens[name] = value
    return tokens


def _chosen(value: object, source: str) -> str | None:
    """A template, or the one named "default" of a list of named ones, None where none is."""
    if value is None or isinstance(value, str):
        return value
    named: dict[str, str] = {}
    for entry in as_list(value) or [value]:
        fields = as_object(entry) or {}
        name, template = fields.get("name"), fields.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise TokenizerError(
                f"{source}: chat_template: expected a string or a list of name and template, found {shown(value)}"
            )
        named[name] = template
    return named.get("default")
