"""What a caller asks for and what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, cast

from .errors import RequestError

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 64, 1024
# Sequences that run together at most, unless an engine is told, and the most that it can be told.
SEQUENCES, MOST_SEQUENCES = 16, 64
# Logits divided or multiplied by it must stay within float32.
REPETITION_PENALTIES = 1e-6, 1e6


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends; the names are vLLM's.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch their filter off. Penalties follow
    vLLM: `repetition_penalty` counts prompt and output, the other two the output only. `seed` None draws a fresh one.
    `logprobs` n returns the n most likely tokens beside the chosen one, from the unmodified logits. `stop`,
    `stop_token_ids` and `logit_bias` may be None, vLLM's own default, and are read back as empty then.

    Raises:
        RequestError: a field is out of range; the message names it.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _several("stop", self.stop, "strings")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _several("stop_token_ids", self.stop_token_ids, "token ids"))
        object.__setattr__(self, "logit_bias", _mapping("logit_bias", self.logit_bias))
        self._integer("max_tokens", 1)
        self._integer("min_tokens", 0, self.max_tokens)
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0, low_open=True)
        self._integer("top_k", -1, 2**63 - 1)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", *REPETITION_PENALTIES)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._integer("n", 1, 256)
        if not isinstance(cast("object", self.ignore_eos), bool):
            raise RequestError(f"ignore_eos: expected True or False, got {self.ignore_eos!r}")
        if self.seed is not None:
            self._integer("seed", 0, 2**64 - 1)
        if self.logprobs is not None:
            self._integer("logprobs", 0, 100)
        if len(stop) > MAX_STOP_STRINGS or not all(_is_text(s) for s in stop):
            raise RequestError(f"stop: expected at most {MAX_STOP_STRINGS} non-empty strings, got {self.stop!r}")
        if (longest := max(map(len, stop), default=0)) > MAX_STOP_LENGTH:
            raise RequestError(f"stop: expected strings of at most {MAX_STOP_LENGTH} characters, got one of {longest}")
        for text in stop:
            check_unicode("stop", text)
        ids = tuple(integer("stop_token_ids", token, 0) for token in self.stop_token_ids)
        bias = {
            integer("logit_bias", token, 0): _number(f"logit_bias[{token}]", value, -100.0, 100.0)
            for token, value in self.logit_bias.items()
        }
        object.__setattr__(self, "stop_token_ids", ids)
        object.__setattr__(self, "logit_bias", bias)

    def _integer(self, name: str, low: int, high: int | None = None) -> None:
        object.__setattr__(self, name, integer(name, getattr(self, name), low, high))

    def _number(self, name: str, low: float, high: float, *, low_open: bool = False) -> None:
        object.__setattr__(self, name, _number(name, getattr(self, name), low, high, low_open=low_open))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, which no seed and no filter changes."""
        return self.temperature == 0.0

    @property
    def reshapes_logits(self) -> bool:
        """Whether penalties, bias or a minimum length change the logits before a token is chosen."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities of one generated token and of the most likely ones at its position."""

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Choice:
    """One continuation.

    `token_ids` are the generated tokens only, those that ended it included; `text` is without special tokens and ends
    before a stop string, and None without a tokenizer. `logprobs` has an entry a token, and is None unless asked for.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Piece:
    """One generated token of a stream: the text it added, and whether it was drafted and accepted.

    `text` is empty while a character or what may be a stop string is held back, of special tokens, and without a
    tokenizer.
    """

    token_id: int
    text: str
    drafted: bool


@dataclass(frozen=True)
class Chunk:
    """What one round added to continuation `choice` of prompt `index`; `finish_reason` is set in its last chunk.

    `logprobs` has an entry a piece, and is None unless asked for.
    """

    index: int
    choice: int
    pieces: tuple[Piece, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        return [piece.token_id for piece in self.pieces]


@dataclass(frozen=True)
class Stats:
    """What a prompt of a request cost, its choices together. Times are seconds of wall clock in its own steps, without
    what it waited for others; a round that prompts share counts fully for each of them, and once for the choices of
    one.

    acceptance rate = accepted / drafted; mean acceptance length = 1 + accepted / rounds. Every choice has one token
    from its prefill; with them, `accepted` and `bonus` (the full model's own choice at the end of a round) add up to
    `completion_tokens`.
    `lossless` promises the tokens of plain decoding of the prompt alone, every one of them: it takes a lossless method
    and `numerics` "exact". Draws by rejection sampling have the distribution of plain decoding's instead (see `notes`).
    `graph_rounds` of the rounds ran on the device alone, their draft and verification not timed apart.
    `drafted_per_position[i]` counts rounds whose draft reached depth i + 1, `accepted_per_position[i]` those in which a
    draft token of that depth was accepted. `layers_kept` is what a draft step runs, of `layers`, or what a decode step
    of a lossy method ran on average; `layers_per_token` are the layers behind each token of the first choice, by a
    lossy method but layerskip, `layers_per_prompt_token` those each prompt token ran, by FlexiDepth. `executed_skips`
    counts sub-layers not run, once per row and pass, of prompts by FlexiDepth alone. `weight_passes`: how often
    decoding read the model's weights, the LM head's included, partial readings as their share; those a batch shares
    count fully for each member; 0 where the method does not say, as lossless ones do not. `weight_pass_bound`: the most
    tokens such a pass can give by the method and the model's shape. `cached_tokens` of the prompt were in the prefix
    cache. `phases` are (name, first generated token);
    `events` are the method's own records of this request's rounds (for SWIFT one per optimisation step); `notes` say in
    words what a reader of the figures must know.
    """

    method: str
    lossless: bool
    backend: str
    seed: int
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    search_s: float = 0.0
    rounds: int = 0
    graph_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    bonus: int = 0
    drafted_per_position: tuple[int, ...] = ()
    accepted_per_position: tuple[int, ...] = ()
    layers: int = 0
    layers_kept: float = 0.0
    executed_skips: int = 0
    weight_passes: float = 0.0
    weight_pass_bound: float | None = None
    numerics: str = "exact"
    layers_per_token: tuple[float, ...] = ()
    layers_per_prompt_token: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    phases: tuple[tuple[str, int], ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    cached_tokens: int = 0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_weight_pass(self) -> float | None:
        """Decoded tokens per reading of all weights, 1 where nothing is skipped; None where `weight_passes` is 0."""
        return self.rounds / self.weight_passes if self.weight_passes else None

    @property
    def other_s(self) -> float:
        """Decoding time in neither draft, verification nor search; rounds the device ran alone are in it whole."""
        return max(0.0, self.decode_s - self.draft_s - self.verify_s - self.search_s)

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second: the first token of every choice belongs to its prefill."""
        return (self.accepted + self.bonus) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Output:
    """The answer to one prompt: `n` choices, and what they cost together."""

    prompt_ids: list[int]
    choices: tuple[Choice, ...]
    stats: Stats

    @property
    def text(self) -> str | None:
        """The first choice's text; None when the model folder has no tokenizer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Of the first choice: "stop" (end of text, stop token or stop string), "length" (max_tokens or the context
        limit) or, while it has not ended or when the stream was closed before that, "abort".
        """
        return self.choices[0].finish_reason


def _several(name: str, value: object, kind: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name}: expected {kind}, got {value!r}")
    try:
        return tuple(cast("Iterable[Any]", value))
    except TypeError:  # An array of no dimension.
        raise RequestError(f"{name}: expected {kind}, got {value!r}") from None


def _mapping(name: str, value: object) -> dict[int, float]:
    if value is not None and not isinstance(value, Mapping):
        raise RequestError(f"{name}: expected a mapping of token ids to numbers, got {value!r}")
    return dict(cast("Mapping[int, float]", value or {}))


def check_unicode(name: str, text: str) -> None:
    """Refuse text that no encoding can write, with a RequestError that starts with `name`."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise RequestError(f"{name}: expected valid Unicode, got a lone surrogate at {problem.start}") from problem


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """An integer, NumPy's included, as Python's; RequestError, which names it, where it is none within bounds."""
    # Most are of the exact type; to look for one of another is slow.
    if type(value) is int or (not isinstance(value, bool) and isinstance(value, Integral)):
        found = int(value)
        if found >= low and (high is None or found <= high):
            return found
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise RequestError(f"{name}: expected an integer {bounds}, got {value!r}")


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> float:
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not low <= number <= high or math.isinf(number) or (low_open and number == low):
        raise RequestError(
            f"{name}: expected a number {'above' if low_open else 'from'} {low} up to {high}, got {value!r}"
        )
    return number


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
