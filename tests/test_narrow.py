"""Narrow tiles: taken where they leave every row its bits, and only there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skipjack import Engine
from skipjack.kernels import packed
from skipjack.kernels.narrow import rounds_alike
from skipjack.kernels.ops import TORCH
from skipjack.kernels.values import Heads, Matrix
from skipjack.runtime.costs import Costs
from skipjack.runtime.rows import one_sequence

HEADS = Heads(4, 2, 16)


def weights(dtype: torch.dtype) -> list[Matrix]:
    generator = torch.Generator().manual_seed(1)
    return [TORCH.prepare(torch.randn(rows, 64, generator=generator).to(dtype)) for rows in (48, 96)]


def last_bit(product: Callable[..., Tensor], unlike: int) -> Callable[..., Tensor]:
    """A product whose first element is off by one unit in the last place in tiles of `unlike` rows."""

    def off(x: Tensor, *rest: object) -> Tensor:
        y = product(x, *rest)
        if x.shape[0] == unlike:
            y[0, 0] = torch.nextafter(y[0, 0], torch.tensor(torch.inf, dtype=y.dtype))
        return y

    return off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unlike", [TORCH.narrow_tile, TORCH.decode_tile])
def test_one_bit_of_one_row_is_enough_to_refuse(
    unlike: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "product", last_bit(packed.product, unlike))
    assert not rounds_alike(weights(dtype), HEADS, dtype)


def test_a_model_keeps_to_the_full_tile_where_the_narrow_one_rounds_otherwise(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = synthetic("tiny")._loaded()[0]
    monkeypatch.setattr(model, "_narrow", {})
    with monkeypatch.context() as patch:
        patch.setattr(packed, "product", last_bit(packed.product, TORCH.narrow_tile))
        assert [model.tile(rows) for rows in (1, 4, 5, 9)] == [8, 8, 8, 8]
        assert "tiles of" not in model.backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_pass_have_the_bits_of_a_full_tile(synthetic: Callable[..., Engine], dtype: torch.dtype) -> None:
    """Passes of 1 to 4 rows, in whatever tile they take, against the same rows in a pass of 8."""
    model, cache = synthetic("tiny", dtype=dtype)._loaded()
    tokens, pages = list(range(7, 47)), cache.reserve(64)
    with torch.inference_mode():
        model.forward(one_sequence(tokens[:32], 0, pages, TORCH.prefill_tile, model.device), cache, model.full)
        whole = model.forward(one_sequence(tokens[32:], 32, pages, TORCH.decode_tile, model.device), cache, model.full)
        logits = model.logits(whole)
        for count in (1, 2, 3, 4):
            for first in range(0, 9 - count):
                rows = one_sequence(
                    tokens[32 + first : 32 + first + count], 32 + first, pages, TORCH.decode_tile, model.device
                )
                part = model.forward(rows, cache, model.full)
                assert torch.equal(part, whole[first : first + count])
                assert torch.equal(model.logits(part), logits[first : first + count])
    cache.release(pages)


def test_more_rows_than_a_narrow_tile_cost_a_full_one() -> None:
    costs = Costs(sublayers=16, tile=8, full=10.0, per_tile=12.0, fixed=2.0, per_row=0.1, narrow=4, wide=3.0)
    assert [costs.verify(rows) for rows in (1, 4, 5, 8, 9)] == pytest.approx([10.0, 10.3, 13.4, 13.7, 25.7])
