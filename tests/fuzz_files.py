"""Mutated model files: only a SkipjackError may come out, in at most two seconds, one line that names the file.

    python tests/fuzz_files.py --examples 10000 [--kind safetensors] [--seed 7]

or SKIPJACK_FUZZ=10000 pytest tests/test_checkpoint.py -k mutated. A failure prints its kind and seed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from skipjack.loaders.checkpoint import Checkpoint
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.errors import SkipjackError
from skipjack.loaders.naming import field_shapes
from skipjack.loaders.routing import routed_fields
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.tokenizer import Tokenizer
from skipjack.loaders.weights import checkpoint_tensors, load_weights

SECONDS = 2.0
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, 10**30, 0.0, -0.5, 1e-9, 1e308,
    "", "a", "..", "F32", "BF16", "I64", "F4", "llama", "bloom", "\ud800", "x" * 300, [], {}, [0], [1, 2, 3], [[]],
    {"a": 1}, [0, 2**64], "/etc/passwd", "../model.safetensors", "(a+)+$", "[", "BPE", "Unigram", "WordPiece",
    "ByteLevel",
]  # fmt: skip
PIECES = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"0", b"-1", b"1e999", b"NaN", b"\\u0000", b"\xff", b"\xc3", b" ", b"\n",
    b"{{", b"}}", b"{%", b"%}", b"{% for i in range(99999) %}", b"{% endfor %}", b"|", b"~ x ", b"* 99999", b"** 99",
    b"{% set x = messages %}", b".append(1)", b"['a']", b"loop", b"[" * 5000, b"9" * 5000,
]  # fmt: skip
TEMPLATE = """{% set ns = namespace(x='') %}{% macro shown(m) %}{{ m['content'] | trim }}{% endmacro %}
{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ bos_token }}{% endif %}
{% set ns.x = ns.x ~ m.role %}{{ '<|' + m['role'] + '|>' + shown(m) | tojson }}{{ m.content[1:] * 2 }}
{% for c in m.content.split(' ') %}{{ c | upper }}{% else %}{{ raise_exception('none') }}{% endfor %}{% endfor %}
{{ ns.x | replace('u', 'v') }}{{ messages | map(attribute='role') | join(', ') }}
{{ '%03d' % 7 }}{{ range(9) | list }}"""


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        until = min(at + rng.choice((1, 2, 8, 64, 4096)), len(data))
        action = rng.randrange(6)
        if action == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[at:until]
        elif action == 2:
            data[at:at] = rng.choice(PIECES)
        elif action == 3:
            data[at:at] = data[at:until]
        elif action == 4:
            data[at:until] = rng.choice(PIECES)
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = rng.choice(places)
        action = rng.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice(["", "a", "..", "dtype", "model_type", "type", "\ud800", str(key) + "x"])] = holder[key]
        elif action == 2:
            other, name = rng.choice(places)
            with contextlib.suppress(LookupError):
                holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(tree)
    if rng.random() < 0.05:
        text = text.replace("{", '{"a":0,"a":1,', 1)
    return text.encode()


def _places(tree: object) -> Iterator[tuple[dict | list, object]]:
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            yield node, key
            if isinstance(node[key], (dict, list)):
                pending.append(node[key])


def mutated(content: bytes, rng: random.Random) -> bytes:
    return mutated_json(content, rng) if rng.random() < 0.6 else mutated_bytes(content, rng)


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    action = rng.randrange(8)
    if action == 0:
        return mutated_bytes(content, rng)
    if action == 1:
        return content[: rng.randrange(len(content))]
    if action == 2:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**24, 2**63, 2**64 - 1))) + content[8:]
    if action == 3:
        data = data + b"\0" * rng.choice((1, 8, 4096)) if rng.random() < 0.5 else data[: -rng.choice((1, 8, 64))]
    else:
        header = mutated(header, rng)
    return struct.pack("<Q", len(header)) + header + data


class Folder:
    """A valid model folder, and for every kind of file how it is mutated and used."""

    def __init__(self, root: Path) -> None:
        fields = synthetic_config("tiny-llama") | {
            "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 8, "vocab_size": 400, "head_dim": 4,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "architectures": ["LlamaForCausalLM"],
            "layer_types": ["full_attention"] * 2,
        }  # fmt: skip
        self.config = ModelConfig.parse(fields, "config.json")
        tensors = checkpoint_tensors(synthetic_weights(self.config, 0, torch.bfloat16), self.config)
        self.single, self.sharded, self.text = root / "single", root / "sharded", root / "text"
        self.split, self.routed, self.mindskip = (root / name for name in ("split", "routed", "mindskip"))
        save_checkpoint(self.single, fields, tensors)
        save_checkpoint(self.sharded, fields, tensors, max_shard_bytes=8000)
        cycle = synthetic_config("tiny-dmtd") | {
            "num_hidden_layers": 2, "num_thinking_layers": 1, "num_decoding_layers": 1, "hidden_size": 16,
            "head_dim": 4, "intermediate_size": 8, "vocab_size": 400,
        }  # fmt: skip
        routed = routed_fields(fields, [1], router_reduction=4, adapter_reduction=2) | {"architectures": None}
        own = {"model_type": "llama_mindskip", "architectures": None, "is_mindskip": [False, True], "threshold": 0.5}
        for folder, values in ((self.split, cycle), (self.routed, routed), (self.mindskip, fields | own)):
            config = ModelConfig.parse(values, "config.json")
            save_checkpoint(folder, values, checkpoint_tensors(synthetic_weights(config, 0, torch.bfloat16), config))
        self.text.mkdir()
        (self.text / "tokenizer.json").write_bytes(_tokenizer())
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
        (self.text / "tokenizer_config.json").write_text(json.dumps(settings))
        (self.text / "chat_template.jinja").write_text(TEMPLATE)
        self.kinds: dict[str, tuple[Path, Callable[[bytes, random.Random], bytes], Callable[[], None]]] = {
            "safetensors": (self.single / "model.safetensors", mutated_safetensors, self._load),
            "config": (self.single / "config.json", mutated, lambda: self._configure(self.single)),
            "cycle": (self.split / "config.json", mutated, lambda: self._configure(self.split)),
            "mindskip": (self.mindskip / "config.json", mutated, lambda: self._configure(self.mindskip)),
            "routed": (self.routed / "config.json", mutated, lambda: self._configure(self.routed)),
            "index": (self.sharded / "model.safetensors.index.json", mutated, self._open_shards),
            "tokenizer": (self.text / "tokenizer.json", mutated, self._tokenize),
            "settings": (self.text / "tokenizer_config.json", mutated, self._tokenize),
            "template": (self.text / "chat_template.jinja", mutated_bytes, self._chat),
        }

    def _load(self) -> None:
        with Checkpoint.open(self.single) as checkpoint:
            for name in checkpoint.names():
                with contextlib.suppress(SkipjackError):
                    checkpoint.read(name).double().sum()
        load_weights(self.single, self.config, torch.float32)

    def _configure(self, folder: Path) -> None:
        config = ModelConfig.load(folder)
        field_shapes(config)
        load_weights(folder, config, torch.float32)

    def _open_shards(self) -> None:
        load_weights(self.sharded, self.config, torch.float32)

    def _tokenize(self) -> None:
        tokenizer = Tokenizer.load(self.text, self.config)
        if tokenizer is None:
            raise RuntimeError("the tokenizer was not looked at")
        ids = tokenizer.encode("the cat sat, 你好 <s> 12 aaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
        stream = tokenizer.stream()
        _ = [stream.step(token) for token in ids], stream.finish(), tokenizer.decode(ids)
        if tokenizer.has_chat_template:
            self._chat()

    def _chat(self) -> None:
        tokenizer = Tokenizer.load(self.text, self.config)
        if tokenizer is not None:
            chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "on a mat"}]
            tokenizer.encode(tokenizer.render(chat), add_special_tokens=False)


def _tokenizer() -> bytes:
    tokenizer = Backend(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 4, trainer)
    return tokenizer.to_str().encode()


def fuzz(kind: str, examples: int, seed: int = 0) -> Counter[str]:
    """Run mutated files of one kind; the outcomes counted. Raises AssertionError on the first broken promise."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        folder = Folder(Path(root))
        path, mutate, use = folder.kinds[kind]
        valid = path.read_bytes()
        use()
        for number in range(examples):
            content = mutate(valid, random.Random(f"{kind} {seed} {number}"))
            path.write_bytes(content)
            where = f"{kind} --seed {seed}, example {number}"
            start = time.monotonic()
            try:
                use()
                outcomes["accepted"] += 1
            except SkipjackError as problem:
                outcomes[type(problem).__name__] += 1
                message = str(problem)
                assert root in message, f"{where}: names no file: {message}"
                assert "\n" not in message, f"{where}: more than one line: {message!r}"
                assert len(message) < 1000, f"{where}: too long: {message!r}"
            except BaseException as problem:
                if isinstance(problem, KeyboardInterrupt):
                    raise
                raise AssertionError(f"{where}: {type(problem).__name__}: {problem}") from problem
            seconds = time.monotonic() - start
            assert seconds <= SECONDS, f"{where}: took {seconds:.1f} s"
    return outcomes


KINDS = ("safetensors", "config", "cycle", "mindskip", "routed", "index", "tokenizer", "settings", "template")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Rust prints about a panic before Python sees it."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=int(os.environ.get("SKIPJACK_FUZZ", "1000")))
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in [options.kind] if options.kind else KINDS:
        start = time.monotonic()
        try:
            with quiet():
                outcomes = fuzz(kind, options.examples, options.seed)
        except AssertionError as failure:
            sys.exit(str(failure))
        print(f"{kind}: {options.examples} in {time.monotonic() - start:.0f} s: {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
