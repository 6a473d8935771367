"""The ranges of a round, as the torch profiler sees them."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from skipjack import Engine, RequestError, SamplingParams
from skipjack.runtime.graphs import Graphs
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.policy import Planned
from skipjack.runtime.ranges import VARIABLE, marks, unmarked
from skipjack.runtime.request import Output

PROMPTS = [[5, 9, 11, 130, 5, 9, 11], [7, 8, 9, 10]]
NAME = re.compile(r"(?P<part>prefill|round|draft\[(?P<step>\d+)\]|verify|commit|search) S=(?P<s>\d+) R=(?P<r>\d+)")
Range = tuple[str, int, int, str]


@pytest.fixture
def marked(synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = synthetic()
    monkeypatch.setattr(engine._loaded()[0], "mark", marks("torch"))
    return engine


def seen(
    engine: Engine, method: str, tokens: int = 6, prompts: list[list[int]] = PROMPTS
) -> tuple[Output, list[Range]]:
    """The first output, and every range: its part, sequences, rows, and the part it lies in."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True), method=method)
    spans = [
        (event.time_range.start, event.time_range.end, found)
        for event in profiler.events()
        if (found := NAME.fullmatch(event.name))
    ]
    ranges: list[Range] = []
    for start, end, name in sorted(spans, key=lambda span: span[0]):
        around = [(b - a, other["part"]) for a, b, other in spans if a <= start and end <= b and other is not name]
        ranges.append((name["part"], int(name["s"]), int(name["r"]), min(around, default=(0, ""))[1]))
    return outputs[0], ranges


def inside(ranges: list[Range], part: str) -> Counter[str]:
    return Counter(name for name, _, _, around in ranges if around == part)


def test_a_speculative_round_reads_draft_verify_commit(marked: Engine) -> None:
    output, ranges = seen(marked, "swift:skip_attention=2+3,num_draft_tokens=2,threshold=0")
    rounds = [r for r in ranges if r[0] == "round"]
    assert inside(ranges, "") == {"prefill": 1, "round": len(rounds)}
    assert [r[1:3] for r in ranges if r[0] == "prefill"] == [(2, 11)]
    assert len(rounds) >= output.stats.rounds
    assert inside(ranges, "round")["verify"] == inside(ranges, "round")["commit"] == len(rounds)
    first = ranges[ranges.index(rounds[0]) :][:5]
    assert first == [
        ("round", 2, 2, ""),
        ("draft[0]", 2, 2, "round"),
        ("draft[1]", 2, 2, "round"),
        ("verify", 2, 6, "round"),
        ("commit", 2, 6, "round"),
    ]


def test_as_many_draft_ranges_as_draft_passes(marked: Engine) -> None:
    output, ranges = seen(marked, "swift:skip_attention=2+3,num_draft_tokens=3,threshold=0", prompts=PROMPTS[:1])
    counted = Counter(part for part, *_ in ranges)
    assert [counted[f"draft[{i}]"] for i in range(3)] == list(output.stats.drafted_per_position)
    assert counted["round"] == output.stats.rounds


def test_a_tree_is_verified_in_one_range_of_all_its_nodes(marked: Engine) -> None:
    method = "swift:skip_attention=2+3,num_draft_tokens=2,threshold=0,tree=true,max_nodes=6"
    output, ranges = seen(marked, method, prompts=PROMPTS[:1])
    nodes = [rows - 1 for part, _, rows, _ in ranges if part == "verify"]
    assert sum(nodes) == output.stats.drafted
    assert max(nodes) > 2


def test_lookup_drafts_without_rows(marked: Engine) -> None:
    output, ranges = seen(marked, "lookup", prompts=[list(range(3, 500))])
    drafts = [r for r in ranges if r[0].startswith("draft")]
    assert drafts == [("draft[0]", 1, 0, "round")] * output.stats.rounds
    assert any(rows > 1 for part, _, rows, _ in ranges if part == "verify")


def test_search_lies_in_the_rounds_that_search(marked: Engine) -> None:
    output, ranges = seen(marked, "clasp:search_budget=0,num_draft_tokens=2", prompts=PROMPTS[:1])
    assert len(output.stats.events) == inside(ranges, "round")["search"] == 1
    assert "search" not in inside(ranges, "commit") + inside(ranges, "verify")


def test_a_policy_verifies_and_commits(marked: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(Planned):
        name = "whole"

    monkeypatch.setitem(marked._methods().ready, registry.parse("autoregressive"), Whole(None, 8))
    output, ranges = seen(marked, "autoregressive", tokens=4)
    assert inside(ranges, "round") == {"verify": output.stats.rounds, "commit": output.stats.rounds}
    assert {r[1:3] for r in ranges if r[0] == "verify"} == {(2, 2)}


def test_ranges_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert marks() is unmarked
    assert marks("off") is unmarked
    assert unmarked("verify", 1, 1) is unmarked("round", 2, 2), "one object that does nothing"
    assert isinstance(unmarked("verify", 1, 1), nullcontext)
    monkeypatch.setenv(VARIABLE, "torch")
    assert marks() is not unmarked
    assert marks("off") is unmarked


def test_ranges_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "loud")
    with pytest.raises(RequestError, match="ranges: expected one of off, torch, nvtx, got 'loud'"):
        marks()
    if torch.version.cuda is None:
        with pytest.raises(RequestError, match="no NVTX"):
            marks("nvtx")


def test_a_round_on_the_device_has_the_same_parts(marked: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marked, "_shared", replace(marked._open(), graphs=Graphs(*marked._loaded())))
    output, ranges = seen(marked, "swift:skip_attention=2+3,num_draft_tokens=2,threshold=0", prompts=PROMPTS[:1])
    rounds = inside(ranges, "")["round"]
    assert rounds >= output.stats.rounds == output.stats.graph_rounds
    assert inside(ranges, "round") == dict.fromkeys(("draft[0]", "draft[1]", "verify", "commit"), rounds)
    assert {r[1:3] for r in ranges if r[0] == "verify"} == {(1, 3)}
