"""The op table: the same names and signatures for every backend."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import packed, reference
from .attention_index import AttentionIndex
from .values import Matrix, Prediction


@dataclass(frozen=True)
class Ops:
    """The operations of one backend and the sizes that fix its rounding.

    `decode_tile` and `prefill_tile` are the rows every product of a decode or prefill pass is padded to; `page_size`
    is the number of slots in a cache page, one block of the attention's reduction.
    """

    name: str
    decode_tile: int
    prefill_tile: int
    page_size: int
    prepare: Callable[[Tensor], Matrix]
    index: type[AttentionIndex]
    linear: Callable[..., Tensor]
    qkv_rope_append: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    logits: Callable[..., Tensor]
    head: Callable[..., Prediction]
    sample: Callable[..., Tensor]
    verify: Callable[..., Tensor]

    def description(self, dtype: torch.dtype) -> str:
        """The backend and the path its products take, for people."""
        return f"{self.name} ({'oneDNN packed' if packed.available(dtype) else 'plain'} products)"


TORCH = Ops(
    name="torch",
    decode_tile=8,
    prefill_tile=64,
    page_size=256,
    prepare=reference.prepare,
    index=AttentionIndex,
    linear=reference.linear,
    qkv_rope_append=reference.qkv_rope_append,
    attend=reference.attend,
    logits=reference.logits,
    head=reference.head,
    sample=reference.sample,
    verify=reference.verify,
)
