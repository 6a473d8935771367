"""FlexiDepth: the golden cases, a float64 teacher-forced reference, batches, refusals, and what a run tells."""

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from skipjack import Engine, RequestError, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors, load_weights
from skipjack.runtime.commands import cli
from skipjack.runtime.model import Model
from skipjack.runtime.routes import Routes, layers_used
from skipjack.runtime.rows import one_sequence

CASES = ("flexidepth-1", "flexidepth-2")
PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 90)), [400, 3, 3, 17, 250, 8]]
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


class Forward(NamedTuple):
    """logits [T, V]; router logits [N, T] and skip [N, T] of the routed layers."""

    logits: Tensor
    router: Tensor
    skip: Tensor


def in_float64(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: list[int], *, kv: str = "own", gate: str = "released"
) -> Forward:
    """FlexiDepth from a checkpoint's tensors, one teacher-forced pass, no code of the package.

    kv "none": tokens that skip a layer are not seen there by later ones; gate "ste_hard": nothing is scaled.
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    dim = fields.get("head_dim") or fields["hidden_size"] // heads
    eps, count = fields["rms_norm_eps"], len(ids)
    angle = torch.arange(count).double()[:, None] * fields.get("rope_theta", 1e4) ** (
        -torch.arange(0, dim, 2).double() / dim
    )
    cos, sin = (torch.cat([f(angle), f(angle)], -1)[:, None] for f in (torch.cos, torch.sin))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def gated(x: Tensor, gate: str, up: str, down: str) -> Tensor:
        return (torch.nn.functional.silu(x @ weights[gate].T) * (x @ weights[up].T)) @ weights[down].T

    x = weights["model.embed_tokens.weight"][ids]
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    routers, skips = [], []
    for layer in range(fields["num_hidden_layers"]):
        lead = f"model.layers.{layer}."
        z = norm(x, weights[lead + "input_layernorm.weight"])
        run, weight = torch.ones(count, dtype=torch.bool), torch.ones(count).double()
        if layer in fields["routing_layers"]:
            code = norm(z @ weights[lead + "router.router_enc.weight"].T, weights[lead + "router.router_norm.weight"])
            logit = torch.tanh(code) @ weights[lead + "router.router_dec.weight"].T
            logit = (logit @ weights[lead + "router.router_head.weight"].T)[:, 0]
            run, weight = logit > 0, logit.sigmoid()
            routers.append(logit)
            skips.append(~run)
        q, k, v = (
            (z @ weights[f"{lead}self_attn.{part}_proj.weight"].T).view(count, number, dim)
            for part, number in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        )
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        seen = causal & run[None, :] if kv == "none" else causal
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(), v)
        attended = mixed.reshape(count, -1) @ weights[lead + "self_attn.o_proj.weight"].T
        x = x + run[:, None] * attended
        y = norm(x, weights[lead + "post_attention_layernorm.weight"])
        out = gated(y, *(f"{lead}mlp.{part}_proj.weight" for part in ("gate", "up", "down")))
        if layer in fields["routing_layers"]:
            adapted = gated(y, *(f"{lead}router_proj.{part}_proj.weight" for part in ("gate", "down", "up")))
            if gate == "released":
                out, adapted = weight[:, None] * out, (1 - weight)[:, None] * adapted
            out = torch.where(run[:, None], out, adapted)
        x = x + out
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = norm(x, weights["model.norm.weight"]) @ head.T
    return Forward(logits, torch.stack(routers), torch.stack(skips))


@cache
def engine(method: str = "flexidepth", dtype: torch.dtype = torch.float32, gate: str = "released") -> Engine:
    config = ModelConfig.parse(synthetic_config("routed-tiny") | {"router_gate": gate}, "routed-tiny")
    return Engine(config, synthetic_weights(config, 0, dtype, 0.3), method=method, cache_tokens=4096)


def case(golden: Path, name: str, **changed: object) -> tuple[Engine, dict]:
    expected = json.loads((golden / name / "expected.json").read_text())
    fields = json.loads((golden / name / "config.json").read_text()) | changed
    config = ModelConfig.parse(fields, name)
    return Engine(config, load_weights(golden / name, config, torch.float32), method="flexidepth"), expected


def generate(engine: Engine, run: dict, method: str | None = None) -> list[int]:
    params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
    return engine.generate(run["prompt_ids"], params, method=method).token_ids


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_layers_of_the_golden_cases(golden: Path, name: str) -> None:
    routed, expected = case(golden, name)
    run = expected["runs"][0]
    output = routed.generate(run["prompt_ids"], SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True))
    assert output.token_ids == run["token_ids"]
    used = [len(mask) - sum(mask) for mask in run["skip_mask"]]
    prompt, stats = len(run["prompt_ids"]), output.stats
    assert list(stats.layers_per_prompt_token) == used[:prompt]
    assert list(stats.layers_per_token) == used[prompt - 1 :]
    assert stats.executed_skips == 2 * sum(map(sum, run["skip_mask"])) > 0
    assert stats.layers_kept == pytest.approx(sum(used[prompt:]) / len(used[prompt:]))
    assert not stats.lossless
    assert not stats.notes


@pytest.mark.parametrize("name", CASES)
def test_routes_and_logits_of_the_golden_cases(golden: Path, name: str) -> None:
    config = ModelConfig.load(golden / name)
    expected = json.loads((golden / name / "expected.json").read_text())
    run = expected["runs"][0]
    model = Model(config, load_weights(golden / name, config, torch.float32), TORCH)
    cache, ids = model.new_cache(1), run["prompt_ids"] + run["token_ids"][:-1]
    routes: Routes = {}
    rows = one_sequence(ids, 0, cache.reserve(len(ids)), 8, model.device)
    hidden = model.forward(rows, cache, model.full, routes=routes)
    assert tuple(routes) == config.routing.layers
    mask = torch.tensor(run["skip_mask"])
    for layer, route in routes.items():
        logits = torch.tensor(run["router_logits"][str(layer)])
        assert (route.weight.logit() - logits).abs().max() < 2e-4
        assert torch.equal(route.skip.long(), mask[:, layer])
        assert torch.equal(route.run, ~route.skip)
    assert torch.equal(layers_used(routes, config.num_layers), config.num_layers - mask.sum(dim=1))
    first = model.logits(hidden[len(run["prompt_ids"]) - 1][None])[0]
    values = torch.tensor(run["first_logits"]["values"])
    assert (first[: len(values)] - values).abs().max() < 2e-4
    assert float(first.logsumexp(0)) == pytest.approx(run["first_logits"]["logsumexp"], abs=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_other_readings_of_the_golden_cases(golden: Path, name: str) -> None:
    """Skipped tokens without keys, nothing scaled by w, and nothing routed, which no method is to run."""
    routed, expected = case(golden, name)
    run, other = expected["runs"][0], expected["known_wrong"]
    assert generate(routed, run, "flexidepth:kv=none") == other["drop_kv"]["token_ids"]
    hard, _ = case(golden, name, router_gate="ste_hard")
    assert generate(hard, run) == other["hard_gate"]["token_ids"]
    with pytest.raises(RequestError, match="expected flexidepth, which a ddllama checkpoint is made for, got lookup"):
        generate(routed, run, "lookup")


@pytest.mark.parametrize(("kv", "gate"), [("own", "released"), ("none", "released"), ("own", "ste_hard")])
def test_decoding_is_the_teacher_forced_float64_pass(kv: str, gate: str) -> None:
    fields = synthetic_config("routed-tiny")
    config = ModelConfig.parse(fields, "routed-tiny")
    tensors = checkpoint_tensors(synthetic_weights(config, 0, torch.float32, 0.3), config)
    prompt = PROMPTS[0]
    output = engine(gate=gate).generate(prompt, LONG, method=f"flexidepth:kv={kv}")
    expected = in_float64(fields, tensors, prompt + output.token_ids[:-1], kv=kv, gate=gate)
    assert expected.router.abs().min() > 1e-4
    top = expected.logits[len(prompt) - 1 :].topk(2)
    assert (top.values[:, 0] - top.values[:, 1]).min() > 1e-4
    assert output.token_ids == top.indices[:, 0].tolist()
    used = (config.num_layers - expected.skip.sum(dim=0)).tolist()
    assert list(output.stats.layers_per_prompt_token) == used[: len(prompt)]
    assert list(output.stats.layers_per_token) == used[len(prompt) - 1 :]
    assert len(set(used)) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", ["own", "none"])
def test_a_batch_gives_the_tokens_and_layers_of_each_prompt_alone(kv: str, dtype: torch.dtype) -> None:
    routed, method = engine(dtype=dtype), f"flexidepth:kv={kv}"
    together = routed.generate(PROMPTS, LONG, method=method)
    for prompt, output in zip(PROMPTS, together, strict=True):
        alone = routed.generate(prompt, LONG, method=method)
        assert output.token_ids == alone.token_ids
        assert output.stats.layers_per_token == alone.stats.layers_per_token
        assert output.stats.executed_skips == alone.stats.executed_skips
    assert len({output.stats.layers_per_token for output in together}) == len(PROMPTS)


def test_a_prompt_is_routed_as_decoding_routes_it() -> None:
    model, cache = engine()._loaded()
    ids = PROMPTS[2]
    results = []
    for step in (len(ids), 1):
        pages, parts = cache.reserve(len(ids)), []
        with torch.inference_mode():
            for start in range(0, len(ids), step):
                routes: Routes = {}
                rows = one_sequence(ids[start : start + step], start, pages, 8, model.device)
                hidden = model.forward(rows, cache, model.full, routes=routes)
                parts.append((hidden, torch.stack([route.weight for route in routes.values()])))
        cache.release(pages)
        results.append((torch.cat([hidden for hidden, _ in parts]), torch.cat([weight for _, weight in parts], 1)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kv", ["own", "none"])
def test_a_prompt_read_in_chunks_is_routed_the_same(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, params = [(7 * i) % 500 + 3 for i in range(150)], SamplingParams(max_tokens=4, ignore_eos=True)
    whole = engine().generate(prompt, params, method=f"flexidepth:kv={kv}")
    monkeypatch.setattr("skipjack.runtime.prefill.PREFILL_CHUNK", 64)
    chunks = engine().generate(prompt, params, method=f"flexidepth:kv={kv}")
    assert chunks.token_ids == whole.token_ids
    assert chunks.stats.layers_per_prompt_token == whole.stats.layers_per_prompt_token
    assert len(whole.stats.layers_per_prompt_token) == 150


def test_a_run_that_skipped_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    fields = synthetic_config("routed-tiny") | {"router_threshold": 0.0, "routers_trained": True}
    config = ModelConfig.parse(fields, "routed-tiny")
    whole = Engine(config, synthetic_weights(config, 0, torch.float32, 0.3), method="flexidepth", cache_tokens=512)
    stats = whole.generate(PROMPTS[0], LONG).stats
    assert stats.executed_skips == 0
    assert set(stats.layers_per_token) == {8.0}
    assert stats.notes == ("nothing was skipped: every layer ran for every token",)
    assert engine().generate(PROMPTS[0], LONG).stats.notes == (
        "the routers are untrained: what they skip, and the text, mean nothing",
    )


def test_sampling_is_seeded_and_stops_count(synthetic: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=3, n=2, ignore_eos=True)
    one, two = (engine().generate(PROMPTS[3], params) for _ in range(2))
    assert [choice.token_ids for choice in one.choices] == [choice.token_ids for choice in two.choices]
    assert one.choices[0].token_ids != one.choices[1].token_ids
    with pytest.raises(RequestError, match="method flexidepth: expected model_type ddllama, got llama"):
        synthetic().generate(PROMPTS[0], LONG, method="flexidepth")
    with pytest.raises(RequestError, match="method flexidepth: option kv expects own or none, got 'shared'"):
        engine().generate(PROMPTS[0], LONG, method="flexidepth:kv=shared")


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt-ids", "1,2"],
        ["chat"],
        ["tune", "-o", "set.json"],
        ["inspect", "--lens-ids", "1,2"],
    ],
)
def test_a_routed_checkpoint_is_never_run_as_a_plain_one(golden: Path, capsys, command) -> None:
    assert cli.run([command[0], str(golden / CASES[0]), *command[1:]]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "expected flexidepth, which a ddllama checkpoint is made for, got autoregressive" in streams.err


def test_the_command_line_tells_layers_and_inspect_tells_routers(golden: Path, capsys) -> None:
    folder = str(golden / CASES[0])
    line = ["generate", folder, "--prompt-ids", "1,2,3", "--max-tokens", "4", "--method", "flexidepth", "--json"]
    assert cli.run(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lossless"] is False
    assert len(report["layers"]["per_token"]) == 4
    assert len(report["layers"]["per_prompt_token"]) == 3
    assert cli.run(["inspect", folder, "--json"]) == 0
    anatomy = json.loads(capsys.readouterr().out)
    assert anatomy["methods"] == ["flexidepth"]
    assert anatomy["routing"]["layers"] == [3, 4, 5]
    tensors = load_file(Path(folder) / "model.safetensors")
    routers = sum(tensor.numel() for name, tensor in tensors.items() if ".router" in name)
    assert anatomy["parts"]["routers"]["parameters"] == routers
    assert anatomy["parts"]["other"]["parameters"] == 0
