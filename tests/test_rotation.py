"""Every lossless method, by rotation over draft length, batch, dtype, tree and skip set, against plain decoding."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.bench import accept, exact, rotation
from skipjack.runtime.methods import registry


@pytest.mark.parametrize("name", rotation.NAMES)
def test_any_two_factors_meet_at_every_pair_of_levels(name: str) -> None:
    own, cells = rotation.factors(name), [dict(cell.levels) for cell in rotation.cells(name)]
    for a, b in combinations(own, 2):
        assert {(cell[a], cell[b]) for cell in cells} == set(product(own[a], own[b]))
    assert len(cells) <= 40


@pytest.mark.parametrize("name", rotation.NAMES)
def test_cells_are_methods_of_their_levels(name: str) -> None:
    for number, cell in enumerate(rotation.cells(name)):
        spec, levels = registry.parse(cell.method(30, number)), dict(cell.levels)
        assert spec.name == name.partition(" ")[0]
        assert cell.batch == int(levels["batch"])
        assert spec.options.num_draft_tokens == int(levels["num_draft_tokens"])
        for factor in {"threshold", "tree", "reuse", "max_ngram"} & levels.keys():
            assert str(getattr(spec.options, factor)).lower() == levels[factor]


def test_no_lossless_method_is_left_out() -> None:
    assert {name.partition(" ")[0] for name in rotation.NAMES} == {*registry.lossless()} - {"autoregressive"}
    assert {*accept.METHODS} == {*registry.lossless()} - {"autoregressive", "auto", "kangaroo"}


def test_coverage_counts_what_ran() -> None:
    every = {name: rotation.cells(name) for name in rotation.NAMES}
    row = exact.Row("qa", "", 0, "", 1, 5, 5, True, None, 1, 1, 1, 1.0)
    rows = [
        replace(row, name=name, cell=number, batch=cell.batch)
        for name, cells in every.items()
        for number, cell in enumerate(cells)
    ]
    for share in exact.coverage(rows).values():
        ran, _, whole = share.split()
        assert ran == whole
    alone = exact.coverage([replace(row, name="del", cell=0, batch=every["del"][0].batch + 1)])
    assert alone["del"].startswith("3 of "), "of six pairs, three are with a batch size that did not run"
    assert alone["auto"].startswith("0 of ")


@pytest.mark.parametrize("part", range(8))
def test_every_cell_gives_the_tokens_of_plain_decoding(synthetic: Callable[..., Engine], part: int) -> None:
    """The cells with the most pairs, one of each method in every part, greedy and sampled, in either dtype."""
    temperature = 0.8 if part // 2 % 2 else 0.0
    generator = torch.Generator().manual_seed(part)
    params = SamplingParams(max_tokens=24, temperature=temperature, top_p=0.95, seed=part, ignore_eos=True)
    engine = synthetic("tiny", (torch.float32, torch.bfloat16)[part % 2], 0.2)
    lengths = torch.randint(1, 40, (16,), generator=generator).tolist()
    prompts = [torch.randint(3, 500, (length,), generator=generator).tolist() for length in lengths]
    plain = [output.token_ids for output in engine.generate(prompts, params)]
    for name in rotation.NAMES:
        cell = rotation.cells(name)[part]
        method = cell.method(8, part)
        outputs = engine.generate(prompts[: cell.batch], params, method=method)
        assert [output.token_ids for output in outputs] == plain[: cell.batch], method
        assert outputs[0].stats.lossless
        for output in outputs:
            assert 1 + output.stats.accepted + output.stats.bonus == 24
