"""A few of the episodes of `tests/endurance.py`, which has them by the thousand."""

import runpy
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def endurance() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).with_name("endurance.py")), run_name="endurance")


@pytest.mark.parametrize("kind", ["Cancels", "Faults"])
def test_whatever_strikes_some_requests_leaves_the_others_their_tokens(endurance: dict[str, Any], kind: str) -> None:
    wanted = {"Cancels": 12, "Faults": 6}[kind]
    assert sum(endurance["episodes"](endurance[kind], wanted).values()) >= wanted


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
def test_memory_stays_as_it_is(endurance: dict[str, Any], graphs: bool) -> None:
    endurance["flat"](60, graphs=graphs)


def test_loading_and_closing_leaves_nothing(endurance: dict[str, Any]) -> None:
    endurance["reloaded"](3)
