"""A decode loop in the manner of gpt-fast: a static cache and one compiled step, over transformers' weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Unavailable(Exception):
    """A peer that cannot run here; the message says why."""


class CompiledLoop:
    """Greedy decoding, one compiled step a token; `compile_mode` is torch.compile's, or "eager" for none.

    Products that share their input are fused; weights and the rotation's frequencies are those of `model`.

    Raises:
        Unavailable: the model is of another family.
    """

    def __init__(self, model: Any, max_context: int, compile_mode: str) -> None:
        if reason := obstacle(model.config.model_type):
            raise Unavailable(reason)
        self._decoder = _Decoder(model, max_context)
        self._step = _next
        if compile_mode != "eager":
            self._step = torch.compile(_next, mode=compile_mode, fullgraph=True)

    def __call__(self, prompt: list[int], count: int) -> list[int]:
        """The `count` tokens after `prompt`."""
        with torch.inference_mode():
            ids = torch.tensor(prompt, device=self._decoder.positions.device)
            token = _next(self._decoder, ids, torch.arange(len(prompt), device=ids.device))
            position = torch.tensor([len(prompt)], device=ids.device)
            made = [token]
            for _ in range(count - 1):
                token = self._step(self._decoder, token.clone(), position).clone()
                made.append(token)
                position = position + 1
            return [int(one) for one in torch.cat(made).cpu()]


def obstacle(model_type: str) -> str | None:
    """Why it cannot run a model of this type; None if it can."""
    return None if model_type in FAMILIES else f"written for {', '.join(FAMILIES)}, not for {model_type}"


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
    qkv: Tensor
    qkv_bias: Tensor | None
    up: Tensor
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
        q, k = qkv[:, : self.heads], qkv[:, self.heads : -self.kv_heads]
        if self.q_norm is not None:
            q, k = _normed(q, self.q_norm, self.eps), _normed(k, self.k_norm, self.eps)
        q, k = (_rotated(part, cos, sin).transpose(0, 1) for part in (q, k))
        self.keys[:, position] = k
        self.values[:, position] = qkv[:, -self.kv_heads :].transpose(0, 1)
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
