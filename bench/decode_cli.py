"""The command `skipjack bench decode`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.console import Console

from ..runtime.errors import RequestError
from . import options

DRY_SHAPE = "synthetic:tiny:0.3"
PROMPTS = (32, 128, 512, 1024)


def decode(
    model: options.Model = "demo",
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:key=value,…]", help="Repeatable; default: half of the layers, by two methods."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the pass or the round.")] = 512,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="K of verify(K), repeatable; default 1–16, 32.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(min=0.01, max=0.99, help="Forced acceptance; default .5 .6 .7 .8 .9 .95.")
    ] = None,
    draft: Annotated[int, typer.Option(min=1, max=31, help="Draft tokens a round, where no --method says.")] = 7,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of samples of every pass.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs of every round.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a run.")] = 64,
    prompt: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a prompt, repeatable; default 32 128 512 1024, if they fit."),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    backend: Annotated[str, typer.Option(help="auto, torch or triton.")] = "auto",
    output: options.Output = None,
    as_json: options.AsJson = False,
    dry_run: Annotated[bool, typer.Option(help="Walk the code with a tiny model and few samples; no figures.")] = False,
) -> None:
    """Measure passes and rounds against their bytes: verify(K), draft steps, glue, forced acceptance, prompts."""
    from .clock import bandwidth, denominator
    from .decode import Setting, drafting, measure
    from .methods import load
    from .record import header, show, write
    from .tables import decode as sheets

    setting = Setting(
        context,
        tuple(rows or (*range(1, 17), 32)),
        tuple(rate or (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
        pairs,
        repeats,
        tokens,
    )
    if dry_run:
        model, draft, setting, prompt = DRY_SHAPE, 2, Setting(20, (2,), (0.5,), 1, 1, 5), [9]
    notes = Console(stderr=True, highlight=False)
    with load(model, dtype, device=device, backend=backend, check=options.able(method or ())) as engine:
        layers = engine.config.num_layers
        if layers < 2 and not method:
            raise RequestError("MODEL: expected two layers or more to draft with half of them")
        if context + tokens > engine.config.max_context:
            raise RequestError(
                f"--context and --tokens: expected {engine.config.max_context} together at most, the model's context,"
                f" got {context} and {tokens}"
            )
        room = engine.config.max_context - 1
        if prompt and max(prompt) > room:
            raise RequestError(
                f"--prompt: expected 1 to {room} tokens, what the context has room for, got {max(prompt)}"
            )
        setting = replace(setting, prompts=tuple(prompt or (length for length in PROMPTS if length <= room)))
        methods = method or _half(layers, draft)
        place = engine._loaded()[0].device  # pyright: ignore[reportPrivateUsage]
        result = header("decode", engine, model)
        notes.print(f"{model}, {engine.dtype}, {engine.backend}")
        for name in methods:
            drafting(engine, name)
        measured = bandwidth(place, 1 << 20 if dry_run else None)
        result |= {
            "of": denominator(place),
            "setting": asdict(setting),
            **asdict(measure(engine, methods, setting, measured, lambda text: notes.print(text, markup=False))),
        }
    if dry_run:
        notes.print(f"dry run: {len(result['passes'])} passes, {len(result['rounds'])} rounds, nothing measured")
        return
    if output:
        write(result, output)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for sheet in sheets(result):
        show(sheet)


def _half(layers: int, draft: int) -> list[str]:
    """Two ways to draft with half of the layers: every other one, and the first ones."""
    skipped = "+".join(str(i) for i in range(1, 2 * (layers // 2), 2))
    return [
        f"swift:skip_attention={skipped},skip_mlp={skipped},num_draft_tokens={draft},threshold=0,search_budget=0",
        f"layerskip:exit_layer={layers - layers // 2},num_draft_tokens={draft},reuse=false",
    ]
