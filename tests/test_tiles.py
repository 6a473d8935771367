"""Tiles of other sizes: taken where they leave every row its bits, and only there."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.kernels.reference import packed
from skipjack.kernels.reference.tiles import rounds_alike
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
@pytest.mark.parametrize("tile", TORCH.other_tiles)
@pytest.mark.parametrize("own", [True, False])
def test_one_bit_of_one_row_is_enough_to_refuse(
    tile: int, own: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "product", last_bit(packed.product, tile if own else TORCH.decode_tile))
    assert not rounds_alike(weights(dtype), HEADS, dtype, tile)


@pytest.mark.parametrize(
    ("unlike", "taken", "said"),
    [(4, [8, 8, 8, 16, 16], "tiles of 8 and 16 rows"), (16, [4, 4, 8, 8, 8], "tiles of 4 and 8 rows")],
)
def test_a_model_keeps_to_the_tiles_that_round_alike(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, unlike: int, taken: list[int], said: str
) -> None:
    model = synthetic("tiny")._loaded()[0]
    monkeypatch.setattr(model, "_tiles", {})
    monkeypatch.setattr(model, "ops", TORCH)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "product", last_bit(packed.product, unlike))
        assert [model.tile(rows) for rows in (1, 4, 5, 9, 17)] == taken
        assert said in model.backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_pass_have_the_bits_of_a_full_tile(synthetic: Callable[..., Engine], dtype: torch.dtype) -> None:
    """Passes of 1 to 24 rows, in whatever tiles they take, against the same rows in passes of 8."""
    model, cache = synthetic("tiny", dtype=dtype)._loaded()
    tokens, pages = list(range(7, 63)), cache.reserve(64)

    def decoded(first: int, count: int) -> torch.Tensor:
        rows = one_sequence(tokens[first : first + count], first, pages, TORCH.decode_tile, model.device)
        hidden = model.forward(rows, cache, model.full)
        return torch.cat([hidden, model.logits(hidden)], dim=1)

    with torch.inference_mode():
        model.forward(one_sequence(tokens[:32], 0, pages, TORCH.prefill_tile, model.device), cache, model.full)
        whole = torch.cat([decoded(first, 8) for first in (32, 40, 48)])
        for count in (1, 2, 3, 4, 9, 16, 17, 24):
            for first in range(0, 25 - count):
                assert torch.equal(decoded(32 + first, count), whole[first : first + count])
    cache.release(pages)


def test_a_batch_of_many_sequences_has_the_bits_of_each_alone(synthetic: Callable[..., Engine]) -> None:
    """Sixteen sequences of a row are one tile of products, and sixteen of attention."""
    engine = synthetic("tiny", dtype=torch.bfloat16)
    prompts = [list(range(3, 6 + i)) for i in range(16)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    together = engine.generate(prompts, params)
    assert [output.token_ids for output in together] == [engine.generate(p, params).token_ids for p in prompts]


def test_a_pass_costs_what_its_tile_does() -> None:
    tiles = ((4, 0.0), (8, 3.0), (16, 6.0))
    costs = Costs(sublayers=16, full=10.0, tiles=tiles, per_tile=12.0, fixed=2.0, per_row=0.1)
    assert [costs.verify(rows) for rows in (1, 4, 5, 8, 9, 17)] == pytest.approx([10.0, 10.3, 13.4, 13.7, 16.8, 29.5])


def test_an_unpadded_pass_costs_what_its_rows_do() -> None:
    costs = Costs(16, full=10.0, tiles=((8, 1.0),), per_tile=4.0, fixed=2.0, per_row=0.1)
    smooth = replace(costs, unpadded=True)
    for rows in (1, 5, 8, 16, 32):
        assert smooth.verify(rows) == pytest.approx(costs.verify(rows))
    assert [smooth.verify(rows) for rows in (10, 12)] == pytest.approx(
        [smooth.verify(8) + part * (smooth.verify(16) - smooth.verify(8)) for part in (0.25, 0.5)]
    )
