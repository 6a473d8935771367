"""AdaSkip: what is learnt, what is left out, tokens and scores by transformers with hooks; batches, and the device."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import select
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights, write_synthetic
from skipjack.runtime.errors import RequestError
from skipjack.runtime.graphs import Rounds
from skipjack.runtime.influence import Change, sublayer_change
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.adaskip import AdaSkip
from skipjack.runtime.model import Model
from skipjack.runtime.request import Output
from skipjack.runtime.stepwise import at_once

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 31)), [400, 3, 3, 17, 250, 8]]
TEXTS = [[(37 * i) % 500 + 3 for i in range(40)], [(91 * i * i) % 500 + 3 for i in range(9)]]
LAYERS = 8
METHODS = [
    "adaskip:n=4,online=5",
    "adaskip:n=5,online=6,phase=decode",
    "adaskip:n=8,online=0",
    "adaskip:n=7,online=1",
    "adaskip:n=1,online=3,phase=decode",
]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


class Oracle:
    """A model of transformers in float64, without sub-layers as the paper's equations 2 to 5 say.

    All tokens go through a sub-layer at once, so that what the first ones of an answer have taught of it is known when
    the others reach it.
    """

    def __init__(self, model: Any, texts: list[list[int]], n: int, online: int, phase: str = "both") -> None:
        self.model, self.online, self.phase = model, online, phase
        with self._through(self._measure):
            self.cosines, self.ratios = ([list[Tensor]() for _ in range(2 * LAYERS)] for _ in range(2))
            for text in texts:
                self._logits(text)
        self.similarity = torch.stack([torch.cat(found).mean() for found in self.cosines])
        self.scale = torch.stack([torch.cat(found).mean() for found in self.ratios])
        order = sorted(range(2 * LAYERS), key=lambda sublayer: -float(self.similarity[sublayer]))
        self.skipped, self.least = set(order[:n]), float(self.similarity[order[n - 1]])
        self.nearest = self.least - float(self.similarity[order[n]])

    def __call__(self, tokens: list[int], prompt: int) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and how many sub-layers each token ran; the first `prompt` tokens are the prompt."""
        self.prompt, self.ran = prompt, torch.zeros(len(tokens), dtype=torch.int64)
        self.extra = list[int]()
        with self._through(self._leave_out):
            return self._logits(tokens), self.ran

    def _logits(self, tokens: list[int]) -> Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0]

    @contextmanager
    def _through(self, visit: Callable[[int, Tensor, Tensor], Tensor]) -> Any:
        """`visit` says what leaves a sub-layer, given its number, what enters it and what would leave it, [T, H]."""
        hooks, entered = [], dict[int, Tensor]()

        def enter(sublayer: int) -> Callable[..., None]:
            def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                entered[sublayer] = given[0][0]

            return hook

        def leave(sublayer: int) -> Callable[..., Any]:
            def hook(module: nn.Module, given: Any, added: Any) -> Any:
                whole = added[0] if isinstance(added, tuple) else added
                x = entered[sublayer]
                own = (visit(sublayer, x, x + whole[0]) - x)[None]
                return (own, *added[1:]) if isinstance(added, tuple) else own

            return hook

        for number, layer in enumerate(self.model.model.layers):
            # What a norm is given is the stream before the sub-layer.
            hooks.append(layer.input_layernorm.register_forward_pre_hook(enter(2 * number)))
            hooks.append(layer.self_attn.register_forward_hook(leave(2 * number)))
            hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(enter(2 * number + 1)))
            hooks.append(layer.mlp.register_forward_hook(leave(2 * number + 1)))
        yield
        for hook in hooks:
            hook.remove()

    def _measure(self, sublayer: int, a: Tensor, b: Tensor) -> Tensor:
        self.cosines[sublayer].append(cosine(a, b))
        self.ratios[sublayer].append(b.norm(dim=-1) / a.norm(dim=-1))
        return b

    def _leave_out(self, sublayer: int, a: Tensor, b: Tensor) -> Tensor:
        place = torch.arange(len(a)) - self.prompt
        if sublayer in self.skipped:
            everywhere = self.phase == "both"
            # Attention reads what the prompt wrote; where it wrote nothing, the first tokens go without it too.
            runs = (place < 0) if not everywhere else torch.zeros_like(place, dtype=torch.bool)
            if not everywhere or sublayer % 2:
                runs |= (place >= 0) & (place < self.online)
        else:
            runs = torch.ones_like(place, dtype=torch.bool)
            window = (place >= 0) & (place < self.online)
            if sublayer % 2 and window.any():
                alike = float(cosine(a[window], b[window]).mean())
                self.nearest = min(self.nearest, abs(alike - self.least))
                if alike > self.least:
                    self.extra.append(sublayer // 2)
                    runs = place < self.online
        self.ran += runs
        return torch.where(runs[:, None], b, self.scale[sublayer] * a)


def options_of(method: str) -> dict[str, Any]:
    given = dict(item.split("=") for item in method.partition(":")[2].split(","))
    return {key: value if key == "phase" else int(value) for key, value in given.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adaskip")
    write_synthetic(path / "m", "tiny-llama", 0, 1.0)
    (path / "ids").write_text("\n".join(map(str, TEXTS)))
    return path


@pytest.fixture
def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "m", dtype=torch.float64).eval()


@pytest.mark.parametrize("window", [64, 16])
def test_what_is_learnt_from_texts_is_what_transformers_shows(folder: Path, reference: Any, window: int) -> None:
    parts = [text[first : first + window] for text in TEXTS for first in range(0, len(text), window)]
    oracle = Oracle(reference, parts, 5, 0)
    method = f"adaskip:n=5,calibration={folder / 'ids'},window={window}"
    with Engine.load(folder / "m") as engine:
        (found,) = engine.generate([1, 2], SamplingParams(max_tokens=2), method=method).stats.events
    assert found["similarity"] == pytest.approx(oracle.similarity.tolist(), abs=1e-5)
    assert found["scale"] == pytest.approx(oracle.scale.tolist(), rel=1e-5)
    assert oracle.nearest > 1e-4, "two sub-layers as alike could go either way in float32"
    chosen = [*(2 * layer for layer in found["skip_attention"]), *(2 * layer + 1 for layer in found["skip_mlp"])]
    assert {*chosen} == oracle.skipped
    assert found["threshold"] == pytest.approx(oracle.least, abs=1e-5)
    assert (found["kind"], found["tokens"]) == ("similarity", 49)


@pytest.mark.parametrize("method", METHODS)
def test_sublayers_tokens_and_scores_are_those_of_transformers(folder: Path, reference: Any, method: str) -> None:
    given, extra = options_of(method), list[tuple[int, ...]]()
    oracle = Oracle(reference, TEXTS, **given)
    params, method = SamplingParams(max_tokens=20, ignore_eos=True), f"{method},calibration={folder / 'ids'}"
    with Engine.load(folder / "m") as engine:
        outputs = engine.generate(PROMPTS, params, method=method)
        scored = engine.score(PROMPTS, [output.token_ids for output in outputs], method=method)
    for prompt, output, score in zip(PROMPTS, outputs, scored, strict=True):
        logits, ran = oracle(prompt + output.token_ids[:-1], len(prompt))
        extra.append(tuple(oracle.extra))
        own = logits[len(prompt) - 1 :]
        assert output.token_ids == own.argmax(-1).tolist()
        assert output.stats.layers_per_token == tuple((ran[len(prompt) - 1 :] / 2).tolist())
        assert output.stats.executed_skips == int((2 * LAYERS - ran[len(prompt) :]).sum())
        assert not output.stats.lossless
        expected = own.log_softmax(-1).gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0)
        assert score.layers_per_token == output.stats.layers_per_token
    assert oracle.nearest > 1e-6, "a similarity as near the threshold could go either way in float32"
    assert bool(given["online"]) == any(extra), extra


def test_the_oracle_sees_sequences_that_leave_out_different_mlps(folder: Path, reference: Any) -> None:
    """Or the batches of these tests would need no mask."""
    oracle = Oracle(reference, TEXTS, 4, 5)
    with Engine.load(folder / "m") as engine:
        outputs = engine.generate(
            PROMPTS, SamplingParams(max_tokens=9, ignore_eos=True), method=f"{METHODS[0]},calibration={folder / 'ids'}"
        )
    learnt = set[tuple[int, ...]]()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        oracle(prompt + output.token_ids, len(prompt))
        learnt.add(tuple(oracle.extra))
    assert len(learnt) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_batches_are_their_members_alone(
    synthetic: Callable[..., Engine], method: str, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    """Three at a time, of which some end early: those that run together are at different places of their texts."""
    engine = synthetic("tiny-llama", dtype, 1.0, max_sequences=3)
    params = SamplingParams(max_tokens=16, stop_token_ids=range(0, 512, 9), **fields)
    together = engine.generate(PROMPTS, params, method=method)
    alone = [engine.generate(prompt, params, method=method) for prompt in PROMPTS]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [layers(output) for output in together] == [layers(output) for output in alone]
    assert len({len(output.token_ids) for output in alone}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_calls_of_several_sublayers_are_these_one_by_one(
    monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    """As a CPU makes them of tokens that leave out the same: of a sequence alone, or of some together."""
    pytest.importorskip("numba", reason="numba is not installed")
    # Of a width for which a CPU has them.
    wide = {"num_hidden_layers": 8, "head_dim": 32, "hidden_size": 96, "intermediate_size": 80}
    config = ModelConfig.parse(synthetic_config("tiny-llama") | wide, "tiny-llama")
    weights, params = synthetic_weights(config, 0, dtype, 1.0), SamplingParams(max_tokens=14, ignore_eos=True)
    prompts = [*PROMPTS, PROMPTS[0]]
    with Engine(config, weights, max_sequences=5) as joined, Engine(config, weights, max_sequences=5) as apart:
        assert joined._loaded()[0].joined is not None
        monkeypatch.setattr(apart._loaded()[0], "joined", None)
        expected = [apart.generate(prompt, params, method=method) for prompt in prompts]
        for group in ([prompts], [[prompt] for prompt in prompts], [[PROMPTS[0]] * 2, PROMPTS[1:], [PROMPTS[0]]]):
            found = [output for some in group for output in joined.generate(some, params, method=method)]
            by_prompt = {tuple(output.prompt_ids): (output.token_ids, layers(output)) for output in found}
            assert by_prompt == {tuple(one.prompt_ids): (one.token_ids, layers(one)) for one in expected}
    if method == METHODS[0]:
        assert len({layers(output) for output in expected}) > 1


def layers(output: Output) -> tuple[float, ...]:
    return output.stats.layers_per_token


def test_choices_of_a_prompt_learn_apart(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny-llama", torch.float32, 1.0)
    params = SamplingParams(max_tokens=14, ignore_eos=True, temperature=1.0, seed=4, n=3)
    output = engine.generate(PROMPTS[0], params, method=METHODS[0])
    tokens = [choice.token_ids for choice in output.choices]
    assert len({*map(tuple, tokens)}) == 3
    for chosen, scored in zip(tokens, engine.score([PROMPTS[0]] * 3, tokens, method=METHODS[0]), strict=True):
        assert len(scored.layers_per_token) == len(chosen)
    own = sum(
        round(2 * (LAYERS - ran))
        for scored in engine.score([PROMPTS[0]] * 3, tokens, method=METHODS[0])
        for ran in scored.layers_per_token[1:]
    )
    assert output.stats.executed_skips == own


@pytest.mark.parametrize("method", METHODS)
def test_sublayers_that_are_left_out_do_not_run_and_no_hole_is_read(
    synthetic: Callable[..., Engine], audit: Callable[..., Any], method: str
) -> None:
    engine = synthetic("tiny-llama", torch.float32, 1.0)
    engine.generate(PROMPTS[0], SamplingParams(max_tokens=1), method=method)  # What is learnt first runs everything.
    watched = audit(engine)
    output = engine.generate(PROMPTS[2], SamplingParams(max_tokens=13, ignore_eos=True), method=method)
    found, given = output.stats.events[0], options_of(method)
    skipped = {*(2 * layer for layer in found["skip_attention"]), *(2 * layer + 1 for layer in found["skip_mlp"])}
    left_out = [{*range(2 * LAYERS)} - {*run} for run in per_pass(watched.ran)]
    assert len(left_out) == 13
    both = given.get("phase", "both") == "both"
    assert left_out[0] == (skipped if both else set())
    attention = {sublayer for sublayer in skipped if sublayer % 2 == 0}
    assert left_out[1 : 1 + given["online"]] == [attention if both else set()] * given["online"]
    for beyond in left_out[1 + given["online"] :]:
        assert beyond >= skipped
        assert all(sublayer % 2 for sublayer in beyond - skipped)
    assert [LAYERS - len(own) / 2 for own in left_out] == [*layers(output)]
    assert watched.reads > 50


def per_pass(ran: list[tuple[int, int]]) -> list[list[int]]:
    """The sub-layers of each pass that ran for a row: a new one begins where the number falls."""
    passes = list[list[int]]()
    for sublayer in (sublayer for sublayer, rows in ran if rows):
        if not passes or sublayer <= passes[-1][-1]:
            passes.append([])
        passes[-1].append(sublayer)
    return passes


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("most", [2, 8], ids=["apart", "together"])
@pytest.mark.parametrize("method", METHODS[:3])
def test_rounds_of_the_device_are_those_of_the_host(
    told: Callable[[Output], Any], audit: Callable[..., Any], method: str, fields: dict[str, Any], most: int
) -> None:
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    weights = synthetic_weights(config, 0, torch.float32, 1.0)
    host, device = (Engine(config, weights, graphs=alone, max_sequences=most) for alone in (False, True))
    audit(device)
    params = SamplingParams(max_tokens=14, stop_token_ids=range(0, 512, 13), **fields)
    for one, other in zip(*(engine.generate(PROMPTS, params, method=method) for engine in (device, host)), strict=True):
        assert one.token_ids == other.token_ids
        assert layers(one) == layers(other)
        assert most == 2 or told(one) == told(other)
        assert one.stats.graph_rounds == one.stats.rounds
        assert (other.stats.rounds > 0, other.stats.graph_rounds) == (True, 0)


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
def test_who_comes_later_is_measured_too(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has a graph at hand that suits the others, and is still to build one that measures."""
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    weights = synthetic_weights(config, 0, torch.float32, 1.0)
    prompts, lengths = [PROMPTS[1], PROMPTS[2], *PROMPTS], [10, 10, 40, 40, 40, 20]
    served, choose = list[tuple[bool, bool]](), Rounds._at_hand

    def noted(rounds: Rounds, given: Any, running: Any) -> Any:
        taken = choose(rounds, given, running)
        served.append((given.steps.learns, taken.steps.learns))
        return taken

    monkeypatch.setattr(Rounds, "_at_hand", noted)
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    with Engine(config, weights, graphs=graphs) as engine:
        streams = [engine.stream(*each, method=METHODS[0]) for each in zip(prompts[:5], params[:5], strict=True)]
        # Five share a graph for eight, and the three that stay one for four, when none of them is at its beginning.
        for _ in range(20):
            for stream in streams:
                next(stream, None)
        streams.append(engine.stream(prompts[5], params[5], method=METHODS[0]))
        while [chunk for stream in streams if (chunk := next(stream, None))]:
            pass
        together = [stream.outputs[0] for stream in streams]
    with Engine(config, weights, graphs=False) as engine:
        alone = [engine.generate(*each, method=METHODS[0]) for each in zip(prompts, params, strict=True)]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [layers(output) for output in together] == [layers(output) for output in alone]
    # A graph that measures does for those that need it no more, but not the other way round.
    assert {*served} <= {(True, True), (False, True), (False, False)}
    assert (len({*served}) > 1) == graphs


def test_the_first_tokens_are_measured_and_no_other(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the device, which goes on without measuring once no sequence is at its beginning."""
    seen = list[bool]()
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    from skipjack.runtime.methods import adaskip

    step = adaskip.Compensated.step

    def noted(self: Any, *given: Any) -> Any:
        seen.append(self.learns)
        return step(self, *given)

    monkeypatch.setattr(adaskip.Compensated, "step", noted)
    with Engine(config, synthetic_weights(config, 0, torch.float32, 1.0), graphs=True) as engine:
        output = engine.generate(PROMPTS[0], SamplingParams(max_tokens=24, ignore_eos=True), method=METHODS[0])
    assert output.stats.graph_rounds == 23
    learning = seen.index(False)
    assert 5 <= learning < 23
    assert not any(seen[learning:])


def test_an_answer_that_ends_within_its_first_tokens_says_that_nothing_was_skipped(
    synthetic: Callable[..., Engine],
) -> None:
    engine, params = synthetic("tiny-llama"), SamplingParams(max_tokens=4, ignore_eos=True)
    output = engine.generate(PROMPTS[0], params, method="adaskip:phase=decode")
    assert output.stats.notes == ("nothing was skipped: every layer ran for every token",)
    assert output.token_ids == engine.generate(PROMPTS[0], params).token_ids
    assert engine.generate(PROMPTS[0], replace(params, max_tokens=24), method="adaskip:phase=decode").stats.notes == ()
    assert engine.generate(PROMPTS[0], replace(params, max_tokens=1), method="adaskip").stats.notes == ()


def test_an_eighth_is_left_out_unless_told() -> None:
    for depth, expected in ((1, 1), (8, 2), (32, 8)):
        config = ModelConfig.parse(synthetic_config("tiny") | {"num_hidden_layers": depth}, "tiny")
        method = registry.parse("adaskip").build(config)
        assert isinstance(method, AdaSkip)
        similarity = torch.linspace(0, 1, 2 * depth)
        method.learn(Change(similarity, torch.ones(2 * depth)), torch.device("cpu"))
        assert method.plan.skipped == expected
        assert not any(method.plan.runs[2 * depth - expected :])


def test_of_equals_the_lower_is_left_out() -> None:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    method = registry.parse("adaskip:n=3").build(config)
    assert isinstance(method, AdaSkip)
    method.learn(Change(torch.tensor([0.5, 0.9] * 8), torch.ones(16)), torch.device("cpu"))
    assert (method.plan.skipped_attention, method.plan.skipped_mlp) == ((), (0, 1, 2))


def test_a_token_without_an_embedding_has_no_ratio() -> None:
    config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
    weights = synthetic_weights(config, 0, torch.float32, 1.0)
    weights.embedding[5] = 0
    change = at_once(sublayer_change(Model(config, weights, select("torch")), [[5, 7, 9]], 8))
    assert change.scale.isfinite().all()
    assert change.similarity.isfinite().all()


@pytest.mark.parametrize("method", ["adaskip", "shortgpt"])
def test_texts_without_a_token_teach_nothing(synthetic: Callable[..., Engine], tmp_path: Path, method: str) -> None:
    (tmp_path / "ids").write_text("[]\n[]\n")
    with pytest.raises(
        RequestError, match=rf"^method {method}: option calibration: .*ids: expected a token, found none"
    ):
        synthetic("tiny-llama").generate([1], method=f"{method}:calibration={tmp_path / 'ids'}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("n=16", "option n expects 0 to 15, got 16"),
        ("n=-1", "option n expects 0 to 65536, got -1"),
        ("phase=prefill", "option phase expects both or decode, got 'prefill'"),
        ("online=-1", "option online expects 0 to"),
        ("window=0", "option window expects 1 to 1024, got 0"),
        ("calibration=nowhere", "method adaskip: option calibration: cannot read nowhere: No such file"),
        ("alpha=2", "unknown option 'alpha', known options: n, phase, online, calibration, window"),
    ],
)
def test_options_that_mean_nothing_are_refused(synthetic: Callable[..., Engine], options: str, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        synthetic("tiny-llama").generate([1], method=f"adaskip:{options}")
