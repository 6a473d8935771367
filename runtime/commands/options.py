"""The options commands share, and what they mean before a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...loaders.locate import check_name
from ..errors import RequestError
from ..request import SEQUENCES, check_unicode

if TYPE_CHECKING:
    from ..engine import Engine
    from ..prompts import Check

MAX_LAYERS = 512


class Device(str, Enum):
    """Where to run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(str, Enum):
    """The type of weights and activations; `auto` is the checkpoint's."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Backend(str, Enum):
    """The op table; `auto` is Triton on a GPU and torch on the CPU."""

    AUTO = "auto"
    TORCH = "torch"
    TRITON = "triton"


class Numerics(str, Enum):
    """Whether a token's bits may depend on what is computed beside it."""

    EXACT = "exact"
    FAST = "fast"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help='A model folder, "demo", or org/name of the hub.', show_default=False)
]
Method = Annotated[
    str, typer.Option(metavar="NAME[:key=value,…]", help="Decoding method, as `methods` lists them; lists join with +.")
]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Least probability relative to the most likely token; 0 is off.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same tokens.", show_default="fresh")]
Stop = Annotated[list[str] | None, typer.Option(help="End at this string; repeatable.")]
DeviceName = Annotated[Device, typer.Option(help="Where to run.")]
BackendName = Annotated[Backend, typer.Option(help="Op table; auto is triton on a GPU, torch on the CPU.")]
DtypeName = Annotated[Dtype, typer.Option(help="Type of weights and activations; auto is the checkpoint's.")]
NumericsName = Annotated[Numerics, typer.Option(help="fast gives up equal bits where that saves time.")]
WarmUp = Annotated[
    bool, typer.Option("--warm-up", help="First compile every kernel and capture every graph that will be needed.")
]
CacheTokens = Annotated[
    int | None,
    typer.Option(help="Tokens the KV cache holds.", show_default="a context, or 16 times 2048, as memory allows"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def read_prompt(prompt: str | None, prompt_file: Path | None, prompt_ids: str | None) -> str | list[int]:
    """The prompt from the one source that was given.

    Of a file or a pipe a byte-order mark at the start and one newline at the end are dropped.

    Raises:
        RequestError: not exactly one source, or one that cannot be read.
    """
    given = [source for source in (prompt, prompt_file, prompt_ids) if source is not None]
    if len(given) != 1:
        count = "none" if not given else str(len(given))
        raise RequestError(f"prompt: expected exactly one of PROMPT, -, --prompt-file and --prompt-ids, got {count}")
    if prompt_ids is not None:
        return parse_ids(prompt_ids)
    if prompt_file is not None:
        try:
            return _text(prompt_file.read_bytes(), str(prompt_file))
        except OSError as error:
            raise RequestError(f"--prompt-file: cannot read {prompt_file}: {error.strerror}") from error
    if prompt == "-":
        return _text(sys.stdin.buffer.read(), "standard input")
    # Bytes of a command line that are not UTF-8 arrive as surrogates.
    check_unicode("prompt", str(prompt))
    return str(prompt)


def parse_ids(text: str, option: str = "--prompt-ids") -> list[int]:
    """Token ids from "1,2,3"; RequestError, which names `option`, where there is anything else."""
    fields = [field.strip() for field in text.split(",")]
    wrong = next((field for field in fields if not (field.isascii() and field.isdigit() and len(field) < 20)), None)
    if wrong is not None:
        raise RequestError(f"{option}: expected token ids separated by commas, got {wrong!r}")
    return [int(field) for field in fields]


def parse_layers(text: str) -> list[int]:
    """Layer numbers from "16-31" or "4+6+8", in any mixture."""
    layers: list[int] = []
    for part in text.split("+"):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 8 or int(last or first) < int(first):
            raise RequestError(f"--layers: expected layers such as 16-31 or 4+6+8, got {text!r}")
        layers += range(int(first), int(last or first) + 1)
        if len(layers) > MAX_LAYERS:
            raise RequestError(f"--layers: expected at most {MAX_LAYERS} layers, got {text!r}")
    return layers


def _text(data: bytes, source: str) -> str:
    try:
        # Not utf-8-sig, whose errors count bytes from behind the mark.
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"prompt: expected UTF-8, got byte {data[error.start]:#04x} at {error.start} of {source}"
        ) from error
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


@contextmanager
def load_engine(
    model: str,
    method: str,
    device: Device,
    dtype: Dtype,
    backend: Backend,
    numerics: Numerics = Numerics.EXACT,
    cache_tokens: int | None = None,
    check: Check | None = None,
    max_sequences: int = SEQUENCES,
    *,
    prefix_caching: bool = False,
) -> Generator[Engine, None, None]:
    """An engine for the time of a command, loaded behind a progress bar, after what `check` says of the model."""
    check_name(model)
    from ..engine import Engine
    from .terminal import notes, progress_bar

    with progress_bar() as progress:
        engine = Engine.load(
            model,
            method=method,
            device=device.value,
            dtype=dtype.value,
            backend=backend.value,
            numerics=numerics.value,
            cache_tokens=cache_tokens,
            max_sequences=max_sequences,
            prefix_caching=prefix_caching,
            progress=progress,
            check=check,
        )
    if engine.cache_note:
        notes().print(engine.cache_note, markup=False, soft_wrap=True)
    with engine:
        yield engine


def model_folder(model: str) -> Path:
    """The folder of a model; what is not on this machine yet is made or downloaded behind a progress bar."""
    from ...loaders.locate import locate
    from .terminal import progress_bar

    with progress_bar() as progress:
        return locate(model, progress)
