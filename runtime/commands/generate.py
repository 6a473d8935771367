"""One answer, as text, token ids or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ..prompts import to_ids
from .report import print_json, report, report_chunk
from .terminal import notes, write

if TYPE_CHECKING:
    from ..engine import Engine
    from ..request import Output, SamplingParams
    from ..warm_up import WarmUp


def answer(engine: Engine, prompt: str | list[int], params: SamplingParams, *, as_json: bool, as_stream: bool) -> None:
    """Generate and print: the text, the ids of a model without tokenizer, or JSON."""
    if as_stream:
        output = _stream(engine, prompt, params, as_json=as_json)
    else:
        output = engine.generate(prompt, params)
        if not as_json:
            write(",".join(map(str, output.token_ids)) if output.text is None else output.text)
    if as_json:
        warmed = asdict(engine.warmed_up) if engine.warmed_up else None
        startup = {"load_s": engine.load_s, "compilations": engine.compilations, "warm_up": warmed}
        print_json(report(output) | {"startup": startup})
    else:
        write("\n")
        for note in output.stats.notes:
            notes().print(f"{output.stats.method}: {note}", markup=False)


def warm_up_for(engine: Engine, prompt: str | list[int] | None = None, params: SamplingParams | None = None) -> None:
    """Make ready what one request can reach, of any length without a prompt, and say what that took.

    Raises:
        RequestError: the request cannot be served.
    """
    context = None
    if prompt is not None and params is not None:
        length = len(to_ids(prompt, engine.tokenizer, engine.config)) + params.max_tokens
        context = min(length, engine.config.max_context)
    say(engine.warm_up(sequences=1, context=context))


def say(done: WarmUp) -> None:
    """Say what a warm-up took."""
    took = f"{done.compilations} kernels compiled, {done.graphs} graphs captured, {done.seconds:.1f} s"
    notes().print(f"warm-up: {took}", markup=False)


def _stream(engine: Engine, prompt: str | list[int], params: SamplingParams, *, as_json: bool) -> Output:
    has_text = engine.tokenizer is not None
    separator = ""
    stream = engine.stream(prompt, params)
    for chunk in stream:
        if as_json:
            print_json(report_chunk(chunk, has_text=has_text))
        elif has_text:
            write(chunk.text)
        elif chunk.token_ids:
            write(separator + ",".join(map(str, chunk.token_ids)))
            separator = ","
    return stream.outputs[0]
