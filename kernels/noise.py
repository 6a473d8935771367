"""Counter-based noise: a token's randomness is a function of (seed, position, id) and of nothing else."""

import torch
from torch import Tensor

from .elementwise import steady

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
ROUNDS = 10
# Streams of noise beside that of plain draws, 0: whether a draft token is accepted, and the token after those that are.
ACCEPT_STREAM, DRAW_STREAM = 1, 2


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011). int64 tensors holding uint32 values, broadcast; four words out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, position: Tensor, size: int, stream: int = 0) -> Tensor:
    """float32 [R, size] in (0, 1) for ids 0 to size - 1, rows given by seed and position int64 [R].

    Id i takes word i mod 4 of the block with counter (i div 4, position, 0, stream) and key = seed.
    """
    device = seed.device
    block = torch.arange((size + 3) // 4, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    key = ((seed & _MASK)[:, None], ((seed >> 32) & _MASK)[:, None])
    words = philox((block, position[:, None], zero, zero + stream), key)
    bits = torch.stack(words, dim=-1).view(seed.shape[0], -1)[:, :size]
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed: Tensor, position: Tensor, size: int, stream: int = 0) -> Tensor:
    """Standard Gumbel noise float32 [R, size], −log(−log u) with u = `uniform`."""
    return -steady(torch.log, -steady(torch.log, uniform(seed, position, size, stream)))
