"""Whether a tile of fewer rows rounds them as the full tile does, on this machine.

The narrow one is cheaper where a processor has no matrix units. The libraries below promise nothing, so it is tried,
with the weights, the head shapes and the number of threads it will be used with.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import packed, reference
from .attention_index import AttentionIndex
from .values import Heads, Matrix, Norm

NARROW, FULL, PAGE = 4, 8, 256


def rounds_alike(weights: list[Matrix], heads: Heads, dtype: torch.dtype) -> bool:
    """Whether random rows come out of a tile of 4 as out of one of 8, bit for bit: norms, products, attention."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def product(weight: Matrix) -> bool:
        x, residual, bias = randn(FULL, weight.columns), randn(FULL, weight.rows), randn(weight.rows)
        scale, shift = randn(2, weight.columns)

        def run(rows: slice) -> Tensor:
            centred = reference.normalise(x[rows], Norm(scale, shift, 1e-5))
            mixed = reference.normalise(x[rows], Norm(scale, None, 1e-5))
            once, biased = (packed.product(mixed, weight, b, None) for b in (None, bias))
            added = packed.product(mixed, weight, None, residual[rows])
            return torch.cat([centred, mixed, once, biased, added], dim=1)

        return _alike(run)

    def attention() -> bool:
        q, keys, values = randn(FULL, heads.query, heads.dim), *randn(2, 2, heads.key, PAGE, heads.dim)
        norm = Norm(randn(heads.dim), None, 1e-5)
        sequence, position = torch.zeros(FULL, dtype=torch.int64), torch.arange(FULL) + PAGE + PAGE // 2

        def run(rows: slice) -> Tensor:
            tile = rows.stop - rows.start
            table = torch.tensor([[0, 1]])
            index = AttentionIndex(sequence[rows], position[rows], table, page_size=PAGE, tile=tile)
            return reference.attend(reference.normalise(q[rows], norm), keys, values, index, scale=heads.dim**-0.5)

        return _alike(run)

    shapes = {(weight.rows, weight.columns): weight for weight in weights}
    return attention() and all(product(weight) for weight in shapes.values())


def _alike(run: Callable[[slice], Tensor]) -> bool:
    whole = run(slice(0, FULL))
    return all(
        torch.equal(run(slice(start, start + NARROW)), whole[start : start + NARROW])
        for start in range(0, FULL, NARROW)
    )
