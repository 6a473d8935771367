"""The op table of the hand-written kernels."""

import sys

import torch
import triton
from triton.runtime.jit import JITFunction

from . import launch
from .attention import attend
from .attention_index import TritonIndex
from .branch import branch
from .compact import compact
from .enter import enter
from .fill import fill_kv
from .head import head
from .linear import linear, logits, prepare, prepare_split, prepare_stack
from .logits import logprobs, reshape_logits
from .lookup import lookup
from .norm import normalise
from .ops import Ops
from .qkv import qkv_rope_append
from .reference.packed import quantise, take_rows
from .rounds import commit, extend
from .route import route, row_map
from .sample import sample
from .values import Heads, Matrix
from .verify import verify, verify_rejection


def _describe(dtype: torch.dtype) -> str:
    arch = launch.architecture()
    if not arch:
        return f"{triton.__version__}, interpreted"
    return f"{triton.__version__}, sm_{arch}{', dependent launch' if launch.dependent(arch) else ''}"


def rounds_alike(weights: list[Matrix], heads: Heads, dtype: torch.dtype, tile: int) -> bool:
    """There is one tile: eight rows of activations are one instruction of the matrix units."""
    return True


TRITON = Ops(
    name="triton",
    numerics="exact",
    describe=_describe,
    decode_tile=launch.DECODE_TILE,
    other_tiles=(),
    prefill_tile=64,
    pads=lambda dtype: False,
    page_size=64,
    prepare=prepare,
    prepare_gated=prepare,
    prepare_stack=prepare_stack,
    rounds_alike=rounds_alike,
    take_rows=take_rows,
    prepare_split=prepare_split,
    quantise=quantise,
    join=lambda *_: None,
    index=TritonIndex,
    enter=enter,
    normalise=normalise,
    linear=linear,
    qkv_rope_append=qkv_rope_append,
    attend=attend,
    fill_kv=fill_kv,
    row_map=row_map,
    route=route,
    logits=logits,
    head=head,
    reshape_logits=reshape_logits,
    sample=sample,
    logprobs=logprobs,
    verify=verify,
    verify_rejection=verify_rejection,
    compact=compact,
    lookup=lookup,
    extend=extend,
    branch=branch,
    commit=commit,
)


def _name_kernels() -> None:
    """Give every kernel the name it has in Triton's cache on disk.

    It hashes what a kernel calls, and the result depends on what was hashed before (3.6.0): in one order it is the same
    in every process, whatever that launches first, and nothing is compiled twice.
    """
    modules = sorted(name for name in sys.modules if name.startswith(f"{__package__}."))
    for kernel in (value for name in modules for value in vars(sys.modules[name]).values()):
        if isinstance(kernel, JITFunction):
            kernel.cache_key  # noqa: B018


_name_kernels()
