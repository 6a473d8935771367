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


def test_skipping_takes_sublayers() -> None:
    plan = LayerPlan.full(4).without(mlp=[0])
    assert plan.skipping([2, 3, 7]) == plan.without(attention=[1], mlp=[1, 3])
    assert plan.skipping(()) == plan
    with pytest.raises(RequestError, match="sub-layer: expected 0 to 7, got 8"):
        plan.skipping([8])


def test_spans() -> None:
    plan = LayerPlan.full(4)
    assert plan.early_exit(1).sublayers == (0, 1)
    assert plan.resume(3).sublayers == (6, 7)
    assert plan.without(mlp=[0]).early_exit(2).sublayers == (0, 2, 3)
    assert plan.without(mlp=[0]).early_exit(2).mask == (True, False, True, True, *[False] * 4)
    assert plan.resume(3).mask == (*[False] * 6, True, True)


@pytest.mark.parametrize(
    "call", [("early_exit", 0), ("early_exit", 5), ("resume", 4), ("resume", -1), ("balanced", 0.5)]
)
def test_values_outside_the_model_are_refused(call: tuple[str, float]) -> None:
    with pytest.raises(RequestError, match="expected"):
        getattr(LayerPlan.full(4), call[0])(call[1])


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(RequestError, match="expected 0 to 3, got 4"):
        LayerPlan.full(4).without(attention=[4])


def test_keeping_and_balanced() -> None:
    plan = LayerPlan.full(5).keeping([0, 3])
    assert (plan.sublayers, plan.layers_kept) == ((0, 1, 6, 7), 2)
    assert LayerPlan.full(30).balanced(5) == LayerPlan.full(30).keeping([0, 6, 12, 18, 24, 29])
    assert LayerPlan.full(30).balanced(5, rule="general") == LayerPlan.full(30).keeping([0, 6, 12, 17, 23, 29])
