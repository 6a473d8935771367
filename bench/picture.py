"""The demonstration as a picture: which tokens were drafted and accepted, which the full model chose."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.text import Text

from ..runtime.commands.terminal import ACCEPTED, GENERATED, INPUT
from ..runtime.engine import Engine
from ..runtime.request import SamplingParams


def svg(engine: Engine, question: str, method: str, params: SamplingParams, width: int = 96) -> str:
    """An SVG of the answer to `question`, coloured by how each token came to be."""
    stream = engine.stream([{"role": "user", "content": question}], params, method=method)
    answer = Text()
    for chunk in stream:
        for piece in chunk.pieces:
            answer.append(piece.text, ACCEPTED if piece.drafted else GENERATED)
    stats = stream.outputs[0].stats
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(
        Text.assemble(
            ("input", INPUT), "  ", ("chosen by the full model", GENERATED), "  ", ("drafted and accepted", ACCEPTED)
        )
    )
    console.print()
    console.print(Text(question, INPUT))
    console.print()
    console.print(answer)
    console.print()
    console.print(
        f"{method}: {stats.completion_tokens} tokens in {stats.rounds} rounds, {stats.layers_kept:g} of {stats.layers} "
        f"layers in a draft step, mean acceptance length {stats.mean_acceptance_length:.2f}",
        highlight=False,
    )
    return console.export_svg(title="skipjack demo")
