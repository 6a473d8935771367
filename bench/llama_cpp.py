"""llama.cpp as a peer: transformers' weights as a GGUF file of the same dtype, decoded by llama-cpp-python."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .compiled_loop import Unavailable

ABSENT = "{} is not installed (pip install llama-cpp-python gguf)"


class LlamaCpp:
    """Greedy decoding by llama.cpp on as many threads as PyTorch has, nothing kept from one prompt to the next.

    Its cache is of the model's dtype in float32, otherwise its own default, float16; attention is its fused one.

    Raises:
        Unavailable: it or gguf is not installed, it was built without a GPU, or the model is not plain Llama.
    """

    def __init__(self, model: Any, max_context: int) -> None:
        library = _installed("llama_cpp")
        on_gpu = model.device.type == "cuda"
        if on_gpu and not library.llama_supports_gpu_offload():
            raise Unavailable("this llama-cpp-python was built without a GPU")
        threads = torch.get_num_threads()
        cache = {"type_k": 0, "type_v": 0} if model.dtype is torch.float32 else {}
        with TemporaryDirectory(prefix="skipjack-") as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            self._llama = library.Llama(
                str(path),
                n_ctx=max_context,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=-1 if on_gpu else 0,
                flash_attn=True,
                use_mmap=False,
                verbose=False,
                **cache,
            )

    def __call__(self, prompt: list[int], count: int) -> list[int]:
        """The `count` tokens after `prompt`."""
        self._llama.reset()
        made = self._llama.generate(prompt, temp=0.0, top_k=1, top_p=1.0, min_p=0.0)
        return [token for token, _ in zip(made, range(count), strict=False)]


def obstacle(model_type: str) -> str | None:
    """Why it cannot run, as far as that is known without the model; None if nothing is."""
    absent = next((name for name in ("llama_cpp", "gguf") if find_spec(name) is None), None)
    if absent is not None:
        return ABSENT.format(absent)
    return None if model_type == "llama" else f"written for llama, not for {model_type}"


def write_gguf(model: Any, path: Path) -> None:
    """Write transformers' Llama `model` in its dtype, norms in float32, without a vocabulary: it is given ids.

    Raises:
        Unavailable: gguf is not installed, or the model is of another family or dtype or has scaled rotation or biases.
    """
    gguf, config = _installed("gguf"), model.config
    if config.model_type != "llama":
        raise Unavailable(f"written for llama, not for {config.model_type}")
    if config.rope_parameters["rope_type"] != "default":
        raise Unavailable("written for llama without scaled rotation")
    types = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[types[model.dtype]])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if not name.endswith(".weight"):
            raise Unavailable(f"written for llama without biases, found {name}")
        target, values = names.get_name(name, try_suffixes=(".weight",)), weight.detach().cpu()
        rotated = {"attn_q": heads, "attn_k": kv_heads}.get(target.split(".")[-2])
        if rotated:
            values = _halves_together(values, rotated)
        if values.ndim == 1:
            writer.add_tensor(target, values.float().numpy())
        elif values.dtype is torch.bfloat16:
            raw = values.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(target, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _halves_together(rows: Tensor, heads: int) -> Tensor:
    """[heads * D, H]: a rotated pair's rows, half a head apart in transformers, go side by side, as GGUF has them."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise Unavailable(ABSENT.format(name)) from None
