"""FlexiDepth in float64 from a checkpoint's tensors, one teacher-forced pass, no code of the package."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Forward(NamedTuple):
    """logits [T, V]; router logits [N, T] and skip [N, T] of the routed layers."""

    logits: Tensor
    router: Tensor
    skip: Tensor


def forward(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: list[int], *, kv: str = "own", gate: str = "released"
) -> Forward:
    """kv "none": tokens that skip a layer are not seen there by later ones; gate "ste_hard": nothing is scaled."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    dim = fields.get("head_dim") or fields["hidden_size"] // heads
    eps, count = fields["rms_norm_eps"], len(ids)
    angle = torch.arange(count).double()[:, None] * fields.get("rope_theta", 1e4) ** (
        -torch.arange(0, dim, 2).double() / dim
    )
    cos, sin = (torch.cat([f(angle), f(angle)], -1)[:, None] for f in (torch.cos, torch.sin))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def gated(x: Tensor, gate: str, up: str, down: str) -> Tensor:
        return (torch.nn.functional.silu(x @ weights[gate].T) * (x @ weights[up].T)) @ weights[down].T

    x = weights["model.embed_tokens.weight"][ids]
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    routers, skips = [], []
    for layer in range(fields["num_hidden_layers"]):
        lead = f"model.layers.{layer}."
        z = norm(x, weights[lead + "input_layernorm.weight"])
        run, weight = torch.ones(count, dtype=torch.bool), torch.ones(count).double()
        if layer in fields["routing_layers"]:
            code = norm(z @ weights[lead + "router.router_enc.weight"].T, weights[lead + "router.router_norm.weight"])
            logit = torch.tanh(code) @ weights[lead + "router.router_dec.weight"].T
            logit = (logit @ weights[lead + "router.router_head.weight"].T)[:, 0]
            run, weight = logit > 0, logit.sigmoid()
            routers.append(logit)
            skips.append(~run)
        q, k, v = (
            (z @ weights[f"{lead}self_attn.{part}_proj.weight"].T).view(count, number, dim)
            for part, number in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        )
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        seen = causal & run[None, :] if kv == "none" else causal
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(), v)
        attended = mixed.reshape(count, -1) @ weights[lead + "self_attn.o_proj.weight"].T
        x = x + run[:, None] * attended
        y = norm(x, weights[lead + "post_attention_layernorm.weight"])
        out = gated(y, *(f"{lead}mlp.{part}_proj.weight" for part in ("gate", "up", "down")))
        if layer in fields["routing_layers"]:
            adapted = gated(y, *(f"{lead}router_proj.{part}_proj.weight" for part in ("gate", "down", "up")))
            if gate == "released":
                out, adapted = weight[:, None] * out, (1 - weight)[:, None] * adapted
            out = torch.where(run[:, None], out, adapted)
        x = x + out
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = norm(x, weights["model.norm.weight"]) @ head.T
    return Forward(logits, torch.stack(routers), torch.stack(skips))
