"""The lens against transformers' hidden states, its shares against a matrix worked out by hand, and the command."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipjack import Engine, SamplingParams
from skipjack.loaders.synthetic import write_synthetic
from skipjack.runtime.commands import cli
from skipjack.runtime.commands.lens import Lens, Reading, lens, show, shown_exits
from skipjack.runtime.errors import RequestError

PROMPT = [5, 6, 7, 11, 300, 42]
# A row per token, what exits 1 to 5 say.
SAID = [[9, 9, 9, 9, 9], [1, 2, 3, 4, 5], [7, 3, 7, 7, 7], [8, 8, 2, 2, 8]]


def worked_out() -> Lens:
    return Lens(5, 2, tuple(Reading(2 + i, tuple(row), (0.5,) * 5) for i, row in enumerate(SAID)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_synthetic(path, "tiny", seed=3, late_scale=0.3)
    return path


@pytest.mark.parametrize("max_tokens", [0, 1, 20])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3", "tiny-bloom"])
def test_every_exit_says_what_transformers_says(shape: str, max_tokens: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_synthetic(tmp_path / shape, shape, seed=1, late_scale=0.3)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / shape, dtype=torch.float32).eval()
    with Engine.load(tmp_path / shape, device="cpu", dtype="float32") as engine:
        found = lens(engine, PROMPT, max_tokens)
    generated = [token.token_id for token in found.tokens] if max_tokens else []
    text = PROMPT + generated[:-1]
    with torch.inference_mode():
        states = peer(torch.tensor([text]), output_hidden_states=True).hidden_states
        expected = torch.stack([exit_logits(peer, states, i)[0] for i in range(1, len(states))]).softmax(dim=-1)
    expected = expected[:, len(PROMPT) - 1 :] if max_tokens else expected
    assert [token.position for token in found.tokens] == list(range(len(text) + 1))[-expected.shape[1] :]
    predictions = torch.tensor([token.predictions for token in found.tokens]).T
    probabilities = torch.tensor([token.probabilities for token in found.tokens]).T
    assert torch.equal(predictions, expected.argmax(dim=-1))
    assert torch.allclose(probabilities, expected.amax(dim=-1), rtol=1e-3, atol=1e-6)


def exit_logits(peer: torch.nn.Module, states: tuple[Tensor, ...], exit_layer: int) -> Tensor:
    """Logits after `exit_layer` layers; transformers' last hidden state has been through the norm."""
    body = peer.base_model
    norm = body.ln_f if hasattr(body, "ln_f") else body.norm
    last = exit_layer == len(states) - 1
    return peer.lm_head(states[exit_layer] if last else norm(states[exit_layer]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_exit_says_what_was_generated(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    engine = synthetic("tiny", dtype)
    prompt = torch.randint(3, 500, (150,), generator=torch.Generator().manual_seed(4)).tolist()
    expected = engine.generate(prompt, SamplingParams(max_tokens=100)).token_ids
    free = engine._loaded()[1].free_pages
    whole = lens(engine, prompt, 100)
    assert [token.token_id for token in whole.tokens] == expected
    assert whole.decided[-1] == whole.agrees[-1] == 1.0
    monkeypatch.setattr("skipjack.runtime.prefill.PREFILL_CHUNK", 64)
    assert lens(engine, prompt, 100) == whole
    assert lens(engine, prompt, 0).tokens[-1].position == len(prompt)
    assert engine._loaded()[1].free_pages == free


def test_the_context_ends_the_text(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny")
    prompt = [3 + i % 500 for i in range(engine.config.max_context - 2)]
    assert 1 <= len(lens(engine, prompt, 32).tokens) <= 2
    with pytest.raises(RequestError, match="context"):
        lens(engine, [*prompt, 3, 3], 0)


def test_late_layers_that_do_nothing_leave_tokens_decided(synthetic: Callable[..., Engine]) -> None:
    found = lens(synthetic("tiny", torch.float32, 0.0), PROMPT, 16)
    assert found.decided[3:] == (1.0,) * 5
    assert max(token.decided_at for token in found.tokens) <= 4


def test_shares_of_a_matrix_worked_out_by_hand() -> None:
    found = worked_out()
    assert [token.decided_at for token in found.tokens] == [1, 5, 3, 5]
    assert found.decided == (0.25, 0.25, 0.5, 0.5, 1.0)
    assert found.agrees == (0.75, 0.5, 0.5, 0.5, 1.0)
    assert found.mean_decided_at == 3.5


def test_one_layer_is_one_exit() -> None:
    found = Lens(1, 1, (Reading(1, (4,), (1.0,)),))
    assert (found.decided, found.agrees, found.mean_decided_at) == ((1.0,), (1.0,), 1.0)
    assert shown_exits(1, 80) == []


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_the_tables_fit(width: int) -> None:
    from rich.console import Console

    for exits in (2, 5, 30, 80):
        chosen = shown_exits(exits, width)
        assert chosen == sorted(set(chosen))
        assert chosen[0] >= 1
        assert chosen[-1] < exits
    stream = io.StringIO()
    found = Lens(80, 2, tuple(Reading(1000, (100000 + i,) * 80, (0.5,) * 80) for i in range(2)))
    show(found, None, Console(file=stream, width=width))
    lines = stream.getvalue().splitlines()
    assert any("100001" in line and "1 of 80" in line for line in lines) or width < 60
    assert max(map(len, lines)) <= max(width, 60)


def test_the_table_of_a_model_with_text(demo: Engine) -> None:
    from rich.console import Console

    assert demo.tokenizer is not None
    found = lens(demo, demo.tokenizer.encode("The capital of France is"), 4)
    stream = io.StringIO()
    show(found, demo.tokenizer, Console(file=stream, width=100))
    assert "␣Paris" in stream.getvalue()


def test_the_command_prints_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["inspect", str(folder), "--lens-ids", "5,6,7", "--max-tokens", "9", "--dtype", "float32", "--device", "cpu"]
    assert cli.run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["exits"], found["prompt_tokens"], len(found["decided"]), len(found["agrees"])) == (8, 3, 8, 8)
    with Engine.load(folder, device="cpu") as engine:
        expected = engine.generate([5, 6, 7], SamplingParams(max_tokens=9)).token_ids
    assert [token["token_id"] for token in found["tokens"]] == expected
    assert [token["position"] for token in found["tokens"]] == list(range(3, 3 + len(expected)))
    for token in found["tokens"]:
        assert token["text"] is None
        assert len(token["predictions"]) == len(token["probabilities"]) == 8
        assert token["predictions"][token["decided_at"] - 1 :] == [token["token_id"]] * (9 - token["decided_at"])
        assert all(0 < probability <= 1 for probability in token["probabilities"])
    assert cli.run(line) == 0
    out = capsys.readouterr().out
    assert str(expected[0]) in out
    assert "of 8 layers on average" in out


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--lens", "words"], "--lens-ids"),
        (["--lens", ""], "tokenizer"),
        (["--lens-ids", ""], "--lens-ids"),
        (["--lens-ids", "1,x"], "--lens-ids: expected token ids separated by commas, got 'x'"),
        (["--lens-ids", "1,512"], "512"),
        (["--lens-ids", ",".join(["3"] * 1024)], "context"),
        (["--lens-ids", "1", "--max-tokens", "-1"], "--max-tokens"),
        (["--lens-ids", "1", "--lens", "words"], "both"),
    ],
)
def test_a_mistake_is_one_line_before_weights_are_read(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    named: str,
) -> None:
    monkeypatch.setattr("skipjack.runtime.engine.load_weights", lambda *_: pytest.fail("weights were read"))
    assert cli.run(["inspect", str(folder), *extra]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    assert named in streams.err
