"""The `skipjack` command: standard output is the answer, standard error the rest."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import SkipjackError
from . import options
from .demo import DEMO_METHOD, DEMO_QUESTION
from .entry import EXIT_INTERRUPTED
from .serve import serve

EXIT_MISTAKE = 2
EXIT_BROKEN_PIPE = 141

# The click that typer builds on is a package of its own or typer's copy, by version.
UsageError = cast("type[Exception]", typer.BadParameter.__base__)


class Commands(TyperGroup):
    """The commands here and those other packages add, which are imported when they are invoked."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_added_commands())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        added = _added_commands().get(cmd_name)
        if added is None:
            return super().get_command(ctx, cmd_name)
        return TyperCommand(
            cmd_name, help=f"Commands of {added.module.removesuffix('.cli')}: skipjack {cmd_name} --help."
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        added = _added_commands().get(args[0])
        if added is None:
            return super().resolve_command(ctx, args)
        try:
            command = typer.main.get_command(added.load())
        except ImportError as error:
            raise SkipjackError(f"{args[0]}: cannot import {added.value}: {error}") from error
        return args[0], command, args[1:]


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def skipjack(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Layer skipping that pays in milliseconds, with the same text, bit for bit."""
    if version:
        typer.echo(f"skipjack {installed_version('skipjack')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from standard input.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="The prompt as token ids.")] = None,
    method: options.Method = "autoregressive",
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.DeviceName = options.Device.AUTO,
    dtype: options.DtypeName = options.Dtype.AUTO,
    backend: options.BackendName = options.Backend.AUTO,
    numerics: options.NumericsName = options.Numerics.EXACT,
    cache_tokens: options.CacheTokens = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    warm_up: options.WarmUp = False,
    json: options.Json = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print as it is generated.")] = False,
) -> None:
    """Continue a prompt. Without a tokenizer in the folder, prompt and answer are token ids."""
    from ..prompts import request_check
    from ..request import SamplingParams
    from .generate import answer, warm_up_for

    source = options.read_prompt(prompt, prompt_file, prompt_ids)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    check = request_check(source, params)
    with options.load_engine(model, method, device, dtype, backend, numerics, cache_tokens, check) as engine:
        if warm_up:
            warm_up_for(engine, source, params)
        answer(engine, source, params, as_json=json, as_stream=stream)


@app.command()
def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="Instructions the conversation opens with.")] = None,
    method: options.Method = "autoregressive",
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    device: options.DeviceName = options.Device.AUTO,
    dtype: options.DtypeName = options.Dtype.AUTO,
    backend: options.BackendName = options.Backend.AUTO,
    numerics: options.NumericsName = options.Numerics.EXACT,
    warm_up: options.WarmUp = False,
    cache_tokens: options.CacheTokens = None,
) -> None:
    """Talk to a model, one message a line. /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from ..request import SamplingParams
    from .chat import Chat, chat_check
    from .generate import warm_up_for

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    check = chat_check(system, params)
    with options.load_engine(
        model, method, device, dtype, backend, numerics, cache_tokens, check, prefix_caching=True
    ) as engine:
        if warm_up:
            warm_up_for(engine)
        if not Chat(engine, params, system).run():
            raise typer.Exit(EXIT_MISTAKE)


app.command()(serve)


@app.command()
def inspect(
    model: options.Model,
    lens: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Continue this, and show what each layer would have said.")
    ] = None,
    lens_ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="The same for a prompt of token ids.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for --lens; 0 looks at the prompt's.")] = 32,
    device: options.DeviceName = options.Device.AUTO,
    dtype: options.DtypeName = options.Dtype.AUTO,
    backend: options.BackendName = options.Backend.AUTO,
    json: options.Json = False,
) -> None:
    """Show what a model folder holds, without loading the weights; with --lens, what each layer would say."""
    from .report import print_json

    if lens is None and lens_ids is None:
        from .anatomy import examine, show

        anatomy = examine(options.model_folder(model))
        if json:
            print_json(anatomy)
        else:
            show(anatomy)
        return
    from . import lens as lenses

    source = lenses.read_request(lens, lens_ids, max_tokens)
    check = lenses.lens_check(source)
    with options.load_engine(model, "autoregressive", device, dtype, backend, check=check) as engine:
        found = lenses.lens(engine, source, max_tokens)
        if json:
            print_json(lenses.report(found, engine.tokenizer))
        else:
            lenses.show(found, engine.tokenizer)


@app.command()
def tune(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
    method: Annotated[str, typer.Option(help="swift or knapspec.")] = "swift",
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line, or JSON lines with turns.")] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Sets scored at most (swift).", show_default="500")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="End the search after this time.")] = 600.0,
    skip_ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of inner sub-layers skipped (swift).", show_default="0.45")
    ] = None,
    window: Annotated[int, typer.Option(min=1, max=1024, help="Tokens of each prompt a set is scored on.")] = 32,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the candidates (swift).", show_default="0")] = None,
    device: options.DeviceName = options.Device.AUTO,
    dtype: options.DtypeName = options.Dtype.AUTO,
    backend: options.BackendName = options.Backend.AUTO,
    cache_tokens: options.CacheTokens = None,
    json: options.Json = False,
) -> None:
    """Search for a skip set and save it; --method swift:set=FILE loads it. Ctrl-C saves the best so far."""
    from ..calibration import PROMPTS, read_texts
    from .tune import Tuning

    texts = PROMPTS if prompts is None else read_texts(prompts, "--prompts")
    tuning = Tuning(output, method, texts, candidates, seconds, skip_ratio, window, seed)
    with options.load_engine(
        model, "autoregressive", device, dtype, backend, cache_tokens=cache_tokens, check=tuning.check
    ) as engine:
        tuning.run(engine, as_json=json)


@app.command()
def merge(
    model: options.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    method: Annotated[str, typer.Option(metavar="laco[:key=value,…]", help="What to merge, and how.")] = "laco",
    json: options.Json = False,
) -> None:
    """Merge layers with LaCo and write the smaller model as a folder; its text is not that of the whole model."""
    from .merge import merge as merge_and_save

    merge_and_save(options.model_folder(model), output, method, as_json=json)


@app.command()
def route(
    model: options.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write.", show_default=False)],
    layers: Annotated[
        str | None, typer.Option(metavar="16-31|4+6", help="Layers that get routers; default: the late half.")
    ] = None,
    routers: Annotated[
        Path | None, typer.Option(help="Trained routers, a safetensors file; without it they are drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of routers drawn at random.")] = 0,
    gate: Annotated[str, typer.Option(help="released (MLP scaled by the router) or ste_hard.")] = "released",
    router_reduction: Annotated[int, typer.Option(min=1, help="Hidden size over the router's width.")] = 16,
    adapter_reduction: Annotated[int, typer.Option(min=1, help="Intermediate size over the adapter's.")] = 16,
) -> None:
    """Give a Llama model FlexiDepth's routers: a new folder whose layers decide by token whether they run."""
    from ...loaders.attach import attach_routers
    from .terminal import notes

    routing = attach_routers(
        options.model_folder(model),
        output,
        None if layers is None else options.parse_layers(layers),
        routers=routers,
        seed=seed,
        gate=gate,
        router_reduction=router_reduction,
        adapter_reduction=adapter_reduction,
    ).routing
    if routing is not None and not routing.trained:
        notes().print("the routers are untrained: train them, or expect no sense", markup=False)


@app.command()
def doctor(json: options.Json = False) -> None:
    """Show what Skipjack finds on this machine, which backend it will use, and what is missing."""
    from .doctor import examine, show
    from .report import print_json

    findings = examine()
    if json:
        print_json(findings)
    else:
        show(findings)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options; default: all of them.")] = None,
    json: options.Json = False,
) -> None:
    """The methods there are, and what their options mean, default to and expect."""
    from .methods import describe, every, show
    from .report import print_json

    found = every() if name is None else [describe(name)]
    if json:
        print_json({"methods": found})
    else:
        show(found)


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to ask.")] = DEMO_QUESTION,
    method: options.Method = DEMO_METHOD,
    max_tokens: options.MaxTokens = 96,
    device: options.DeviceName = options.Device.AUTO,
    dtype: options.DtypeName = options.Dtype.AUTO,
    backend: options.BackendName = options.Backend.AUTO,
) -> None:
    """Answer with the packaged model by layer skipping, then plainly, and compare the two."""
    from ..prompts import request_check
    from ..request import SamplingParams
    from .demo import asked, compare

    params = SamplingParams(max_tokens=max_tokens)
    check = request_check(asked(prompt), params)
    with options.load_engine("demo", method, device, dtype, backend, check=check) as engine:
        if not compare(engine, prompt, method, params):
            raise typer.Exit(1)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; a mistake is one line on standard error."""
    from .terminal import restore

    if cast("object", sys.stdout) is None:
        return _refuse("standard output: it is closed")
    try:
        command = typer.main.get_command(app)
        with command.make_context("skipjack", list(args)) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as request:
        return request.exit_code
    except SkipjackError as error:
        return _refuse(str(error))
    except UsageError as error:
        return _refuse(cast("Any", error).format_message())
    except (KeyboardInterrupt, typer.Abort):
        restore()
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return EXIT_BROKEN_PIPE
    except SystemExit as end:  # So rich ends a process whose output nobody reads any more.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _discard_output()
        return _refuse(f"{error.filename or 'standard output'}: {error.strerror or error}")
    return 0


def main() -> None:
    """The console entry point. A closed standard input reads as empty; what a closed standard error is told is lost."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def _added_commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="skipjack.commands")}


def _discard_output() -> None:
    """What is still held back is lost: the interpreter flushes standard output once more on its way out."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return EXIT_MISTAKE
