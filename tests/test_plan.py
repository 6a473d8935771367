import json
from itertools import pairwise
from pathlib import Path

import pytest

from skipjack import LayerPlan, RequestError


def test_full_plan_runs_everything() -> None:
    plan = LayerPlan.full(3)
    assert plan.sublayers == (0, 1, 2, 3, 4, 5)
    assert plan.layers_kept == 3
    assert hash(plan) == hash(LayerPlan.full(3))


def test_without_skips_sublayers() -> None:
    plan = LayerPlan.full(4).without(attention=[1], mlp=[1, 2])
    assert plan.sublayers == (0, 1, 4, 6, 7)
    assert plan.skipped_attention == (1,)
    assert plan.skipped_mlp == (1, 2)
    assert plan.layers_kept == 2.5


def test_spans() -> None:
    plan = LayerPlan.full(4)
    assert plan.early_exit(1).sublayers == (0, 1)
    assert plan.resume(3).sublayers == (6, 7)
    assert plan.without(mlp=[0]).early_exit(2).sublayers == (0, 2, 3)


@pytest.mark.parametrize(
    "call", [("early_exit", 0), ("early_exit", 5), ("resume", 4), ("resume", -1), ("balanced", 0.5)]
)
def test_values_outside_the_model_are_refused(call: tuple[str, float]) -> None:
    with pytest.raises(RequestError, match="expected"):
        getattr(LayerPlan.full(4), call[0])(call[1])


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(RequestError, match="expected 0 to 3, got 4"):
        LayerPlan.full(4).without(attention=[4])


def test_balanced_keep_sets_of_the_authors(golden: Path) -> None:
    table = json.loads((golden / "unified-table" / "expected.json").read_text())["table"]
    checked = 0
    for row in table:
        if row["defined"]:
            plan = LayerPlan.full(row["num_layers"]).balanced(row["speedup"])
            assert sorted({i // 2 for i in plan.sublayers}) == row["keep"], row
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(("speedup", "count"), [(1.5, 20), (2.5, 12), (30, 2), (100, 2)])
def test_balanced_general_rule(speedup: float, count: int) -> None:
    kept = sorted({i // 2 for i in LayerPlan.full(30).balanced(speedup).sublayers})
    assert len(kept) == count
    assert (kept[0], kept[-1]) == (0, 29)
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1
