"""What clients send: OpenAI's bodies, and vLLM's names for what those lack. A field that is null was not given."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, model_validator

from ..errors import RequestError
from ..prompts import Prompt
from ..request import SamplingParams

MAX_CHOICES = 256
# OpenAI's own defaults, where the engine has others.
TEMPERATURE, COMPLETION_TOKENS = 1.0, 16

_T = TypeVar("_T")
MAX_ITEMS = 2**14
# Of a million mistakes the first is told: to collect them all takes gigabytes.
Several = Annotated[list[_T], Field(fail_fast=True, max_length=MAX_ITEMS)]


class Strict(BaseModel):
    """What is not known is refused, and nothing becomes another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        """Without what is null, and with one unknown field at most, to be refused."""
        if not isinstance(value, dict):
            return value
        given = {name: field for name, field in cast("dict[Any, object]", value).items() if field is not None}
        unknown = (name for name in given if name not in cls.model_fields)
        if (first := next(unknown, None)) is None:
            return given
        return {name: field for name, field in given.items() if name in cls.model_fields or name == first}


class StreamOptions(Strict):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(Strict):
    """What both kinds of completion have in common."""

    model: str | None = None
    method: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Several[str] | None = None
    stop_token_ids: Several[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    # SamplingParams checks the numbers, up to the first mistake.
    logit_bias: dict[str, SkipValidation[float]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    # They change nothing in an answer.
    user: str | None = None
    metadata: dict[str, SkipValidation[Any]] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _params(self, most: int, logprobs: int | None) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: expected none without stream")
        values: dict[str, Any] = {"temperature": TEMPERATURE, "max_tokens": most, "logprobs": logprobs}
        values |= {name: value for name in COPIED if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            # OpenAI's are signed.
            values["seed"] = self.seed % 2**64
        values["logit_bias"] = {_token(name): value for name, value in (self.logit_bias or {}).items()}
        return SamplingParams(**values)


# Fields that are the engine's own by name and meaning.
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
CHOOSING = ("temperature", "top_p", "top_k", "min_p", "n")
ENDING = ("min_tokens", "stop", "stop_token_ids", "ignore_eos")
COPIED = (*PENALTIES, *CHOOSING, *ENDING)


class CompletionBody(Body):
    """A text, token ids, or a list of either, to be continued."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None

    def prompts(self) -> list[Prompt]:
        """The prompts, one or several.

        Raises:
            RequestError: there is none, or one is neither text nor a list.
        """
        alone = isinstance(self.prompt, str) or (self.prompt != [] and isinstance(self.prompt[0], int))
        prompts = cast("list[object]", [self.prompt] if alone else self.prompt)
        if not prompts:
            raise RequestError("prompt: expected at least one, got none")
        wrong = next((number for number, prompt in enumerate(prompts) if not _is_prompt(prompt)), None)
        if wrong is not None:
            raise RequestError(f"prompt[{wrong}]: expected text or token ids")
        if len(prompts) * (self.n or 1) > MAX_CHOICES:
            raise RequestError(f"prompt: expected at most {MAX_CHOICES} choices, got {len(prompts)} prompts times n")
        return cast("list[Prompt]", prompts)

    def params(self) -> SamplingParams:
        """How to choose tokens.

        Raises:
            RequestError: a value is out of range.
        """
        if self.best_of not in (None, self.n or 1):
            raise RequestError(f"best_of: expected n, {self.n or 1}, got {self.best_of}")
        return self._params(COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """What one side of a conversation has said."""

    role: str
    content: str | Several[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As the model's template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class TextFormat(Strict):
    """What an answer is."""

    type: Literal["text"]


class ChatBody(Body):
    """A conversation to be answered."""

    messages: Several[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    # What clients send who want nothing but text.
    modalities: Several[Literal["text"]] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def prompts(self) -> list[Prompt]:
        """The conversation."""
        if not self.messages:
            raise RequestError("messages: expected at least one, got none")
        return [[message.plain() for message in self.messages]]

    def params(self, most: int) -> SamplingParams:
        """How to choose tokens, at most `most` unless the body says.

        Raises:
            RequestError: a value is out of range, or two fields contradict each other.
        """
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens: expected it to equal max_completion_tokens, its newer name")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: expected none without logprobs")
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(most if asked is None else asked, (self.top_logprobs or 0) if self.logprobs else None)


def _is_prompt(prompt: object) -> bool:
    ids = cast("list[object]", prompt) if isinstance(prompt, list) else None
    return isinstance(prompt, str) if ids is None else all(type(token) is int for token in ids)


def _token(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 20):
        raise RequestError(f"logit_bias: expected token ids, got {name!r}")
    return int(name)
