"""One answer, as text, token ids or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import print_json, report, report_chunk
from .terminal import notes, write

if TYPE_CHECKING:
    from .engine import Engine
    from .request import Output, SamplingParams


def answer(engine: Engine, prompt: str | list[int], params: SamplingParams, *, as_json: bool, as_stream: bool) -> None:
    """Generate and print: the text, the ids of a model without tokenizer, or JSON."""
    if as_stream:
        output = _stream(engine, prompt, params, as_json=as_json)
    else:
        output = engine.generate(prompt, params)
        if not as_json:
            write(",".join(map(str, output.token_ids)) if output.text is None else output.text)
    if as_json:
        startup = {"load_s": engine.load_s, "compilations": engine.compilations}
        print_json(report(output) | {"startup": startup})
    else:
        write("\n")
        for note in output.stats.notes:
            notes().print(f"{output.stats.method}: {note}", markup=False)


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
