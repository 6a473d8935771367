"""A Llama-architecture GGUF file as a model folder: dequantised, in the row order and the files of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from torch import Tensor

from .checkpoint import SINGLE_FILE
from .errors import CheckpointError
from .save import staged_folder, write_json, write_tensors

_NORMAL_TOKEN: Final = 1
_CONTROL_TOKEN: Final = 3
_MODEL_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, target: Path, progress: Callable[[str, int, int], None]) -> None:
    """Write `target` as a bfloat16 model folder with tokenizer, whole or not at all; one that is there is mended.

    Raises:
        CheckpointError: the file is no Llama-architecture GGUF with a byte-level BPE, or `target` cannot be written.
    """
    try:
        reader: Any = gguf.GGUFReader(source)
        facts = _Facts(source, reader)
        architecture, model = facts["general.architecture"], facts["tokenizer.ggml.model"]
        pre_tokenizer = facts["tokenizer.ggml.pre"]
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{source}: expected a GGUF file, found: {problem}") from None
    if (architecture, model, pre_tokenizer) != ("llama", "gpt2", "smollm"):
        raise CheckpointError(
            f"{source}: expected architecture llama and tokenizer gpt2 (smollm), found {architecture!r} and {model!r}"
        )
    with staged_folder(target, mend=True) as stage:
        tensors = dict(_tensors(reader, facts, progress))
        config = _config(facts, tied="lm_head.weight" not in tensors)
        progress("write", 0, 1)
        write_json(stage / "config.json", config)
        write_tensors(stage / SINGLE_FILE, tensors)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(stage / "generation_config.json", ids)
        write_json(stage / "tokenizer.json", _tokenizer(facts))
        write_json(stage / "tokenizer_config.json", _tokenizer_config(facts))
        progress("write", 1, 1)


class _Facts:
    """The metadata of a GGUF file, by key."""

    def __init__(self, source: Path, reader: Any) -> None:
        self._source = source
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise CheckpointError(f"{self._source}: expected the metadata {key}, found none")
        return self._fields[key].contents()


def _tensors(reader: Any, facts: _Facts, progress: Callable[[str, int, int], None]) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    total = len(reader.tensors)
    for done, tensor in enumerate(reader.tensors):
        progress("dequantise", done, total)
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name = _MODEL_NAMES.get(tensor.name)
        if name is None:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
            if part in heads:
                values = _halves_apart(values, heads[part])
        yield name, values.to(torch.bfloat16)
    progress("dequantise", total, total)


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    """[heads * D, H]: a rotated pair's rows, side by side in GGUF, go half a head apart, as transformers has them."""
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _config(facts: _Facts, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        # Stored as a float32: the shortest decimal that rounds to it is what was meant.
        "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": facts["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _tokenizer(facts: _Facts) -> dict[str, object]:
    """A tokenizers-library file: GPT-2's byte-level BPE, with digits split one by one first."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": text, **plain, "special": kind == _CONTROL_TOKEN}
            for token, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind != _NORMAL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: token for token, text in enumerate(tokens)},
            "merges": list(facts["tokenizer.ggml.merges"]),
        },
    }


def _tokenizer_config(facts: _Facts) -> dict[str, object]:
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
    }
