"""Teacher forcing: a lossy method's choices and likelihoods along a given text, against transformers in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from skipjack import Engine, RequestError, SamplingParams
from skipjack.bench import agreement
from skipjack.bench.prompts import Prompt, source
from skipjack.loaders.synthetic import write_synthetic

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 40))]
GIVEN = [[3, 400, 7, 7, 250, 8, 91, 2, 44, 101], [11, 12], [2, 0, 500]]


@pytest.mark.parametrize(("method", "layers"), [("autoregressive", 8), ("layerskip:exit_layer=3,verify=false", 3)])
def test_scores_are_those_of_transformers(tmp_path: Path, method: str, layers: int) -> None:
    """Early exit is the model without its last layers, which transformers can load as such."""
    transformers = pytest.importorskip("transformers")
    write_synthetic(tmp_path / "m", "tiny-llama", 0, 0.3)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", num_hidden_layers=layers, dtype=torch.float64
    ).eval()
    with Engine.load(tmp_path / "m") as engine:
        scores = engine.score(PROMPTS, GIVEN, method=method)
    for prompt, given, scored in zip(PROMPTS, GIVEN, scores, strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + given])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(given)[:, None])[:, 0]
        assert scored.chosen == tuple(logits.argmax(-1).tolist())
        torch.testing.assert_close(torch.tensor(scored.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_full_model_agrees_with_itself(synthetic: Callable[..., Engine], dtype: torch.dtype) -> None:
    engine = synthetic("tiny", dtype)
    prompts = [Prompt("a", "one"), Prompt("b", "two and"), Prompt("a", "three")]
    rows = agreement.compare(engine, ["autoregressive", "layerskip:exit_layer=2,verify=false"], prompts, 12, print)
    lines = {(line.method, line.category): line for line in agreement.summary(rows)}
    assert len(lines) == 6
    plain, early = (lines[method, "all"] for method in dict.fromkeys(row.method for row in rows))
    assert plain.agreement == lines["autoregressive", "a"].agreement == 1
    assert plain.nll == pytest.approx(-sum(logprobs(engine, prompts)) / plain.tokens, abs=1e-6)
    assert early.agreement < 1
    assert early.nll > plain.nll
    assert lines["autoregressive", "b"].prompts == 1


def logprobs(engine: Engine, prompts: list[Prompt]) -> list[float]:
    """What generation itself says of the tokens of the prompts."""
    outputs = engine.generate(
        [source(prompt, engine.tokenizer, engine.config) for prompt in prompts],
        SamplingParams(max_tokens=12, logprobs=0),
    )
    return [entry.logprob for output in outputs for entry in output.choices[0].logprobs or []]


@pytest.mark.parametrize(
    ("prompts", "given", "method", "named"),
    [
        ([[1]], [[2], [3]], "autoregressive", "expected 1 continuations, got 2"),
        ([[1]], [[2]], "lookup", "expected a lossy method or autoregressive, got lookup"),
        ([[1]], [[]], "autoregressive", "at least one token"),
        ([[1]], [[600]], "autoregressive", "outside the vocabulary"),
        ([[1] * 1000], [[2] * 30], "autoregressive", "1000 [+] 30 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    synthetic: Callable[..., Engine], prompts: list[list[int]], given: list[list[int]], method: str, named: str
) -> None:
    with pytest.raises(RequestError, match=named):
        synthetic("tiny").score(prompts, given, method=method)
