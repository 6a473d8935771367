"""Ways to leave layers out, side by side: how well each follows the full model with as many layers skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from . import agreement
from .agreement import PLAIN, Given
from .methods import load
from .options import able
from .prompts import Prompt
from .record import header

ROUTED = ("mindskip", "flexidepth")
CONFIDENT = ("state", "softmax")
NO_ROUTERS = "no routers"


@dataclass(frozen=True)
class Line:
    """One method at `asked` skipped layers, and category, against the full model's own greedy continuations.

    `skipped` is how many layers' worth of sub-layers a token did without, on average; perplexity = exp(nll), in nats
    a token. A method that decides by itself asks for no number; where it wants a checkpoint and has none, its `note`
    says so and its figures are None.
    """

    method: str
    asked: int | None
    category: str
    prompts: int
    tokens: int
    skipped: float | None = None
    agreement: float | None = None
    nll: float | None = None
    perplexity: float | None = None
    note: str = ""


def compare(
    model: str,
    dtype: str,
    prompts: Sequence[Prompt],
    max_tokens: int,
    skipped: Sequence[int],
    checkpoints: Mapping[str, str],
    progress: Callable[[str], None],
    methods: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Line]]:
    """Every baseline at every number of skipped layers, CALM, and the routed methods on `checkpoints`, by method.

    With `methods`, lossy ones with their options, those instead. The header of a result comes first. One model is in
    memory at a time.

    Raises:
        RequestError: the model has no more than `skipped` layers, a checkpoint has another vocabulary, or a method
            cannot be scored.
    """
    with load(model, dtype, check=able(methods, prompts)) as engine:
        about = header("baselines", engine, model)
        layers, vocabulary = engine.config.num_layers, engine.config.vocab_size
        if not methods and max(skipped) >= layers:
            raise RequestError(f"--skipped: expected fewer than the model's {layers} layers, got {max(skipped)}")
        given = agreement.continuations(engine, prompts, max_tokens)
        lines = _lines(engine, PLAIN, PLAIN, 0, prompts, given)
        for spec in methods:
            progress(spec)
            lines += _lines(engine, spec, spec, None, prompts, given)
        if methods:
            return about, lines
        for count in skipped:
            left = layers - count
            for name, spec in (
                ("layerskip", f"layerskip:exit_layer={left},verify=false"),
                ("shortgpt", f"shortgpt:n={count}"),
                ("skipdecode", f"skipdecode:most={left},least={left}"),
                ("adaskip", f"adaskip:n={2 * count},online=0"),
            ):
                progress(f"{name}, {count} layers skipped")
                lines += _lines(engine, name, spec, count, prompts, given)
        for measure in CONFIDENT:
            progress(f"calm {measure}")
            lines += _lines(engine, f"calm {measure}", f"calm:measure={measure}", None, prompts, given)
    for count in skipped:
        for rule in ("paper", "code"):
            progress(f"laco {rule}, {count} layers skipped")
            spec = f"laco:remove={count},rule={rule}"
            with load(model, dtype, spec) as merged:
                lines += _lines(merged, f"laco {rule}", spec, count, prompts, given, layers)
    for name in dict.fromkeys((*ROUTED, *checkpoints)):
        if name not in checkpoints:
            lines.append(Line(name, None, "all", 0, 0, note=NO_ROUTERS))
            continue
        progress(name)
        with load(checkpoints[name], dtype, name) as routed:
            if routed.config.vocab_size != vocabulary:
                raise RequestError(
                    f"--checkpoint {name}: expected the vocabulary of {model}, {vocabulary} tokens, "
                    f"got {routed.config.vocab_size}"
                )
            lines += _lines(routed, name, name, None, prompts, given)
    return about, sorted(lines, key=lambda line: layers if line.asked is None else line.asked)


def _lines(
    engine: Engine,
    name: str,
    spec: str,
    asked: int | None,
    prompts: Sequence[Prompt],
    given: Sequence[Given],
    layers: int | None = None,
) -> list[Line]:
    """`layers` is the depth of the full model, where the engine's own is another."""
    depth = layers or engine.config.num_layers
    return [
        Line(
            name,
            asked,
            line.category,
            line.prompts,
            line.tokens,
            asked if line.layers is None else depth - line.layers,
            line.agreement,
            line.nll,
            line.perplexity,
        )
        for line in agreement.summary(agreement.score(engine, spec, prompts, given))
    ]
