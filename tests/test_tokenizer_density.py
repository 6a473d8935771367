"""A text that is refused unread has too many tokens indeed."""

import asyncio
import threading
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from skipjack import Engine, RequestError, SamplingParams
from skipjack.loaders.tokenizer import Tokenizer
from skipjack.loaders.tokenizer_density import Density

CORPUS = ["the cat sat on the mat", "a" * 40, "    x = f(y)", "über café Å 각 ᾂ"] * 8
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# Characters that the vocabulary below lacks are dropped, and some that normalisers make one of.
PIECES = [
    "a" * 40,
    "the cat",
    " ",
    "\n",
    "\x04",
    "\x04\x14",
    "e\u0301",
    "\u1100\u1161\u11a8",
    "α\u0313\u0300\u0345",
    "🎉",
    "ﬁ",
    "<s>",
    "İ",
]


def byte_level(*, silent: str = "") -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [c for c in ALPHABET if c not in silent]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def changed(**components: Any) -> tokenizers.Tokenizer:
    made = byte_level()
    for name, component in components.items():
        setattr(made, name, component)
    return made


def spelled(letters: str, **options: Any) -> tokenizers.Tokenizer:
    """Of all bytes but those `letters`."""
    names = {c: number for number, c in enumerate(c for c in ALPHABET if c not in letters)}
    made = tokenizers.Tokenizer(models.BPE(names, [], **options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def lowered() -> tokenizers.Tokenizer:
    made = spelled("k")
    made.normalizer = normalizers.Lowercase()
    return made


def by_bytes(missing: int | None = None) -> tokenizers.Tokenizer:
    names = [f"<0x{byte:02X}>" for byte in range(256) if byte != missing]
    vocabulary = {name: number for number, name in enumerate([*names, "▁", "a", "b", "ab"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def special(**options: bool) -> tokenizers.Tokenizer:
    made = byte_level()
    made.add_special_tokens([AddedToken("<s>", **options)])
    return made


BOUNDED = {
    "bytes": byte_level(),
    "bytes without some": byte_level(silent="ĄĔÀÿ"),
    "composed": changed(normalizer=normalizers.NFC()),
    "compatible": changed(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "cut": changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    ),
    "fallback": by_bytes(),
    "special": special(),
    "template": changed(post_processor=processors.TemplateProcessing(single="$A")),
}
UNKNOWN = {
    "strip": changed(normalizer=normalizers.Strip()),
    "shrink": changed(normalizer=normalizers.Replace("aa", "a")),
    "pattern": changed(normalizer=normalizers.Replace(Regex("a*"), "aaaa")),
    "removed": changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    ),
    "white space": changed(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    ),
    "no bytes": changed(pre_tokenizer=pre_tokenizers.Metaspace()),
    "a byte missing": by_bytes(0x61),
    "a byte of others missing": byte_level(silent="¡"),
    "greedy": special(lstrip=True),
    "made silent": lowered(),
    "prefix": spelled("", continuing_subword_prefix="##"),
    "suffix": spelled("", end_of_word_suffix="</w>"),
    "words": tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_fewer_tokens_than_it_is_said_to_have(name: str) -> None:
    backend, random = BOUNDED[name], Random(0)
    density = Density.of(backend)
    assert density is not None
    for length in (*range(12), *[40] * 40):
        text = "".join(random.choice(PIECES) for _ in range(length))
        assert len(backend.encode(text).ids) >= density.fewest(text)
    for piece in PIECES:
        assert len(backend.encode(piece * 30).ids) >= density.fewest(piece * 30)
    assert density.fewest("b" * 10_000) >= 10_000 // 200


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_text_may_vanish_nothing_is_said(name: str) -> None:
    assert Density.of(UNKNOWN[name]) is None


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = synthetic("tiny")
    tokenizer = Tokenizer(byte_level(), "test", engine.config.vocab_size, None)
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    monkeypatch.setattr(tokenizer, "_backend", SimpleNamespace())
    density = tokenizer._density
    assert density is not None
    with pytest.raises(RequestError, match=r"^prompt: \d+ characters are at least \d+ tokens, which leave no room"):
        engine.generate("x" * density.most * engine.config.max_context)


def test_a_text_that_is_encoded_does_not_hold_up_other_requests(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event loop's other requests go on while one's prompt is still with the tokenizer."""
    engine = synthetic("tiny")
    encoded = threading.Event()

    class Slow:
        special_ids = frozenset[int]()

        def fewest_tokens(self, text: str) -> int:
            return 0

        def encode(self, text: str, **_: bool) -> list[int]:
            assert encoded.wait(30)
            return [5, 6]

        def stream(self) -> Any:
            return SimpleNamespace(step=lambda token: "", finish=lambda: "")

    monkeypatch.setattr(engine, "tokenizer", Slow())
    params = SamplingParams(max_tokens=3, ignore_eos=True)

    async def read(prompt: Any) -> int:
        return sum([len(chunk.token_ids) async for chunk in engine.astream(prompt, params)])

    async def both() -> list[int]:
        slow = asyncio.create_task(read("long"))
        quick = await asyncio.wait_for(read([7, 8]), 20)
        encoded.set()
        return [quick, await slow]

    assert asyncio.run(both()) == [3, 3]
