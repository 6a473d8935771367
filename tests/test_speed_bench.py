"""The arithmetic of the speed benchmarks, forced acceptance, and their walk through the code at tiny sizes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.bench import clock, decode, passes, tables
from skipjack.bench.clock import Spread, paired
from skipjack.bench.forced_acceptance import ForcedVerify, accepted_counts, forced_acceptance
from skipjack.bench.micro import OPS, difference
from skipjack.bench.op_cases import CASES, Side
from skipjack.bench.point import Point
from skipjack.bench.project import costs_of
from skipjack.kernels.ops import TORCH, Ops
from skipjack.kernels.reference import packed
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.naming import field_shapes
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.commands import cli

SWIFT = "swift:skip_attention=1+3,skip_mlp=1+3,num_draft_tokens=4,threshold=0,search_budget=0"
CPU = torch.device("cpu")


@pytest.fixture
def small_rooflines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine could do is measured on little memory and a small product."""
    monkeypatch.setattr(clock, "HOST_BYTES", 1 << 20)
    monkeypatch.setattr(decode, "peak", partial(clock.peak, size=64))


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_forced_counts_follow_the_geometric_law(rate: float) -> None:
    counts = accepted_counts(rate)
    for k in (1, 4, 7):
        mean = float(counts.clamp(max=k).double().mean()) + 1
        assert mean == pytest.approx((1 - rate ** (k + 1)) / (1 - rate), rel=5e-3)
    assert float((counts == 0).double().mean()) == pytest.approx(1 - rate, abs=2e-3)


def test_a_forced_verdict_takes_the_table_and_no_more_than_was_drafted() -> None:
    table = accepted_counts(0.8)
    verify = ForcedVerify(table)
    target, draft = torch.arange(20).view(2, 10) % 7, torch.full((2, 9), -1)
    count, length = torch.tensor([9, 3]), torch.tensor([5, 70])
    for call in range(3):
        accepted, token, after, path = verify(target, draft, count, length)
        expected = torch.minimum(table[2 * call : 2 * call + 2], count)
        assert accepted.tolist() == expected.tolist()
        assert token.tolist() == [int(target[s, n]) for s, n in enumerate(expected)]
        assert after.tolist() == (length + expected + 1).tolist()
        assert path.tolist() == [[min(j, int(n)) for j in range(10)] for n in expected]
    with pytest.raises(ValueError, match="chain"):
        verify(target, draft, count, length, torch.zeros_like(draft))


def test_forced_rounds_reach_the_rate_and_leave_the_engine_honest(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny", late_scale=0.3)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    plain = engine.generate([5, 6, 7], params)
    with forced_acceptance(engine, 0.9):
        forced = engine.generate([5, 6, 7], params, method=SWIFT)
    expected = accepted_counts(0.9)[: forced.stats.rounds - 1].clamp(max=4).tolist()
    assert sum(expected) <= forced.stats.accepted <= sum(expected) + 4
    assert forced.token_ids != plain.token_ids
    assert engine.generate([5, 6, 7], params, method=SWIFT).token_ids == plain.token_ids


def test_rounds_on_the_device_are_forced_alike_and_no_graph_of_them_is_left() -> None:
    config = ModelConfig.parse(synthetic_config("tiny") | {"num_hidden_layers": 4}, "tiny")
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    weights = synthetic_weights(config, 0, torch.float32, 0.3)
    host, device = (Engine(config, weights, cache_tokens=512, graphs=graphs) for graphs in (False, True))
    expected = device.generate([5, 6, 7], params, method=SWIFT).token_ids
    forced: list[list[int]] = []
    for engine in (host, device):
        with forced_acceptance(engine, 0.7) as verify:
            for _ in range(2):
                verify.restart()
                output = engine.generate([5, 6, 7], params, method=SWIFT)
                forced.append([output.stats.rounds, output.stats.accepted, *output.token_ids])
    assert output.stats.graph_rounds == output.stats.rounds
    assert forced[0] == forced[1] == forced[2] == forced[3]
    assert device.generate([5, 6, 7], params, method=SWIFT).token_ids == expected != output.token_ids


def test_bytes_of_a_pass_are_those_of_the_weights() -> None:
    for shape in ("135m", "8b", "4b", "tiny-bloom"):
        config = ModelConfig.parse(synthetic_config(shape), shape)
        sizes = {name: torch.Size(shape).numel() for name, shape in field_shapes(config).items()}
        matrices = sum(sizes[name] for name in ("qkv", "output", "up", "down"))
        total = 2 * (matrices + config.vocab_size * config.hidden_size)
        assert passes.pass_bytes(config, 2, 0) == total
        cached = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
        assert passes.pass_bytes(config, 2, 100) - total == 100 * cached
        assert passes.pass_bytes(config, 2, 100, 0) == 2 * config.vocab_size * config.hidden_size


def test_pairs_run_in_order_and_backwards() -> None:
    order: list[str] = []
    names = ("a", "b", "c")
    taken = paired({name: lambda name=name: float(order.append(name) or len(order)) for name in names}, 2)
    assert "".join(order) == "abccbaabccba"
    assert [len(samples) for samples in taken.values()] == [4, 4, 4]


def test_the_line_through_draft_times() -> None:
    line = decode.fit([(0, 1.0), (4, 3.0), (8, 5.0)])
    assert (line.fixed, line.layer, line.r2) == pytest.approx((1.0, 0.5, 1.0))
    assert decode.fit([(0, 0.0), (1, 1.0), (2, 0.0)]).r2 == pytest.approx(0.0)
    assert Spread.of([3.0, 1.0, 2.0]).median == 2.0


def test_every_op_is_timed() -> None:
    ops = [field.name for field in fields(Ops)]
    assert {*ops[ops.index("enter") :]} == {op.partition(" ")[0] for op in OPS}


def test_every_op_has_a_case_that_holds_it_against_another_table() -> None:
    called: set[str] = set()

    def noted(name: str) -> Callable[..., Any]:
        def op(*given: Any, **options: Any) -> Any:
            called.add(name)
            return getattr(TORCH, name)(*given, **options)

        return op

    ops = [field.name for field in fields(Ops)]
    own = ops[ops.index("enter") :]
    side = Side(replace(TORCH, **{name: noted(name) for name in own}), CPU, torch.float32, torch.float32)
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    with torch.inference_mode():
        for case in CASES.values():
            case(side, config, 9, TORCH.decode_tile)
    assert called == {*own}


def test_a_group_of_ops_is_timed_by_the_name_they_share() -> None:
    where = Path(__file__).parent.parent / "bench" / "test_speed.py"
    given = [str(where), "--collect-only", "-q", "--shape", "tiny-llama"]
    runs = [[*given, "--op=linear", "--op=head"], [*given, "--op=head", "--op=matmul"]]
    script = f"import pytest\nfor run in {runs}: pytest.main(run); print('end of run')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    found, refused, _ = done.stdout.split("end of run")
    assert {op for op in OPS if f"[tiny-llama-{op}-1-" in found} == {
        "head", *(op for op in OPS if op.startswith("linear"))
    }  # fmt: skip
    assert "--op: expected one of normalise, linear (output), " in refused


@pytest.mark.parametrize("op", OPS)
def test_every_timed_op_agrees_with_plain_pytorch(op: str) -> None:
    for shape in ("tiny-llama", "tiny-qwen3"):
        config = ModelConfig.parse(synthetic_config(shape), shape)
        launch = OPS[op](Point(TORCH, config, CPU, torch.float32, 9, 300))
        with torch.inference_mode():
            assert difference(launch.op(), launch.plain()) < 1e-5
        assert launch.bytes > 0


def test_a_difference_is_seen() -> None:
    x = torch.ones(3)
    assert difference((x,), (x,)) == 0
    assert difference((x * torch.nan,), (x,)) == float("inf")
    assert difference((x.long() * 2,), (x.long(),)) == float("inf")


@pytest.mark.usefixtures("small_rooflines")
def test_decode_is_measured_written_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled kernels are no operators of PyTorch's, which are counted here.
    monkeypatch.setenv("SKIPJACK_CPU_KERNELS", "torch")
    path = tmp_path / "decode.json"
    sizes = ["--context", "20", "--rows", "2", "--pairs", "1", "--repeats", "1", "--tokens", "9", "--draft", "2"]
    sizes += ["--prompt", "5", "--prompt", "70"]
    arguments = ["bench", "decode", "synthetic:tiny", *sizes, "--rate", "0.5", "--output", str(path), "--json"]
    assert cli.run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(path.read_text())
    verify = {one["rows"]: one for one in result["passes"] if one["kind"] == "verify"}
    drafts = [one for one in result["passes"] if one["kind"] == "draft"]
    assert set(verify) == {1, 2}
    assert verify[1]["ratio"]["median"] == 1
    assert [one["layers"] for one in drafts] == [0, 2, 4, 6, 8]
    assert drafts[0]["bubble"] is None
    one = verify[1]
    seconds, rate = one["seconds"]["median"], result["bandwidth"][result["of"]]
    assert one["share"] == pytest.approx(one["bytes"] / seconds / rate)
    assert one["bubble"] == pytest.approx((seconds - one["bytes"] / rate) / 8)
    for found in result["rounds"]:
        parts = (found["k"] * found["draft"] + found["verify"]) / found["seconds"]["median"]
        assert found["glue"] == pytest.approx(1 - parts)
        assert found["of_possible"] == pytest.approx(found["speed"]["median"] / found["possible"])
    assert [found["method"].partition(":")[0] for found in result["rounds"]] == ["swift", "layerskip"]
    assert cli.run(["bench", "table", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| K | ms | MB |" in printed
    assert "Measured on" in printed
    costs = costs_of(result)
    assert dict(costs.verify_by_rows)[1] == one["seconds"]["median"]
    assert [layers for layers, _ in costs.draft_by_layers] == [0, 2, 4, 6, 8]
    product = "mkldnn::_linear_pointwise" if packed.available(torch.float32) else "aten::linear"
    assert f"| {product} | 33 |" in printed, "four products a layer, and the head"
    assert sum(one["share"] for one in result["operators"]) == pytest.approx(1)
    assert [one["tokens"] for one in result["prompts"]] == [5, 70]
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    for one in result["prompts"]:
        assert one["flops"] * one["seconds"]["median"] == pytest.approx(2 * matrices(config, one["tokens"]))
    assert len(tables.decode(result)) == 5
    assert len(tables.decode({**result, "prompts": []})) == 4, "files of before have none"


def matrices(config: ModelConfig, tokens: int) -> int:
    """Multiply-adds of a prompt with every matrix a model has, with its head's for one token."""
    layers = [shape for shape in field_shapes(config).values() if len(shape) == 3]
    return tokens * sum(torch.Size(shape).numel() for shape in layers) + config.vocab_size * config.hidden_size


def test_a_prompt_longer_than_the_context_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "decode", "synthetic:tiny", "--prompt", "100000"]) == 2
    assert "--prompt: expected 1 to " in capsys.readouterr().err


def test_decode_refuses_a_method_that_drafts_with_no_layers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "bandwidth", lambda *_: pytest.fail("measured before it is refused"))
    assert cli.run(["bench", "decode", "synthetic:tiny", "--method", "lookup"]) == 2
    assert "drafts with some of the layers" in capsys.readouterr().err


@pytest.mark.usefixtures("small_rooflines")
def test_a_dry_run_prints_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "decode", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing measured" in printed.err
