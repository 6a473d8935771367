"""What a caller may pass as a prompt, turned into token ids and checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias, cast

import numpy as np

from ..loaders.config import ModelConfig
from ..loaders.tokenizer import Tokenizer
from .errors import RequestError
from .request import SamplingParams, check_unicode

Message: TypeAlias = Mapping[str, str]
TokenIds: TypeAlias = "Sequence[int] | np.ndarray[Any, Any]"
Prompt: TypeAlias = "str | TokenIds | Sequence[Message]"
Prompts: TypeAlias = "Sequence[Prompt]"
# What refuses to load a model, and tells how many tokens the cache will have to hold at once, or None.
Check: TypeAlias = "Callable[[ModelConfig, Tokenizer | None], int | None]"


def is_many(prompt: Prompt | Prompts) -> bool:
    """Whether this is a list of prompts rather than one: one is a string, ids or a list of messages."""
    return (
        isinstance(cast(object, prompt), Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and not isinstance(prompt[0], (Integral, Mapping))
    )


def is_written(prompt: Sequence[object]) -> bool:
    """Whether one prompt is text or chat messages, which are still to be encoded."""
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))


def to_ids(prompt: Prompt, tokenizer: Tokenizer | None, config: ModelConfig) -> list[int]:
    """Token ids of one prompt.

    Raises:
        RequestError: it is empty, has an id outside the vocabulary, is text without a tokenizer or no valid Unicode,
        or fills the context.
    """
    if isinstance(prompt, np.ndarray):
        prompt = cast("list[int]", prompt.tolist())
    if not isinstance(cast(object, prompt), Sequence) or isinstance(cast(object, prompt), (bytes, bytearray)):
        raise RequestError(f"prompt: expected text, token ids or chat messages, got {type(prompt).__name__}")
    if is_written(prompt):
        if tokenizer is None:
            raise RequestError("prompt: this model folder has no tokenizer.json: pass token ids")
        text = _text(prompt) if isinstance(prompt, str) else tokenizer.render(_messages(prompt))
        # To encode megabytes takes seconds, and most of that for nothing.
        if (fewest := tokenizer.fewest_tokens(text)) >= config.max_context:
            raise RequestError(
                f"prompt: {len(text)} characters are at least {fewest} tokens, which leave no room in the model's "
                f"context of {config.max_context}"
            )
        ids = tokenizer.encode(text, add_special_tokens=isinstance(prompt, str))
        _check_room(len(ids), config)
        return ids
    _check_room(len(prompt), config)
    return checked_ids("prompt", prompt, config.vocab_size)


def longest(ids: list[int], max_tokens: int, config: ModelConfig) -> int:
    """Tokens of a sequence when it has grown as far as it may."""
    return min(config.max_context, len(ids) + max_tokens)


def _check_room(tokens: int, config: ModelConfig) -> None:
    if not tokens:
        raise RequestError("prompt: expected at least one token, got none")
    if tokens >= config.max_context:
        raise RequestError(f"prompt: {tokens} tokens leave no room in the model's context of {config.max_context}")


def check_params(params: SamplingParams, tokenizer: Tokenizer | None, config: ModelConfig) -> None:
    """Refuse sampling parameters that name tokens or text this model does not have, and what are none."""
    if not isinstance(cast(object, params), SamplingParams):
        raise RequestError(f"params: expected SamplingParams, got {type(params).__name__}")
    if params.logprobs is not None and params.logprobs > config.vocab_size:
        raise RequestError(f"logprobs: {params.logprobs} are more than the vocabulary of {config.vocab_size}")
    if params.stop and tokenizer is None:
        raise RequestError("stop: this model folder has no tokenizer.json, so stop strings cannot be found")
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", list(params.logit_bias))):
        outside = [token for token in ids if token >= config.vocab_size]
        if outside:
            raise RequestError(f"{name}: token {outside[0]} is outside the vocabulary of {config.vocab_size}")


def request_check(prompt: Prompt, params: SamplingParams) -> Check:
    """What refuses a request that a model cannot serve, by all that can be known without its weights."""

    def check(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
        check_params(params, tokenizer, config)
        return longest(to_ids(prompt, tokenizer, config), params.max_tokens, config)

    return check


def checked_ids(name: str, ids: object, vocab_size: int) -> list[int]:
    """Token ids as a list of Python's integers; RequestError, which starts with `name`, where they are none."""
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes, bytearray)) or not isinstance(ids, Sequence):
        raise RequestError(f"{name}: expected token ids, got {'text' if isinstance(ids, str) else type(ids).__name__}")
    checked: list[int] = []
    for i, token in enumerate(cast("Sequence[object]", ids)):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"{name}: expected a token id at place {i}, got {token!r}")
        if not 0 <= int(token) < vocab_size:
            raise RequestError(f"{name}: token {token} at place {i} is outside the vocabulary of {vocab_size}")
        checked.append(int(token))
    return checked


def _text(text: str) -> str:
    check_unicode("prompt", text)
    return text


def _messages(prompt: object) -> Sequence[Message]:
    messages = cast("Sequence[Message]", prompt)
    for number, message in enumerate(messages):
        for field, text in message.items() if isinstance(cast(object, message), Mapping) else ():
            if isinstance(cast(object, text), str):
                check_unicode(f"messages[{number}].{field}", text)
    return messages
