"""A round with the draft of any method: one that is too long, and one that is drafted another way than the last."""

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.batch import Batch, Draft
from skipjack.runtime.cache import KVCache
from skipjack.runtime.methods.base import Method, no_draft
from skipjack.runtime.methods.drafting import sift
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    return Engine(config, synthetic_weights(config, 0, torch.float32, 0.1), cache_tokens=512)


def drafting_by(engine: Engine, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    monkeypatch.setitem(engine._methods().ready, engine._default, method)


class Echo(Method):
    """Drafts its last token over and over, without asking how many there is room for."""

    name = "echo"

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        return Draft(batch.last[:, None].expand(-1, 16).contiguous(), torch.full_like(batch.length, 16))


class InTurns(Method):
    """A draft by half of the layers, then a round without one, then the draft again."""

    name = "in turns"
    half = LayerPlan.full(8).early_exit(4)

    def __init__(self) -> None:
        super().__init__(None, 8)
        self.skips = False

    @property
    def plan(self) -> LayerPlan:
        return self.half if self.skips else self._full

    def phase(self) -> str:
        return "skip" if self.skips else "plain"

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        self.skips = not self.skips
        return Draft(batch.last[:, None], torch.ones_like(batch.length)) if self.skips else no_draft(batch)


class Sifting(Method):
    """Guesses of three tokens that half of the layers agree with or not: four rows of them, whatever is left."""

    name = "sifting"
    half = LayerPlan.full(8).early_exit(4)
    plan = half

    def __init__(self) -> None:
        super().__init__(None, 8)
        self.rows = 0

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        length = batch.room.clamp(min=0, max=3)
        self.rows += int(length.sum()) + len(batch)
        return sift(model, cache, batch, self.half, Draft(batch.last[:, None].expand(-1, 3).contiguous(), length))


@pytest.mark.parametrize("count", [1, 2, 248])
def test_a_draft_longer_than_there_is_room_for_is_cut(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With 248 tokens the sequence ends with its page: what lies after belongs to others."""
    prompts = [[7] * 8, list(range(20, 28))]
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    expected = [output.token_ids for output in engine.generate(prompts, params)]
    drafting_by(engine, monkeypatch, Echo(None, 8))
    outputs = engine.generate(prompts, params)
    assert [output.token_ids for output in outputs] == expected
    # The first token comes of the prompt, and the last of a round is not drafted.
    assert all(len(output.stats.drafted_per_position) == min(16, max(0, count - 2)) for output in outputs)


def test_rows_that_a_guess_is_sifted_with_have_skipped_what_they_skip(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, prompts, params = Sifting(), [[5, 9, 11], [7] * 8], SamplingParams(max_tokens=30, ignore_eos=True)
    expected = [output.token_ids for output in engine.generate(prompts, params)]
    drafting_by(engine, monkeypatch, method)
    outputs = engine.generate(prompts, params)
    assert [output.token_ids for output in outputs] == expected
    assert sum(output.stats.executed_skips for output in outputs) == method.rows * method.half.skipped


def test_a_round_is_booked_by_how_it_was_drafted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    method = InTurns()
    drafting_by(engine, monkeypatch, method)
    output = engine.generate([5, 9, 11], SamplingParams(max_tokens=9, ignore_eos=True))
    rounds = output.stats.rounds
    assert output.stats.executed_skips == -(-rounds // 2) * method.half.skipped
    assert [phase[0] for phase in output.stats.phases[:2]] == ["skip", "plain"]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        "layerskip:exit_layer=4,num_draft_tokens=5",
        "swift:skip_attention=4+5+6+7,skip_mlp=4+5+6+7,num_draft_tokens=5,threshold=0",
        "swift:skip_attention=4+5+6+7,skip_mlp=4+5+6+7,num_draft_tokens=3,threshold=0,tree=true",
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_draft_is_reshaped_and_drawn_as_its_verification(graphs: bool, method: str, temperature: float) -> None:
    """The late layers do nothing: whatever a request does to the logits, a draft without them is accepted whole."""
    config = ModelConfig.parse(synthetic_config("tiny") | {"vocab_size": 40}, "tiny")
    engine = Engine(config, synthetic_weights(config, 0, torch.float32, 0.0), graphs=graphs)
    params = SamplingParams(
        max_tokens=40,
        min_tokens=40,
        temperature=temperature,
        top_p=0.9,
        seed=3,
        stop_token_ids=[5, 6, 7],
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.7,
        logit_bias={0: 3.0, 9: 4.0},
    )
    for output in engine.generate([[5, 9, 31], [7]], params, method=method):
        assert len(output.stats.drafted_per_position) >= 3
        assert output.stats.drafted_per_position == output.stats.accepted_per_position
