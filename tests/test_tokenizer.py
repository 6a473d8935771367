"""Tokenizer, stream and chat against transformers; templates that would never end, end."""

import contextlib
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from types import SimpleNamespace

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from skipjack.loaders.chat_template import ChatTemplate
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import TokenizerError
from skipjack.loaders.tokenizer import Tokenizer, TokenStream

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the cat sat on the mat",
    "a man a plan a canal 0123456789",
    "über straße 你好 🎉 naïve",
    "x = f(y)\n\treturn 1",
] * 8
TEXTS = [
    "",
    "the cat",
    "  two  spaces\n\n\ttabs ",
    "naïve café über",
    "你好，世界",
    "🎉👩‍👩‍👧 ok",
    "1234567890",
    "def f(x):\n    return x ** 2\n",
    "مرحبا नमस्ते",
    "\x00\x01",
    "<s>inside</s>",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}"
    "{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n'"
    " + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' ~ content | trim ~ ' ' ~ eos_token }}"
    "{% endif %}{% endfor %}"
)
MODERN = """{%- set ns = namespace(last=0, seen=[]) %}
{%- macro shown(m) -%}
    [{{ m.role | upper }}]{% generation %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}
{%- endmacro %}
{%- for m in messages[::-1] %}
    {%- if m.role == "user" and ns.last == 0 %}{% set ns.last = messages | length - loop.index0 %}{% endif %}
{%- endfor %}
{{- strftime_now("%Y")[:2] }}{{ tools is none }}{{ nothing is defined }}
{{- messages | map(attribute='role') | join('|') }}
{%- for m in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- if m.role == "system" %}{% continue %}{% endif %}
    {{- shown(m) }} {{ m | tojson }} {{ '%s-%02d' % (m.role, loop.index) }} {{ (m.content ~ 'é') | tojson(indent=2) }}
{%- endfor %}
{{ ns.last }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ dict(a=1).items() | list }}
"""
CHATS = [
    [{"role": "user", "content": "the cat"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "  你好 <b> & 'x' \n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hm</think>\n\ntwo"},
        {"role": "user", "content": "three {{ 7 * 7 }} {% raw %}"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "<|im_end|> five"},
    ],
]


def config(vocab_size=600):
    fields = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return ModelConfig.parse(fields | {"intermediate_size": 8, "vocab_size": vocab_size}, "config.json")


def backend(prefix_bos=True):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if prefix_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def settings(folder, template=None, **more):
    fields = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}, **more}
    if template is not None:
        fields["chat_template"] = template
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def load(folder):
    tokenizer = Tokenizer.load(folder, config())
    assert tokenizer is not None
    return tokenizer


def chat_ids(tokenizer, messages, **options):
    return tokenizer.encode(tokenizer.render(messages, **options), add_special_tokens=False)


def test_none_without_a_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path, config()) is None


@pytest.mark.parametrize("text", TEXTS)
def test_encode_decode_and_stream(folder, text):
    tokenizer, oracle = load(folder), transformers.PreTrainedTokenizerFast.from_pretrained(settings(folder))
    ids = tokenizer.encode(text)
    assert ids == oracle(text)["input_ids"]
    assert ids[0] == 0
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    if not text.startswith("<s>"):
        assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.step(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_vocabulary_and_special_ids(folder):
    tokenizer = load(folder)
    assert tokenizer.vocab_size == tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert tokenizer.special_ids == {0, 1, 2, 3}


def test_stream_gives_back_broken_bytes_at_the_end(folder):
    tokenizer = load(folder)
    ids = tokenizer.encode("a🎉")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.step(token) for token in ids) == "a"
    assert "a" + stream.finish() == tokenizer.decode(ids)
    broken = tokenizer.encode("🎉")[1:-1] * 3 + tokenizer.encode("then text")
    stream = tokenizer.stream()
    assert "".join(stream.step(token) for token in broken) + stream.finish() == tokenizer.decode(broken)


def test_a_run_of_tokens_without_text_costs_each_of_them_the_same(folder):
    tokenizer = load(folder)
    unknown = tokenizer.vocab_size + 7
    ids = [*tokenizer.encode("one"), *[1, unknown] * 400, *tokenizer.encode(" two")]
    seen = []
    stream = TokenStream(lambda part: seen.append(len(part)) or tokenizer.decode(part), tokenizer._silent)
    assert "".join(stream.step(token) for token in ids) + stream.finish() == tokenizer.decode(ids) == "one two"
    assert max(seen) <= 8


def bytes_of(tokenizer):
    """The id of every byte: printable ones of Latin-1 are spelled as themselves, the others from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [tokenizer._backend.token_to_id(chr(byte if byte in plain else next(others))) for byte in range(256)]


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xF0, 0xE4])
def test_bytes_that_are_no_text_are_shown_as_they_come_and_cost_the_same(folder, byte):
    tokenizer = load(folder)
    ids = [*tokenizer.encode("one"), *[bytes_of(tokenizer)[byte]] * 400, *tokenizer.encode(" two🎉")]
    seen = []
    stream = TokenStream(lambda part: seen.append(len(part)) or tokenizer.decode(part), tokenizer._silent)
    shown, late = "", 0
    for count, token in enumerate(ids, 1):
        shown += stream.step(token)
        late = max(late, len(tokenizer.decode(ids[:count])) - len(shown))
    assert shown + stream.finish() == tokenizer.decode(ids)
    assert shown.count("\ufffd") == 400
    assert late <= 9
    assert max(seen) <= 16


@pytest.mark.parametrize("seed", range(40))
def test_a_stream_of_any_bytes_adds_up(folder, seed):
    """Characters, parts of them and bytes that belong to none, in any order and cut anywhere."""
    tokenizer, random = load(folder), Random(seed)
    parts = [
        *("a", "é", "你", "🎉", "👩‍👩‍👧"),
        b"\xff",
        b"\xc0",
        b"\xf0\x9f",
        b"\xe4\xbd",
        b"\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90",
    ]
    chosen = [random.choice(parts[random.randrange(6) :]) for _ in range(60)]
    content = b"".join(part if isinstance(part, bytes) else part.encode() for part in chosen)
    ids = [bytes_of(tokenizer)[byte] for byte in content]
    whole = tokenizer.encode("你好 the 🎉")
    ids = [*ids[: seed * 3], *whole, *ids[seed * 3 :]]
    stream = tokenizer.stream()
    assert "".join(stream.step(token) for token in ids) + stream.finish() == tokenizer.decode(ids)


def test_sentencepiece_style_spaces_stream(tmp_path):
    vocab = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4, "<0xE4>": 5, "<0xBD>": 6, "<0xA0>": 7}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path)
    ids = [1, 2, 3, 5, 6, 7, 1, 4, 2]
    stream = loaded.stream()
    pieces = [stream.step(token) for token in ids]
    assert "".join(pieces) + stream.finish() == loaded.decode(ids) == "the cats你 the  cat"
    assert pieces[3:6] == ["", "", "你"]
    # This decoder takes a whole run of bytes for broken where one of them is.
    broken = [1, 6, *[5, 6, 7] * 30, *[7] * 50, 2]
    stream = loaded.stream()
    assert "".join(stream.step(token) for token in broken) + stream.finish() == loaded.decode(broken)
    assert loaded.decode(broken).count("\ufffd") == 141


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", [CHATML, LLAMA2, MODERN], ids=["chatml", "llama2", "modern"])
def test_chat_is_that_of_transformers(folder, template, messages, generate):
    tokenizer = load(settings(folder, template))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = oracle.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]
    assert chat_ids(tokenizer, messages, add_generation_prompt=generate) == expected


def test_template_file_wins_and_named_templates_choose_default(folder):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    assert chat_ids(load(settings(folder, named)), CHATS[0]) == chat_ids(load(settings(folder, CHATML)), CHATS[0])
    (folder / "chat_template.jinja").write_text("{{ bos_token }}file", encoding="utf-8")
    tokenizer = load(folder)
    assert tokenizer.has_chat_template
    assert chat_ids(tokenizer, CHATS[0]) == [0, *tokenizer.encode("file")[1:]]


NAMES = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"


@pytest.mark.parametrize("decoder", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("plain", [False, True], ids=["objects", "strings"])
def test_special_tokens_are_also_named_in_a_file_of_their_own(folder, plain, decoder):
    """It counts in folders written before transformers 4.34, which have no "added_tokens_decoder"."""
    added = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    more = {"added_tokens_decoder": {"0": added | {"special": True}}} if decoder else {}
    settings(folder, NAMES, **more)
    named = {"bos_token": "</s>" if plain else added | {"content": "</s>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = oracle.apply_chat_template(CHATS[0], tokenize=False)
    assert load(folder).render(CHATS[0], add_generation_prompt=False) == expected
    assert expected.startswith("<s>" if decoder else "</s>")


def test_named_templates_without_a_default_are_none(folder):
    tokenizer = load(settings(folder, [{"name": "tool_use", "template": "x"}]))
    assert tokenizer.decode(tokenizer.encode("hi there")) == "hi there"
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match=r"expected a chat template .*named 'default'.*, found none"):
        chat_ids(tokenizer, CHATS[0])


def test_chat_refusals(folder):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: expected a chat template in .*, found none"):
        chat_ids(load(settings(folder)), CHATS[0])
    tokenizer = load(settings(folder, LLAMA2))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat template: roles must alternate"):
        chat_ids(tokenizer, [{"role": "assistant", "content": "x"}])
    for messages, message in (
        ([], "messages: expected a non-empty list"),
        ("hi", "messages: expected a non-empty list, found 'hi'"),
        (["hi"], r"messages\[0\]: expected an object"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected a string, found None"),
        ([CHATS[0][0], {"role": 3, "content": "x"}], r"messages\[1\]\.role: expected a string, found 3"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], r"messages\[0\]\.tool_calls: expected a"),
    ):
        with pytest.raises(TokenizerError, match=message):
            chat_ids(tokenizer, messages)
    assert chat_ids(tokenizer, [CHATS[0][0] | {"tool_calls": None}]) == chat_ids(tokenizer, CHATS[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_template": 3}, "chat_template: expected a string or a list of name and template"),
        ({"chat_template": [{"name": "x"}]}, "chat_template: expected a string or a list of name and template"),
        ({"chat_template": "x" * 65537}, "chat template: expected at most 65536 bytes, found 65537"),
        ({"bos_token": 1}, "bos_token: expected a string, found 1"),
    ],
)
def test_bad_tokenizer_settings(folder, fields, message):
    with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json: {message}"):
        load(settings(folder, **fields))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a tokenizer"),
        (b"{}", "expected a tokenizer"),
        (b"\xff\xfe", "expected UTF-8"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "expected a tokenizer"),
        (b'{"version":"1.0","model":{"type":"Unigram","unk_id":5,"vocab":[["a",0.0]]}}', "expected a tokenizer"),
        (b"[" * 100_000, "expected a tokenizer"),
    ],
)
def test_malformed_tokenizers_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "kind", "more"),
    [
        ("normalizer", "normalizers", []),
        ("decoder", "decoders", [{"type": "Fuse"}]),
    ],
)
def test_text_that_would_grow_without_bound_is_refused_at_once(folder, field, kind, more):
    """Twelve replacements, each of which takes a letter for ten: two letters would come to two billion."""
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    tree = json.loads((folder / "tokenizer.json").read_text())
    for depth, times in ((1, 2), (1, 12), (3, 12)):
        parts = {"type": "Sequence", kind: [*more, *[grow] * times]}
        for _ in range(depth - 1):
            parts = {"type": "Sequence", kind: [parts]}
        (folder / "tokenizer.json").write_text(json.dumps(tree | {field: parts}))
        if times == 2:
            assert load(folder) is not None
            continue
        with pytest.raises(TokenizerError, match=rf"tokenizer\.json: {field}: expected text to grow at most"):
            load(folder)


def test_a_template_that_adds_more_ids_than_a_prompt_has_is_refused(folder):
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["post_processor"]["special_tokens"]["<s>"] |= {"ids": [0] * 600, "tokens": ["<s>"] * 600}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    assert load(folder) is not None
    tree["post_processor"]["single"] += tree["post_processor"]["single"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: post_processor: expected at most 1024 ids to be added"):
        load(folder)


def test_ids_beyond_the_model_refused(folder, tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: vocab: expected ids below vocab_size 100 .* found \d+"):
        Tokenizer.load(folder, config(100))
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["post_processor"]["special_tokens"]["<s>"]["ids"] = [5000]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(TokenizerError, match="expected ids below vocab_size 600, found 5000"):
        load(folder).encode("x")


def test_prompts_are_never_cut_or_padded(tmp_path):
    tokenizer = backend()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path)
    assert loaded.decode(loaded.encode("the cat sat on the mat")) == "the cat sat on the mat"
    assert len(loaded.encode("the cat")) < 20


def test_a_deadline_that_passes_while_text_is_encoded_is_no_fault_of_a_file(folder, monkeypatch):
    """The handler of a signal raises what it likes, inside whatever call of Python comes next."""
    tokenizer = load(folder)

    class Slow:
        def encode(self, *_, **__):
            raise TimeoutError("too late")

        def render(self, **_):
            raise TimeoutError("too late")

    monkeypatch.setattr(tokenizer, "_backend", Slow())
    with pytest.raises(TimeoutError, match="too late"):
        tokenizer.encode("a")
    template = ChatTemplate("", "test", {})
    template._compiled = Slow()
    with pytest.raises(TimeoutError, match="too late"):
        template.render([], True)


def test_a_long_text_is_encoded_as_a_short_one(folder):
    text = "the cat sat on the mat " * 1000
    assert load(folder).encode(text) == backend().encode(text).ids
    assert load(folder).encode(text, add_special_tokens=False) == backend().encode(text, add_special_tokens=False).ids


def test_bad_text_and_ids(folder):
    tokenizer = load(folder)
    with pytest.raises(TokenizerError, match="cannot encode"):
        tokenizer.encode("\ud800")
    with pytest.raises(TokenizerError, match="cannot decode"):
        tokenizer.decode([-1])
    with pytest.raises(TokenizerError, match="cannot decode"):
        tokenizer.decode([1 << 40])


BIG = "{% set x = 'a'.ljust(999999) %}"
NS = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}"
BOMBS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "silent loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loud loops": "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaa{% endfor %}{% endfor %}",
    "captured": "{% for i in range(99999) %}{% set x %}" + "a" * 50000 + "{% endset %}{% endfor %}",
    "product": "{{ 'a' * 9999999999 }}",
    "list product": "{% set x = [1] * 999999 %}{% set y = x * 999999 %}",
    "power": "{{ 7 ** 999999999 }}",
    "doubling by ~": NS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by +": NS + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "nested lists": NS + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested dicts": NS + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "compared lists": NS + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == [ns.x] }}",
    "percent width": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "format width": "{{ '{:9999999999}'.format(1) }}",
    "format argument": "{{ '{:{}}'.format(1, 999999999) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ 'a'.center(9999999999) }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "replace": BIG + "{{ x.replace('', x) }}",
    "replace filter": BIG + "{{ x | replace('a', x) | replace('a', x) | replace(' ', x) }}",
    "join": BIG + "{{ x.join(x) }}",
    "lazy join": BIG + "{{ ([none] * 99999) | map('default', x, true) | join }}",
    "indent": "{{ '\n'.ljust(9999) | indent(999999) }}",
    "tojson": "{{ messages | tojson(indent=999999) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "searches": NS + "{% if 5.5 in range(99999) %}{% endif %}{% endfor %}{{ 1 // 0 }}",
    "sums": "{{ ([[1] * 9999] * 99) | sum(start=[]) }}",
    "splits": BIG + "{% for i in range(99999) %}{% set y = x | list %}{% endfor %}",
    "digits": "{{ ('9' * 900000) | int }}",
    "brackets": "{{ " + "(" * 20000 + " }}",
    "nots": "{{ " + "not " * 15000 + "1 }}",
    "ifs": "{% if 1 %}" * 6000,
    "elifs": "{% if 0 %}" + "{% elif 0 %}" * 5000 + "{% endif %}",
    "fors": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "sum of ones": "{{ " + "1+" * 30000 + "1 }}",
    "long integer": "{{ " + "9" * 60000 + " }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os.system('true') }}",
    "namespace class": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "mutation": "{{ messages.append(messages) }}",
    "include": "{% include 'tokenizer.json' %}",
    "import": "{% import 'os' as o %}",
    "syntax": "{% if %}",
    "undefined call": "{{ nothing() }}",
    # Its text was within the limits, and took five seconds to become tokens.
    "long list": "{{ range(9) | list * 99999 }}",
    "long text": "{% for i in range(400) %}" + "9" * 999 + "{% endfor %}",
}


@pytest.mark.parametrize("template", BOMBS.values(), ids=list(BOMBS))
def test_templates_that_would_never_end_are_refused_in_time(folder, template):
    tokenizer = load(settings(folder, template))
    start = time.process_time()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat template: ") as refusal:
        chat_ids(tokenizer, CHATS[0])
    assert time.process_time() - start < 2
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


HARMLESS = ["{{ ''|attr('__class__') }}", " " * 65000, "{{ a }}" * 9000, BIG + "{% set y = x[::2] %}" * 2000]


@pytest.mark.parametrize("template", HARMLESS, ids=["attr", "spaces", "many", "slices"])
def test_templates_at_the_limits_end_in_time(folder, template):
    tokenizer = load(settings(folder, template))
    start = time.process_time()
    with contextlib.suppress(TokenizerError):
        chat_ids(tokenizer, CHATS[0])
    assert time.process_time() - start < 2


def test_a_template_that_others_hold_up_is_not_refused(folder, monkeypatch):
    """An hour goes by between any two steps of it, in which its thread does nothing."""
    tokenizer = load(settings(folder, MODERN))
    expected, hours = chat_ids(tokenizer, CHATS[0]), itertools.count(step=3600)
    clocks = SimpleNamespace(monotonic=lambda: next(hours), thread_time=time.thread_time, strftime=time.strftime)
    monkeypatch.setattr("skipjack.loaders.sandbox.time", clocks)
    assert chat_ids(tokenizer, CHATS[0]) == expected
    clocks.thread_time = clocks.monotonic
    with pytest.raises(TokenizerError, match=r"more than 0\.5 s"):
        chat_ids(tokenizer, CHATS[0])


def test_a_long_chat_is_not_taken_for_a_growing_one(folder):
    tokenizer = load(settings(folder, MODERN))
    chat = [{"role": "user", "content": "the cat sat " * 40_000}]
    assert len(chat_ids(tokenizer, chat)) > 400_000 / 12


def test_threads_share_a_tokenizer(folder):
    tokenizer = load(settings(folder, MODERN))
    expected = [chat_ids(tokenizer, chat) for chat in CHATS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(partial(chat_ids, tokenizer), CHATS * 20)) == expected * 20


def test_the_text_of_one_token_is_what_it_adds(folder):
    tokenizer = load(folder)
    for text in ("the cat", "  two  spaces\n\n\ttabs ", "<s>inside</s>"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(map(tokenizer.token_text, ids)) == text
    assert {tokenizer.token_text(token) for token in tokenizer.encode("\U0001fae0", add_special_tokens=False)} == {
        "\ufffd"
    }


def test_the_text_of_one_token_has_the_space_that_a_text_of_its_own_would_lose(tmp_path):
    # As Llama 2's and Mistral's: a word's token begins with its space, which the beginning of a text drops.
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁the": 3, "▁": 4, "cat": 5, "<0xE4>": 6}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert tokenizer.decode([3, 3]) == "the the"
    assert [tokenizer.token_text(token) for token in (3, 4, 5, 1)] == [" the", " ", "cat", "<s>"]
    assert "\ufffd" in tokenizer.token_text(6)
