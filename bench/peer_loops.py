"""The peers: transformers' generate in its variants, and a compiled decode loop in the manner of gpt-fast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import SkipjackError

Generate = Callable[[list[int], int], list[int]]
PLAIN = "transformers generate"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Unavailable(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """The early exit's layers, the lookup's draft length, and torch.compile's mode ("eager" compiles nothing)."""

    exit_layer: int
    num_draft_tokens: int
    compile_mode: str


def version() -> str:
    """transformers' version.

    Raises:
        SkipjackError: it is not installed.
    """
    return str(_transformers().__version__)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model of a folder, for greedy decoding that no end of text stops."""
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, do_sample=False)
    return model


def peers(model: Any, setting: Setting, max_context: int) -> dict[str, Callable[[], Generate]]:
    """How each peer is made ready; what is returned generates n tokens after a prompt.

    Static caches hold `max_context` positions, so that no prompt makes them compile again. Making a peer, or its first
    call, may raise: then it is not available here.
    """
    static = {"cache_implementation": "static", "max_cache_len": max_context}
    early, lookup = f"assistant_early_exit={setting.exit_layer}", f"prompt_lookup_num_tokens={setting.num_draft_tokens}"
    return {
        PLAIN: lambda: _generate(model, {}),
        "transformers static cache + compile": lambda: _generate(model, static, _compile_config(model)),
        f"transformers {early}": lambda: _generate(model, {"assistant_early_exit": setting.exit_layer}),
        f"transformers {lookup}": lambda: _generate(model, {"prompt_lookup_num_tokens": setting.num_draft_tokens}),
        f"torch.compile loop ({setting.compile_mode})": lambda: CompiledLoop(model, max_context, setting.compile_mode),
    }


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise SkipjackError("peers need transformers: pip install 'skipjack[bench]'") from error


def _generate(model: Any, options: dict[str, Any], compile_config: Any = None) -> Generate:
    config_class = type(model.generation_config)
    known = vars(config_class())
    # Older releases size a static cache by the longest call so far instead.
    missing = [name for name in options if name not in known and name != "max_cache_len"]
    if missing:
        raise Unavailable(f"this transformers has no {missing[0]}")
    extra = {"compile_config": compile_config} if compile_config is not None else {"disable_compile": True}
    options = {name: value for name, value in options.items() if name in known}

    def run(prompt: list[int], count: int) -> list[int]:
        config = config_class(pad_token_id=0, do_sample=False, max_new_tokens=count, **options, **extra)
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return [int(token) for token in made[0, len(prompt) :].tolist()]

    return run


def _compile_config(model: Any) -> Any:
    """The configuration that has generate compile its decode step, which it otherwise does on GPUs only."""
    try:
        config = import_module("transformers").CompileConfig()
    except AttributeError:
        raise Unavailable("this transformers has no CompileConfig") from None
    if model.device.type == "cpu":
        if not hasattr(config, "_compile_all_devices"):
            raise Unavailable("this transformers compiles on GPUs only")
        config._compile_all_devices = True
        config.mode = "default"
    return config


class CompiledLoop:
    """gpt-fast's loop: fused weights, a static cache, and one compiled step for one token, greedy.

    Weights are those of transformers' model; the rotation's frequencies too.
    """

    def __init__(self, model: Any, max_context: int, compile_mode: str) -> None:
        if model.config.model_type not in FAMILIES:
            raise Unavailable(f"written for {', '.join(FAMILIES)}, not for {model.config.model_type}")
        self._decoder = _Decoder(model, max_context)
        self._step = _next
        if compile_mode != "eager":
            self._step = torch.compile(_next, mode=compile_mode, fullgraph=True)

    def __call__(self, prompt: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            ids = torch.tensor(prompt, device=self._decoder.positions.device)
            token = _next(self._decoder, ids, torch.arange(len(prompt), device=ids.device))
            position = torch.tensor([len(prompt)], device=ids.device)
            made = [token]
            for _ in range(count - 1):
                token = self._step(self._decoder, token.clone(), position).clone()
                made.append(token)
                position = position + 1
            return torch.cat(made).tolist()


def _next(decoder: _Decoder, token: Tensor, position: Tensor) -> Tensor:
    """The greedy token [1] after the last of `token` int64 [n] at `position` int64 [n]."""
    return decoder(token, position)[-1:].argmax(dim=-1)


class _Decoder(nn.Module):
    """Parameters and buffers are what a captured graph may read in place; anything else it would copy every step."""

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, model: Any, max_context: int) -> None:
        super().__init__()
        body, config = model.model, model.config
        self.embedding, self.head = body.embed_tokens.weight, model.lm_head.weight
        self.norm, self.eps = body.norm.weight, config.rms_norm_eps
        self.layers = nn.ModuleList(_Layer(layer, config, max_context) for layer in body.layers)
        self.window = getattr(config, "sliding_window", None)
        positions = torch.arange(max_context, device=model.device)
        rotary, dtype = body.rotary_emb, self.embedding.dtype
        angles = (positions[:, None].float() * rotary.inv_freq.float()).repeat(1, 2)
        self.register_buffer("positions", positions)
        self.register_buffer("cos", (angles.cos() * rotary.attention_scaling).to(dtype))
        self.register_buffer("sin", (angles.sin() * rotary.attention_scaling).to(dtype))

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits [1, V] after the last of `token` int64 [n] at `position` int64 [n]."""
        x = self.embedding[token]
        visible = self.positions[None] <= position[:, None]
        if self.window:
            visible &= self.positions[None] > position[:, None] - self.window
        cos, sin = self.cos[position], self.sin[position]
        for layer in self.layers:
            x = layer(x, position, visible, cos, sin)
        return functional.linear(_normed(x[-1:], self.norm, self.eps), self.head)


class _Layer(nn.Module):
    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, config: Any, max_context: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.attention_norm, self.mlp_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.q_norm, self.k_norm = (_weight(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [p.bias for p in projections if p.bias is not None]
        self.register_buffer("qkv", torch.cat([p.weight.detach() for p in projections]))
        self.register_buffer("qkv_bias", torch.cat([bias.detach() for bias in biases]) if biases else None)
        self.register_buffer("up", torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]))
        self.output, self.down = attention.o_proj.weight, mlp.down_proj.weight
        for name in ("keys", "values"):
            self.register_buffer(name, self.down.new_zeros(self.kv_heads, max_context, self.width).detach())

    def forward(self, x: Tensor, position: Tensor, visible: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = _normed(x, self.attention_norm, self.eps)
        qkv = functional.linear(y, self.qkv, self.qkv_bias).view(len(x), -1, self.width)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = _normed(q, self.q_norm, self.eps), _normed(k, self.k_norm, self.eps)
        q, k = (_rotated(part, cos, sin).transpose(0, 1) for part in (q, k))
        self.keys[:, position] = k
        self.values[:, position] = v.transpose(0, 1)
        mixed = functional.scaled_dot_product_attention(
            q[None], self.keys[None], self.values[None], attn_mask=visible, enable_gqa=self.heads != self.kv_heads
        )
        x = x + functional.linear(mixed[0].transpose(0, 1).reshape(len(x), -1), self.output)
        gate, up = functional.linear(_normed(x, self.mlp_norm, self.eps), self.up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, self.down)


def _weight(norm: Any) -> Any:
    return None if norm is None else norm.weight


def _normed(x: Tensor, weight: Any, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [n, heads, width] rotated by angles [n, width]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
