"""llama.cpp as a peer: its file holds the model, its tokens are transformers', what it cannot do has a reason."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from skipjack.bench import llama_cpp
from skipjack.bench.compiled_loop import Unavailable
from skipjack.bench.peer_loops import load_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def small_llama(tied: bool, **changes: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **changes,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def read(path: Path) -> dict[str, torch.Tensor]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in tensors}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_holds_every_weight(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Values come back bit for bit; pairs of rotated rows lie side by side, as llama.cpp rotates them."""
    model = small_llama(tied).to(dtype)
    llama_cpp.write_gguf(model, tmp_path / "m.gguf")
    found = read(tmp_path / "m.gguf")
    assert len(found) == 3 * 9 + 2 + (not tied)
    layer = model.model.layers[1]
    for name, weight in (
        ("token_embd", model.model.embed_tokens.weight),
        ("output_norm", model.model.norm.weight),
        ("blk.1.attn_v", layer.self_attn.v_proj.weight),
        ("blk.1.attn_output", layer.self_attn.o_proj.weight),
        ("blk.1.ffn_down", layer.mlp.down_proj.weight),
    ):
        assert torch.equal(found[f"{name}.weight"], weight.float()), name
    for name, weight, heads in (
        ("attn_q", layer.self_attn.q_proj.weight, 4),
        ("attn_k", layer.self_attn.k_proj.weight, 2),
    ):
        for head in range(heads):
            for pair in range(8):
                rows = found[f"blk.1.{name}.weight"][16 * head + 2 * pair :][:2]
                assert torch.equal(rows, weight[16 * head + pair :: 8][:2].float()), (name, head, pair)


@pytest.mark.parametrize("tied", [False, True])
def test_its_tokens_are_those_of_transformers(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    small_llama(tied).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32, torch.device("cpu"))
    prompt = list(range(3, 40))
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(20):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1)[None]], dim=1)
    peer = llama_cpp.LlamaCpp(model, 64)
    assert peer(prompt, 20) == ids[0, len(prompt) :].tolist()
    assert peer(prompt, 20) == ids[0, len(prompt) :].tolist(), "nothing of the call before is left"


def test_what_it_cannot_do_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(Unavailable, match="without scaled rotation"):
        llama_cpp.write_gguf(small_llama(True, rope_parameters=scaled), tmp_path / "m.gguf")
    with pytest.raises(Unavailable, match=r"without biases, found model\.layers\.0\.self_attn\.q_proj\.bias"):
        llama_cpp.write_gguf(small_llama(True, attention_bias=True), tmp_path / "m.gguf")
    with pytest.raises(Unavailable, match="not for qwen2"):
        llama_cpp.write_gguf(SimpleNamespace(config=SimpleNamespace(model_type="qwen2")), tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(Unavailable, match=r"llama_cpp is not installed \(pip install llama-cpp-python gguf\)"):
        llama_cpp.LlamaCpp(None, 64)
