"""Streamed text: whole characters, and stop strings that never leak."""

import pytest

from skipjack import Engine, SamplingParams
from skipjack.runtime.text import TextStream


class Letters:
    """A tokenizer whose token i is the i-th of some pieces."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def stream(self) -> "Letters":
        return self

    def step(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""


def run(pieces: list[str], stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(*pieces), stop)
    shown: list[str] = []
    for token in range(len(pieces)):
        shown.append(stream.push(token))
        if stream.stopped:
            break
    shown.append(stream.finish())
    return shown, stream


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["ab", "c"], [], ["ab", "c", ""]),
        (["ab", "END", "x"], ["END"], ["ab", "", ""]),
        (["abE", "N", "D", "x"], ["END"], ["ab", "", "", ""]),
        (["abE", "N", "x", "y"], ["END"], ["ab", "", "ENx", "y", ""]),
        (["abE", "N"], ["END"], ["ab", "", "EN"]),
        (["aa", "ab"], ["aab"], ["", "a", ""]),
        (["x\n", "\n", "\n"], ["\n\n\n"], ["x", "", "", ""]),
        (["one two three"], ["three", "two"], ["one ", ""]),
        (["", "é", "d"], ["éd"], ["", "", "", ""]),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], shown: list[str]) -> None:
    got, stream = run(pieces, stop)
    assert got == shown
    assert stream.text == "".join(shown)
    assert not any(s in stream.text for s in stop)


def test_a_stop_string_before_min_tokens_is_text() -> None:
    """It ends nothing and is shown; one that is complete only afterwards counts."""
    stream = TextStream(Letters("aEND", "bE", "ND", "c", "END"), ["END"])
    assert [stream.push(token, may_stop=token >= 3) for token in range(5)] == ["aEND", "b", "END", "c", ""]
    assert stream.stopped
    stream = TextStream(Letters("aE", "ND"), ["END"])
    assert [stream.push(token, may_stop=token >= 1) for token in range(2)] == ["a", ""]
    assert stream.text == "a"


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "stopped"),
    [
        (["ab", "c"], ["b", "xyz"], ["ab", "c"], False),
        (["ab", "c", "x"], ["b", "bcd"], ["a", "", "bcx"], False),
        (["ab", "c", "d"], ["b", "bcd"], ["a", "", ""], True),
        (["ab", "b"], ["b", "bcd"], ["a", "b"], True),
    ],
)
def test_a_stop_string_before_min_tokens_ends_nothing_later(
    pieces: list[str], stop: list[str], shown: list[str], stopped: bool
) -> None:
    """Not even where its text is held back, because a longer stop string begins with it."""
    stream = TextStream(Letters(*pieces), stop)
    assert [stream.push(token, may_stop=token >= 1) for token in range(len(pieces))] == shown
    assert stream.stopped == stopped


PROMPT = [{"role": "user", "content": "Count from one to ten in words, one per line."}]


def test_stop_string_inside_an_accepted_block(demo: Engine) -> None:
    method = "swift:skip_attention=12+20,threshold=0.0,num_draft_tokens=7"
    plain = demo.generate(PROMPT, SamplingParams(max_tokens=40))
    assert plain.text is not None
    words = plain.text.split()
    for stop in (words[3], plain.text[10:14], plain.text[7:9]):
        params = SamplingParams(max_tokens=40, stop=stop)
        expected = demo.generate(PROMPT, params)
        output = demo.generate(PROMPT, params, method=method)
        assert output.text == plain.text[: plain.text.index(stop)] == expected.text
        assert output.token_ids == expected.token_ids == plain.token_ids[: len(output.token_ids)]
        assert output.finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 40])
def test_streamed_text_is_the_text(demo: Engine, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=5, logit_bias={17: 5.0, 120: 5.0, 200: 5.0})
    stream = demo.stream("Emoji and accents: 😀 é ü 漢字", params, method="swift:skip_attention=12+20,threshold=0.0")
    shown = "".join(chunk.text for chunk in stream)
    output = stream.outputs[0]
    assert shown == output.text
    assert demo.tokenizer is not None
    assert output.text == demo.tokenizer.decode(output.token_ids)
