"""Direct Multi-Token Decoding: the golden cases, every convention against float64, and the work that is not done."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from skipjack import Engine, RequestError, SamplingParams
from skipjack.bench import cycles
from skipjack.loaders.config import Cycle, ModelConfig
from skipjack.loaders.save import save_checkpoint
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.loaders.weights import checkpoint_tensors
from skipjack.runtime.batch import Batch
from skipjack.runtime.cache import KVCache
from skipjack.runtime.commands import cli
from skipjack.runtime.commands.anatomy import examine
from skipjack.runtime.commands.report import report
from skipjack.runtime.costs import Costs
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.dmtd import Cycles, DirectMultiToken
from skipjack.runtime.model import Model
from skipjack.runtime.sequence import Sequence
from skipjack.runtime.stepwise import at_once

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 31)), [400, 3, 3, 17, 250, 8]]
CONVENTIONS = [f"prefill={a},phase={b}" for a, b in product(("plain", "readd", "cyclic"), ("prompt", "absolute"))]


def parsed(encoding: int = 0, **fields: object) -> ModelConfig:
    split = {"num_encoding_layers": encoding, "num_thinking_layers": 6 - encoding}
    return ModelConfig.parse(synthetic_config("tiny-dmtd") | split | fields, "tiny-dmtd")


@cache
def engine(encoding: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    """Eight layers, the last two of which decode."""
    config = parsed(encoding)
    return Engine(config, synthetic_weights(config, 0, dtype, 1.0), method="dmtd", **options)


class Teacher:
    """The whole model in float64, every position of a text at once, after §3 of the paper; knows nothing of a cache."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
        assert config.cycle is not None
        self.config, self.cycle = config, config.cycle
        self.tensors = {name.removeprefix("model."): tensor.double() for name, tensor in tensors.items()}
        self.tensors.setdefault("lm_head.weight", self.tensors["embed_tokens.weight"])

    def logits(self, tokens: list[int], prompt: int, method: str) -> Tensor:
        """[T, V]: what follows every token of a text whose first `prompt` tokens were given."""
        options = dict(item.split("=") for item in method.split(","))
        tau = int(options.get("horizon", self.cycle.horizon))
        place = torch.arange(len(tokens))
        head = (place - (prompt if options["phase"] == "prompt" else 0)) % tau == 0
        causal = place[:, None] >= place
        shadow = options.get("history") == "shadow"
        known = causal & ((place < prompt) | head | (place[:, None] == place)) if shadow else causal
        e = self._layers(range(self.cycle.encoding), self.tensors["embed_tokens.weight"][torch.tensor(tokens)], causal)
        think = self.cycle.encoding + self.cycle.thinking
        t = self._layers(range(self.cycle.encoding, think), e, known)
        given = {"plain": t, "readd": e + t, "cyclic": e + (place % tau == 0)[:, None] * t}[options["prefill"]]
        d = torch.where((place < prompt)[:, None], given, e + head[:, None] * t)
        d = self._layers(range(think, self.config.num_layers), d, causal)
        return self._norm(d, self.tensors["norm.weight"]) @ self.tensors["lm_head.weight"].T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * weight

    def _layers(self, numbers: range, x: Tensor, sees: Tensor) -> Tensor:
        for number in numbers:
            w = {k.removeprefix(f"layers.{number}."): v for k, v in self.tensors.items() if f"layers.{number}." in k}
            x = x + self._attention(w, self._norm(x, w["input_layernorm.weight"]), sees)
            y = self._norm(x, w["post_attention_layernorm.weight"])
            gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
            x = x + (functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T
        return x

    def _attention(self, w: dict[str, Tensor], x: Tensor, sees: Tensor) -> Tensor:
        width = self.config.head_dim

        def heads(part: str) -> Tensor:
            y = (x @ w[f"self_attn.{part}_proj.weight"].T).view(len(x), -1, width)
            return y if part == "v" else self._rotated(self._norm(y, w[f"self_attn.{part}_norm.weight"]))

        q, k, v = (heads(part).transpose(0, 1) for part in "qkv")
        k, v = (y.repeat_interleave(len(q) // len(y), dim=0) for y in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(~sees, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T

    def _rotated(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        frequency = self.config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = (torch.arange(len(x), dtype=torch.float64)[:, None] * frequency).repeat(1, 2)[:, None]
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
        return x * angle.cos() + half * angle.sin()


def check_choices(logits: Tensor, prompt: list[int], ids: list[int]) -> None:
    """Every generated id is the reference's choice, or ties with it to the precision of float32."""
    at = logits[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
    behind = at.amax(-1) - at.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert behind.max() < 1e-4, behind


def steps(ran: list[tuple[int, int]], layers: int) -> Iterator[list[tuple[int, int]]]:
    """The sub-layers of each pass to the last layer, with their rows."""
    start = 0
    for end, (sublayer, _) in enumerate(ran, 1):
        if sublayer == 2 * layers - 1:
            yield ran[start:end]
            start = end


@pytest.mark.parametrize("case", ["dmtd-1", "dmtd-2"])
def test_golden_cases(golden: Path, audit: Callable[..., Any], case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())
    loaded = Engine.load(golden / case, method="dmtd", dtype="float32")
    watched, (model, kv), config = audit(loaded), loaded._loaded(), loaded.config
    teacher = Teacher(config, load_file(golden / case / "model.safetensors"))
    thinks = 2 * config.cycle.encoding
    for run in expected["runs"]:
        options = ",".join(f"{key}={value}" for key, value in run["options"].items())
        prompt, first = run["prompt_ids"], run["first_logits"]
        params = SamplingParams(max_tokens=run["max_new_tokens"], ignore_eos=True)
        watched.ran.clear()
        output = loaded.generate(prompt, params, method=f"dmtd:{options}")
        assert output.token_ids == run["token_ids"], options
        if "decode_rows" in run:
            _, *decoded = steps(watched.ran, config.num_layers)
            rows = [[dict(step).get(thinks, 0), dict(step)[2 * config.num_layers - 2]] for step in decoded]
            assert rows == run["decode_rows"], options

        method = registry.parse(f"dmtd:{options}").build(config)
        assert isinstance(method, DirectMultiToken)
        sequence = Sequence(0, 0, prompt, params, 0, frozenset(), 512, None, pages=kv.reserve(len(prompt)))
        with torch.inference_mode():
            logits = model.logits(at_once(method.read(model, kv, sequence)).hidden)[0]
        kv.release(sequence.pages)
        reference = teacher.logits(prompt + output.token_ids, len(prompt), options)
        check_choices(reference, prompt, output.token_ids)
        for mine in (logits.double(), reference[len(prompt) - 1]):
            assert torch.allclose(mine[:16], torch.tensor(first["values"]).double(), atol=2e-4, rtol=0)
            assert mine.argmax() == first["argmax"]
            assert mine.logsumexp(0).item() == pytest.approx(first["logsumexp"], abs=2e-4)


@pytest.mark.parametrize("split", ["encoding 0", "encoding 2", "shadow"])
def test_every_convention_and_horizon_against_float64(audit: Callable[..., Any], split: str) -> None:
    shared = engine(2 if split == "encoding 2" else 0)
    config, watched = shared.config, audit(shared)
    teacher = Teacher(config, checkpoint_tensors(synthetic_weights(config, 0, torch.float32), config))
    texts = set()
    for number, conventions in enumerate(CONVENTIONS * 2):
        horizon, prompt = (2, 3, 4, 6)[number % 4], PROMPTS[number % 4]
        options = f"{conventions},horizon={horizon}" + (",history=shadow" if split == "shadow" else "")
        output = shared.generate(prompt, SamplingParams(max_tokens=15, ignore_eos=True), method=f"dmtd:{options}")
        check_choices(teacher.logits(prompt + output.token_ids, len(prompt), options), prompt, output.token_ids)
        texts.add((number % 4, tuple(output.token_ids)))
    assert len(texts) > 8, "the conventions must matter for their tests to mean anything"
    assert watched.reads > 1000


@pytest.mark.parametrize(("encoding", "history"), [(0, "real"), (2, "real"), (0, "shadow")])
def test_layers_that_are_skipped_do_not_run(audit: Callable[..., Any], encoding: int, history: str) -> None:
    shared = engine(encoding)
    watched = audit(shared)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    output = shared.generate(PROMPTS[0], params, method=f"dmtd:history={history}")
    _, *decoded = steps(watched.ran, 8)
    own = [(i, 1) for i in range(16) if i < 2 * encoding or i >= 12]
    for number, step in enumerate(decoded):
        refill = 4 if number and history == "real" else 1
        thinking = [] if number % 4 else [(i, refill) for i in range(2 * encoding, 12)]
        assert sorted(step) == sorted(own + thinking)
    assert output.stats.layers_per_token == (8.0, *[8.0 if n % 4 == 0 else 2.0 + encoding for n in range(9)])
    assert output.stats.executed_skips == 6 * 2 * (6 - encoding)
    written = watched.written[:, 1:].sum(dim=(1, 2)).tolist()
    lag = 4 + 9 if history == "real" else 4 + 3
    assert written[encoding:6] == [lag] * (6 - encoding), "a cycle that has just begun lags by nothing"
    assert written[6:] == [4 + 9] * 2


@pytest.mark.parametrize("method", ["dmtd", "dmtd:horizon=3,phase=absolute,prefill=cyclic", "dmtd:history=shadow"])
def test_a_batch_gives_what_each_prompt_gives_alone(audit: Callable[..., Any], method: str) -> None:
    """With cycles that coincide and that do not, sequences that end at different times, and two choices a prompt."""
    shared = engine(0, torch.bfloat16)
    audit(shared)
    for fields in ({}, {"temperature": 1.0, "seed": 11, "n": 2}):
        params = SamplingParams(max_tokens=11, ignore_eos=True, stop_token_ids=range(0, 512, 7), **fields)
        together = shared.generate(PROMPTS, params, method=method)
        alone = [shared.generate(prompt, params, method=method) for prompt in PROMPTS]
        ids = [[choice.token_ids for choice in output.choices] for output in together]
        assert ids == [[choice.token_ids for choice in output.choices] for output in alone]
        assert len({len(choice) for choices in ids for choice in choices}) > 1
        assert all(output.stats.bonus + len(output.choices) == output.stats.completion_tokens for output in together)
    assert shared._loaded()[1].free_pages == shared._loaded()[1].total_pages


def test_a_batch_of_encoded_prompts_gives_what_each_gives_alone() -> None:
    params = SamplingParams(max_tokens=11, ignore_eos=True)
    for method in ("dmtd", "dmtd:phase=absolute"):
        together = [output.token_ids for output in engine(2).generate(PROMPTS, params, method=method)]
        assert together == [engine(2).generate(prompt, params, method=method).token_ids for prompt in PROMPTS]


def test_who_joins_late_waits_for_a_head(audit: Callable[..., Any]) -> None:
    """Cycles that coincide are what makes a batch gain: one thinking pass serves all of its heads."""
    shared = engine(max_sequences=2)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    known = shared.generate(PROMPTS[0], params).token_ids
    stop = next(token for at, token in enumerate(known) if at > 1 and at % 4 and token not in known[:at])
    ending = replace(params, stop_token_ids=[stop])
    alone = [shared.generate(prompt, ending).token_ids for prompt in PROMPTS[:3]]
    assert len(alone[0]) < 12
    assert len(alone[1]) == 12
    watched = audit(shared)
    assert [output.token_ids for output in shared.generate(PROMPTS[:3], ending)] == alone
    rows = [dict(step).get(0, 0) for step in steps(watched.ran, 8)]
    late = rows.index(len(PROMPTS[2]))
    assert rows[late + 1] == 4 + 1, "the newcomer's first token is a head together with the other's"
    assert rows[late - 1] == 0, "the pass before was the end of a cycle"


def test_ends_exactly_at_max_tokens_and_stop_tokens() -> None:
    shared = engine()
    whole = shared.generate(PROMPTS[2], SamplingParams(max_tokens=11, ignore_eos=True)).token_ids
    for count in range(1, 11):
        output = shared.generate(PROMPTS[2], SamplingParams(max_tokens=count, ignore_eos=True))
        assert (output.token_ids, output.finish_reason) == (whole[:count], "length")
    for stop in dict.fromkeys(whole):
        output = shared.generate(PROMPTS[2], SamplingParams(max_tokens=11, ignore_eos=True, stop_token_ids=[stop]))
        assert (output.token_ids, output.finish_reason) == (whole[: whole.index(stop) + 1], "stop")


def test_streaming_and_sampling_with_a_seed() -> None:
    shared = engine()
    params = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.9, seed=5, ignore_eos=True)
    expected = shared.generate(PROMPTS[0], params).token_ids
    assert expected != shared.generate(PROMPTS[0], replace(params, seed=6)).token_ids
    stream = shared.stream(PROMPTS[0], params)
    assert [token for chunk in stream for token in chunk.token_ids] == expected
    assert not stream.outputs[0].stats.lossless


def test_a_head_that_forgets_to_refill_is_caught(audit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The hole that a cycle leaves is what the audit is for."""
    shared = engine()
    audit(shared)
    think = Cycles._think

    def forgetful(self: Cycles, model: Model, cache: KVCache, batch: Batch, *rest: Any) -> Any:
        return think(self, model, cache, replace(batch, prompt=batch.length), *rest)

    monkeypatch.setattr(Cycles, "_think", forgetful)
    with pytest.raises(AssertionError, match="layer 0 reads slot 5, which was never written there"):
        shared.generate(PROMPTS[0], SamplingParams(max_tokens=6, ignore_eos=True))
    assert shared._loaded()[1].free_pages == shared._loaded()[1].total_pages


@pytest.mark.parametrize(("horizon", "bound"), [(2, 1.54), (3, 1.88), (4, 2.11), (6, 2.41)])
def test_bounds_of_the_published_shape(horizon: int, bound: float) -> None:
    config = ModelConfig.parse(synthetic_config("4b-dmtd"), "4b-dmtd")
    assert config.cycle == Cycle(0, 28, 8, 4)
    method = registry.parse(f"dmtd:horizon={horizon}").build(config)
    assert isinstance(method, DirectMultiToken)
    assert round(method.bound or 0, 2) == bound


def test_tokens_per_weight_pass() -> None:
    """Counted over whole cycles it is the bound; a batch whose heads fall apart has more passes to think in."""
    layer = 2 * (4 + 2) * 32 * 64 + 3 * 64 * 128
    head = 512 * 64 / layer
    params = SamplingParams(max_tokens=1 + 3 * 4, ignore_eos=True)
    stats = engine().generate(PROMPTS[0], params).stats
    assert stats.weight_passes == pytest.approx((3 * (8 + head) + 9 * (2 + head)) / (8 + head))
    assert stats.tokens_per_weight_pass == pytest.approx(4 * (8 + head) / (8 + head + 3 * (2 + head)))
    assert stats.weight_pass_bound == pytest.approx(stats.tokens_per_weight_pass)
    apart = engine().generate([[5] * n for n in range(4, 8)], params, method="dmtd:phase=absolute")
    assert apart[0].stats.tokens_per_weight_pass == pytest.approx(1)
    together = report(engine().generate(PROMPTS, params)[3])
    assert together["weights"]["tokens_per_pass"] == pytest.approx(together["weights"]["tokens_per_pass_bound"])
    assert together["layers"]["kept"] == (8 + 3 * 2) / 4, "of the tokens of a cycle, on average"


@pytest.mark.parametrize("model_type", ["mtpqwen3", "dmtdqwen3"])
def test_sharded_checkpoints_load(tmp_path: Path, model_type: str) -> None:
    fields = synthetic_config("tiny-dmtd") | {"model_type": model_type}
    config = ModelConfig.parse(fields, "tiny-dmtd")
    tensors = checkpoint_tensors(synthetic_weights(config, 0, torch.float32, 1.0), config)
    save_checkpoint(tmp_path / "m", fields, tensors, max_shard_bytes=400_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with Engine.load(tmp_path / "m", method="dmtd") as loaded:
        assert loaded.generate(PROMPTS[0], params).token_ids == engine().generate(PROMPTS[0], params).token_ids
        with pytest.raises(
            RequestError, match=f"expected dmtd, which a {model_type} checkpoint is made for, got swift"
        ):
            loaded.generate(PROMPTS[0], params, method="swift")
    with pytest.raises(RequestError, match=f"expected dmtd, which a {model_type} checkpoint is made for, got autoreg"):
        Engine.load(tmp_path / "m")
    anatomy = examine(tmp_path / "m")
    assert anatomy["cycle"] == {"encoding": 0, "thinking": 6, "decoding": 2, "horizon": 4}
    assert anatomy["methods"] == ["dmtd"]
    assert "dmtd" not in registry.names("qwen3")


def test_what_does_not_fit_is_refused(synthetic: Callable[..., Engine]) -> None:
    with pytest.raises(RequestError, match="method dmtd: expected model_type mtpqwen3 or dmtdqwen3, got llama"):
        synthetic("tiny").generate([5], method="dmtd")
    for options, message in {
        "prefill=none": "option prefill expects plain or readd or cyclic, got 'none'",
        "phase=end": "option phase expects prompt or absolute, got 'end'",
        "history=half": "option history expects real or shadow, got 'half'",
        "horizon=65": "option horizon expects 0 to 64, got 65",
        "horizon=-1": "option horizon expects 0 to 64, got -1",
    }.items():
        with pytest.raises(RequestError, match=f"^method dmtd: {message}$"):
            engine().generate([5], method=f"dmtd:{options}")
    with pytest.raises(RequestError, match="history=shadow expects a model without encoding layers, got 2 of them"):
        engine(2).generate([5], method="dmtd:history=shadow")
    windowed = parsed(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(RequestError, match="history=shadow expects a model without a sliding window, got one"):
        registry.parse("dmtd:history=shadow").build(windowed)


def test_the_kernels_give_the_ids_of_the_torch_table(audit: Callable[..., Any]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    split = {"num_encoding_layers": 1, "num_thinking_layers": 1, "num_decoding_layers": 1, "num_hidden_layers": 3}
    config = ModelConfig.parse(synthetic_config("tiny-dmtd") | split | {"vocab_size": 64}, "tiny-dmtd")
    weights = synthetic_weights(config, 3, torch.float32, 1.0)
    seen: list[object] = []
    for backend in ("torch", "triton"):
        with Engine(config, weights, method="dmtd:horizon=2", backend=backend, cache_tokens=512) as table:
            watched = audit(table)
            outputs = table.generate([[5, 9, 11], [7]], SamplingParams(max_tokens=4, ignore_eos=True))
            seen.append(([output.token_ids for output in outputs], watched.ran))
    assert seen[0] == seen[1]


def test_bench_shows_measure_prediction_and_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "dmtd", "--horizon", "4", "--batch", "2", "--max-tokens", "9", "--pairs", "1", "--json"]
    assert cli.run(command) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert line["identical"]
    assert line["tokens_per_weight_pass"] == pytest.approx(line["bound"])
    assert line["bound"] == pytest.approx(engine().generate([5], SamplingParams(max_tokens=1)).stats.weight_pass_bound)
    assert line["speed"] > 0

    think = Cycles._think
    monkeypatch.setattr(Cycles, "_think", lambda *given: -think(*given))
    assert cli.run(command) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "NOT IDENTICAL" in shown.err


def test_the_cost_models_prediction() -> None:
    """Full passes take 10, of which 2 whatever is skipped; a second tile of rows adds 6."""
    costs = Costs(sublayers=16, full=10.0, tiles=((8, 0.0),), per_tile=6.0, fixed=2.0)
    method = registry.parse("dmtd").build(parsed())
    assert isinstance(method, DirectMultiToken)
    assert cycles.predict(costs, method, 1) == pytest.approx(4 * 10 / (4 * (2 + 8 / 4) + 8 * 6 / 8))
    alone = costs.part(method.thinking, 8)
    assert costs.part(method.thinking, 16) == pytest.approx(alone * 16 / 10), "four heads fill two tiles"
    assert cycles.predict(costs, method, 4) == pytest.approx(4 * 10 / (4 * 4 + alone * 16 / 10))
