"""The search for launch parameters of bench/gpu.sh, as far as no GPU is needed: nothing here is timed."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from typer.testing import CliRunner

from skipjack.bench import gpu, rules
from skipjack.bench.gpu_setting import DRY
from skipjack.bench.rules import (
    KERNELS,
    MANY,
    Attention,
    Blocks,
    Candidate,
    Product,
    candidates,
    descend,
    in_use,
    replaced,
)
from skipjack.bench.step import Bed, Clock, Times
from skipjack.kernels import attention_rules, launch, product_rules

RULES = ((product_rules, "product_rule"), (product_rules, "projection_rule"), (attention_rules, "attention_rule"))
SLOW = 10.0


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Bed:
    """A layer whose weights all differ in shape."""
    monkeypatch.setattr("skipjack.bench.step.DRY_FIELDS", {"num_hidden_layers": 5, "vocab_size": 320})
    return Bed.of("tiny-llama", torch.device("cpu"), True, layers=1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """How often each (warps, stages) was launched with."""
    seen: Counter[tuple[int, ...]] = Counter()
    options = launch.options

    def counted(*given: Any) -> dict[str, Any]:
        seen[given[:2]] += 1
        return options(*given)

    monkeypatch.setattr(launch, "options", counted)
    return seen


@dataclass(frozen=True)
class Costs(Clock):
    """Gives as time what the rules that are in force cost."""

    bed: Bed
    cost: Callable[[dict[str, Candidate]], float]

    def times(self, function: Callable[[], Any], calls: int = 1, samples: int = 1) -> Times:
        seconds = self.cost({kernel: in_use(self.bed.model, kernel) for kernel in KERNELS})
        return seconds, seconds, seconds


@pytest.mark.parametrize(
    ("columns", "out"),
    [
        (
            576,
            "16x256x5x4 16x512x3x4 16x512x4x4 16x512x6x4 16x1024x3x4 32x256x5x4 32x512x3x4 "
            "16x2048x2x8 32x256x4x4 32x512x4x4 64x256x4x4 16x2048x3x8 32x1024x3x8 64x512x3x8 32x512x3x8r128",
        ),
        (1536, "16x512x4x4 16x512x6x4 16x1024x3x4 32x512x4x4 16x2048x3x8 32x1024x3x8"),
        (2048, "16x512x6x4 16x1024x3x4 16x2048x3x8 32x1024x3x8"),
        (14336, ""),
    ],
)
def test_more_stages_than_a_weight_has_steps_are_left_out(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, columns: int, out: str
) -> None:
    monkeypatch.setattr(rules, "_weights", lambda _: {"up": (4096, columns)})
    left = set(rules.PRODUCTS) - set(candidates(bed.model, "up", dry=False))
    assert {rules._name(candidate) for candidate in left} == set(out.split())


def test_neither_twice_the_columns_nor_the_rule_in_use_is_tried(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = in_use(bed.model, "up")
    assert bed.model.layers[0].up.columns == 64
    every = (Product(16, 128, 1), Product(16, 64, 1), Product(16, 32, 2), Product(16, 32, 3), usual)
    monkeypatch.setattr(rules, "PRODUCTS", every)
    assert candidates(bed.model, "up", dry=False) == [Product(16, 64, 1), Product(16, 32, 2)]
    assert candidates(bed.model, "attend", dry=False) == [Attention(64, 4), Attention(128, 4), Attention(128, 8)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_kernel_is_launched_by_its_candidate_and_no_other(
    bed: Bed, launched: Counter[tuple[int, ...]], kernel: str
) -> None:
    marked: Candidate = Attention(64, 32) if kernel == "attend" else Product(16, 32, 7)
    run = (rules._head(bed) if kernel == "head" else rules._chain(bed)).run
    with torch.inference_mode(), replaced(bed.model, {kernel: marked}):
        assert [k for k in KERNELS if in_use(bed.model, k) == marked] == [kernel]
        run()
    mark = marked.warps if isinstance(marked, Attention) else marked.stages
    assert sum(count for own, count in launched.items() if mark in own) == 1


def test_no_warp_is_added_where_a_step_has_no_part_for_it(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_weights", lambda _: dict.fromkeys(("qkv", "up"), (4096, 4096)))
    most = {kernel: max(c.warps for c in candidates(bed.model, kernel, dry=False)) for kernel in ("qkv", "up")}
    assert most == {"qkv": 4, "up": 8}
    with replaced(bed.model, {"up": Product(16, 512, 2, 4)}):
        assert product_rules.product_rule(4096, 4096, 16, 8, 2, 90).warps == 8, "a candidate takes no warps away"


@pytest.mark.parametrize("kernel", sorted({*KERNELS} - {"attend"}))
def test_many_rows_of_one_kernel_are_launched_in_other_blocks(
    bed: Bed, launched: Counter[tuple[int, ...]], kernel: str
) -> None:
    marked = Blocks(8, 32, 0, 7, False)
    run = (rules._head(bed, MANY) if kernel == "head" else rules._chain(bed, MANY)).run
    with torch.inference_mode(), replaced(bed.model, {kernel: marked}):
        assert [k for k in KERNELS if in_use(bed.model, k, MANY) == marked] == [kernel]
        run()
    assert sum(count for own, count in launched.items() if marked.stages in own) == 1


@pytest.mark.parametrize("kernel", sorted({*KERNELS} - {"attend"}))
@pytest.mark.parametrize(
    "weight", [(960, 576), (2048, 2048), (16384, 2048), (2048, 8192), (28672, 4096), (128256, 2048)]
)
def test_blocks_for_many_rows_fit_and_change_no_sum(weight: tuple[int, int], kernel: str) -> None:
    rule = product_rules.product_rule(*weight, MANY, 8, 2, 90, summed=kernel == "head")
    found = rules.blocks(rule, kernel)
    assert len(found) == len(set(found)) >= 4
    assert {blocks.rows for blocks in found} == {8, 16}
    for blocks in found:
        own = rules._with(rule, blocks)
        assert (own.block_k, own.parts) == (rule.block_k, rule.parts)
        assert own.block_k % own.chunk == 0
        assert (own.block_n + own.rows) * own.chunk * 2 * (own.stages - 1) <= 227 * 1024
        assert own.rows == 16 or own.run is None
        assert kernel in ("qkv", "up", "head") or not own.norm_apart
        assert own.norm_apart or own.run is None or kernel in ("output", "down"), "squares are summed by whole steps"
        assert kernel != "head" or own.block_n == rule.block_n


def test_what_is_in_use_is_what_launchers_are_told(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {rules._weights(bed.model).get(kernel): in_use(bed.model, kernel) for kernel in KERNELS}
    told: dict[tuple[int, int] | None, Candidate] = {}

    def heard(module: Any, name: str, kind: type[Candidate], weight: slice | None) -> None:
        usual = getattr(module, name)

        def rule(*given: Any, **options: Any) -> Any:
            found = usual(*given, **options)
            told[given[weight] if weight else None] = kind(*(getattr(found, field) for field in kind._fields))
            return found

        monkeypatch.setattr(module, name, rule)

    heard(product_rules, "product_rule", Product, slice(2))
    heard(product_rules, "projection_rule", Product, slice(2, 4))
    heard(attention_rules, "attention_rule", Attention, None)
    with torch.inference_mode():
        rules._chain(bed).run()
        rules._head(bed).run()
    assert told == expected


@pytest.mark.parametrize("chosen", [{}, {"qkv": Product(16, 32, 2), "attend": Attention(64, 4)}])
def test_rules_are_back_after_an_exception(bed: Bed, chosen: dict[str, Candidate]) -> None:
    before = [getattr(*rule) for rule in RULES]
    with pytest.raises(ZeroDivisionError), replaced(bed.model, chosen):
        raise ZeroDivisionError
    assert [getattr(*rule) for rule in RULES] == before


def test_the_descent_keeps_the_fastest_of_each_kernel(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = Product(16, 32, 1), Product(16, 32, 2), Product(32, 32, 2)
    monkeypatch.setattr(rules, "PRODUCTS", (first, second, third))
    best = {"qkv": second, "attend": Attention(128, 8), "up": first, "head": third}

    def cost(given: dict[str, Candidate]) -> float:
        if given["output"] == second:
            raise RuntimeError("out of resource: shared memory")
        total = sum(1.0 if given[kernel] == own else SLOW for kernel, own in best.items())
        # What is fastest for down depends on what was kept for up.
        return total + (0.5 if given["down"] == (third if given["up"] == first else second) else SLOW)

    kept: dict[str, Candidate] = {}
    before = [getattr(*rule) for rule in RULES]
    found = []
    for figure in descend(Costs(bed.model.device, False, bed, cost), bed, kept):
        assert [getattr(*rule) for rule in RULES] == before, "the rules are those of the code between figures"
        found.append(figure)
    assert kept == best | {"down": third}
    notes = {figure.name: figure.note for figure in found}
    assert len(notes) == len(found) == 6 + 5 * 3 + 3
    assert notes["rule, output 16x32x2x4"] == "does not run: RuntimeError: out of resource: shared memory"
    assert notes["rule, qkv 16x32x2x4"] == f"÷ rule in use {(1 + 4 * SLOW) / (5 * SLOW):.3f}"
    assert notes["rule, output 16x32x1x4"] == "÷ rule in use 1.000"
    assert sum(note == "in use" for note in notes.values()) == len(KERNELS)
    assert {figure.median for figure in found if figure.name == "rule, output 16x32x2x4"} == {None}


def test_a_rule_in_use_that_fails_breaks_the_part(bed: Bed) -> None:
    def lost(_: dict[str, Candidate]) -> float:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        next(descend(Costs(bed.model.device, False, bed, lost), bed, {}))


def test_a_kernel_is_compiled_for_all_rows_and_by_every_candidate(launched: Counter[tuple[int, ...]]) -> None:
    (candidate,) = rules.DRY_PRODUCTS
    rules.compile_candidates("tiny-llama", "down", DRY, 1)
    assert launched == {(4, 1): len(rules.FEW_ROWS), (4, candidate.stages): 1}


def test_chain_and_steps_are_timed_again_by_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, compiled = Product(16, 32, 2), []

    class Halved(Clock):
        def times(self, function: Callable[[], Any], calls: int = 1, samples: int = 1) -> Times:
            up = product_rules.product_rule(256, 64, 1, 8, 2, 0)
            own = tuple(getattr(up, field) for field in Product._fields)
            return (1.0, 1.0, 1.0) if own == kept else (2.0, 2.0, 2.0)

    monkeypatch.setattr(rules, "Clock", Halved)
    monkeypatch.setattr(rules, "PRODUCTS", (kept,))
    monkeypatch.setattr(rules, "SHAPES", ("tiny-llama",))
    monkeypatch.setattr(rules, "LAYERS", {"tiny-llama": 3})
    monkeypatch.setattr(rules, "in_processes", lambda run, jobs: compiled.extend((run, *job[:2]) for job in jobs) or [])
    found = list(rules.fastest(replace(DRY, dry=False)))
    assert compiled == [(rules.compile_candidates, "tiny-llama", kernel) for kernel in KERNELS]
    assert {f.loop_bytes // f.bytes for f in found if f.name.startswith("chain")} == {3}
    ratios = {(f.name, f.rows): f.note for f in found if f.name.endswith("rules kept")}
    assert ratios.pop(("chain, rules kept", 1)) == "÷ rule in use 0.500; up 16x32x2x4"
    assert ratios == {("step, rules kept", rows): "÷ rule in use 0.500" for rows in (1, 8, 16)}


def test_a_dry_run_has_a_figure_for_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("skipjack.bench.step.DRY_FIELDS", {"num_hidden_layers": 1, "vocab_size": 64})
    monkeypatch.setattr(rules, "UNTIMED_LAYERS", 1)
    done = CliRunner().invoke(gpu.app, ["8", "--dry-run", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "gpu-rules-dry-run.json").read_text())
    assert (done.exit_code, result["broken"], result["rows"]) == (0, None, [])
    tried = Counter(figure["name"].split()[1] for figure in result["figures"] if figure["name"].startswith("rule, "))
    assert tried == dict.fromkeys(KERNELS, 2)
    others = [(figure["name"], figure["rows"]) for figure in result["figures"] if "rules" in figure["name"]]
    steps = [(f"step, rules {which}", rows) for rows in (1, 8, 16) for which in ("in use", "kept")]
    assert others == [("chain, rules in use", 1), ("chain, rules kept", 1), *steps]
    assert {figure["median"] for figure in result["figures"]} == {None}
    assert "does not run" not in str(result["figures"])
