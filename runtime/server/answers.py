"""What clients get: OpenAI's objects, whole and in parts, and what Skipjack adds to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from time import time
from typing import Any

from ...loaders.tokenizer import Tokenizer
from ..request import Chunk, Output, TokenLogprob

REPLACED = "\ufffd"
NUMBERED = "token_id:"
END = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """One answer as OpenAI's text completion.

    `choices` of prompt i have the numbers i·n, i·n + 1, …; `with_ids` adds to each the tokens it was given. Without a
    tokenizer they always are, and their text is empty.
    """

    model: str
    fingerprint: str
    tokenizer: Tokenizer | None
    n: int
    with_ids: bool
    # How far the texts of each choice's tokens reach, of those whose log-probabilities were told.
    _told: dict[int, int] = field(default_factory=dict[int, int])
    _texts: dict[int, str] = field(default_factory=dict[int, str])

    prefix, kind, part_kind = "cmpl", "text_completion", "text_completion"

    def __post_init__(self) -> None:
        self.with_ids = self.with_ids or self.tokenizer is None
        self._head = {"id": f"{self.prefix}-{token_hex(12)}", "created": int(time()), "model": self.model}

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The answer to every prompt, when all have ended."""
        choices = [
            self._choice(
                output_number * self.n + number,
                self._content(choice.text or ""),
                choice.token_ids,
                choice.logprobs,
                choice.finish_reason,
            )
            for output_number, output in enumerate(outputs)
            for number, choice in enumerate(output.choices)
        ]
        return self._object(self.kind, choices) | {"usage": usage(outputs), "skipjack": told(outputs)}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def part(self, chunk: Chunk) -> dict[str, Any] | None:
        """What a round added; None where a client would see nothing of it."""
        if not (chunk.text or chunk.finish_reason or chunk.logprobs or (self.with_ids and chunk.token_ids)):
            return None
        place = chunk.index * self.n + chunk.choice
        choice = self._choice(place, self._delta(chunk.text), chunk.token_ids, chunk.logprobs, chunk.finish_reason)
        return self._object(self.part_kind, [choice])

    def cost(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """What a stream ends with that was asked for its cost."""
        return self._object(self.part_kind, []) | {"usage": usage(outputs)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices, "system_fingerprint": self.fingerprint}

    def _choice(
        self,
        number: int,
        content: dict[str, Any],
        ids: list[int],
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        given = {"token_ids": ids} if self.with_ids else {}
        told = None if logprobs is None else self._logprobs(number, logprobs)
        return {"index": number} | content | {"logprobs": told, "finish_reason": finish_reason} | given

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content

    def _logprobs(self, number: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._text(entry.token_id) for entry in logprobs]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._told.get(number, 0))
            self._told[number] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                {self._text(token): value for token, value in {**entry.top, entry.token_id: entry.logprob}.items()}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        """A token's text; its number (vLLM's way to write it) where that is none, or no whole character."""
        if (known := self._texts.get(token)) is not None:
            return known
        text = self.tokenizer.token_text(token) if self.tokenizer else ""
        self._texts[token] = text if text and REPLACED not in text else f"{NUMBERED}{token}"
        return self._texts[token]


class ChatAnswer(Answer):
    """One answer as OpenAI's chat completion."""

    prefix, kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._object(self.part_kind, [self._choice(number, {"delta": self._message("")}, [], None, None)])
            for number in range(self.n)
        ]

    def _message(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text, "refusal": None}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": self._message(text)}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, number: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._likely(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._likely(token, value) for token, value in entry.top.items()]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _likely(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": None if text.startswith(NUMBERED) else list(text.encode())}


def usage(outputs: Sequence[Output]) -> dict[str, Any]:
    """The tokens of all prompts and of all their choices, and those of prompts that the prefix cache had."""
    prompt = sum(output.stats.prompt_tokens for output in outputs)
    completion = sum(output.stats.completion_tokens for output in outputs)
    cached = {"cached_tokens": sum(output.stats.cached_tokens for output in outputs)}
    counted = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counted | {"prompt_tokens_details": cached}


def told(outputs: Sequence[Output]) -> dict[str, Any]:
    """How the tokens of all prompts came about: whether they are plain decoding's, and how many were drafted."""
    stats = [output.stats for output in outputs]
    rounds, drafted, accepted = (sum(getattr(one, name) for one in stats) for name in ("rounds", "drafted", "accepted"))
    return {
        "method": stats[0].method,
        "lossless": all(one.lossless for one in stats),
        "numerics": stats[0].numerics,
        "backend": stats[0].backend,
        "seed": stats[0].seed,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "mean_acceptance_length": 1 + accepted / rounds if rounds else 1.0,
        "notes": list(dict.fromkeys(note for one in stats for note in one.notes)),
    }


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"
