"""Whether tiles of other sizes round rows as the full tile does, on this machine.

Few rows are cheaper in a narrow tile where a processor has no matrix units, and many in a wide one, which reads a
weight once. The libraries below promise nothing, so each is tried, with the weights, the head shapes and the number of
threads it will be used with.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention_index import AttentionIndex
from ..values import Heads, Matrix, Norm
from . import dense, packed

FULL, OTHERS, PAGE = 8, (4, 16), 256


def rounds_alike(weights: list[Matrix], heads: Heads, dtype: torch.dtype, tile: int) -> bool:
    """Whether random rows come out of `tile` as out of the full one, bit for bit: norms, products, attention."""
    return alike_by(dense.normalise, dense.attend, weights, heads, dtype, tile)


def alike_by(
    normalise: Callable[[Tensor, Norm], Tensor],
    attend: Callable[..., Tensor],
    weights: list[Matrix],
    heads: Heads,
    dtype: torch.dtype,
    tile: int,
) -> bool:
    """`rounds_alike` with the norms and the attention of a table."""
    generator = torch.Generator().manual_seed(0)
    most, least = max(FULL, tile), min(FULL, tile)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def product(weight: Matrix) -> bool:
        x, residual, bias = randn(most, weight.columns), randn(most, weight.rows), randn(weight.rows)
        scale, shift = randn(2, weight.columns)

        def run(rows: slice) -> Tensor:
            centred = normalise(x[rows], Norm(scale, shift, 1e-5))
            mixed = normalise(x[rows], Norm(scale, None, 1e-5))
            once, biased = (packed.product(mixed, weight, b, None) for b in (None, bias))
            added = packed.product(mixed, weight, None, residual[rows])
            return torch.cat([centred, mixed, once, biased, added], dim=1)

        return _alike(run, most, least)

    def attention() -> bool:
        q, keys, values = randn(most, heads.query, heads.dim), *randn(2, 2, heads.key, PAGE, heads.dim)
        norm = Norm(randn(heads.dim), None, 1e-5)
        sequence, position = torch.zeros(most, dtype=torch.int64), torch.arange(most) + PAGE + PAGE // 2

        def run(rows: slice) -> Tensor:
            table, size = torch.tensor([[0, 1]]), rows.stop - rows.start
            index = AttentionIndex(sequence[rows], position[rows], table, page_size=PAGE, tile=size)
            return attend(normalise(q[rows], norm), keys, values, index, scale=heads.dim**-0.5)

        return _alike(run, most, least)

    shapes = {(weight.rows, weight.columns): weight for weight in weights}
    return attention() and all(product(weight) for weight in shapes.values())


def _alike(run: Callable[[slice], Tensor], most: int, least: int) -> bool:
    whole = run(slice(0, most))
    parts = (slice(start, start + least) for start in range(0, most, least))
    return all(torch.equal(run(part), whole[part]) for part in parts)
