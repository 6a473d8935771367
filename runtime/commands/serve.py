"""An engine behind HTTP until a signal ends it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RequestError
from . import options

if TYPE_CHECKING:
    from ...loaders.config import ModelConfig
    from ...loaders.tokenizer import Tokenizer
    from ..engine import Engine
    from ..prompts import Check
    from ..server.app import Service

KEY = "SKIPJACK_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: options.Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:key=value,…]",
            help="A method that clients may ask for; repeatable, the first where they ask for none.",
            show_default="autoregressive",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients.", show_default="MODEL")] = None,
    max_sequences: Annotated[int, typer.Option(help="Sequences that run together at most.")] = 16,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests under way at most, those that wait included; others get 429.")
    ] = 64,
    chat_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer in a chat that does not say how many.")
    ] = 1024,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers under way get after SIGTERM.")] = 60,
    device: options.DeviceName = options.Device.AUTO,
    dtype: options.DtypeName = options.Dtype.AUTO,
    backend: options.BackendName = options.Backend.AUTO,
    numerics: options.NumericsName = options.Numerics.EXACT,
    cache_tokens: options.CacheTokens = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Copy what a prompt has in common with an earlier one instead of reading it again.")
    ] = True,
    warm_up: Annotated[
        bool, typer.Option(help="Before listening compile every kernel and capture every graph that will be needed.")
    ] = True,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line on standard error for each answer.")] = False,
) -> None:
    """Serve OpenAI's completions and chat completions over HTTP.

    The environment's SKIPJACK_API_KEY, if set, is what clients must show. SIGTERM or Ctrl-C lets answers under way end.
    """
    missing = [module for module in NEEDED if find_spec(module) is None]
    if missing:
        raise RequestError(f"serve: {' and '.join(missing)} not installed: pip install 'skipjack[serve]'")
    methods, key = method or ["autoregressive"], _key()
    with (
        _bound(host, port) as listener,
        options.load_engine(
            model,
            methods[0],
            device,
            dtype,
            backend,
            numerics,
            cache_tokens,
            _all_fit(methods),
            max_sequences,
            prefix_caching=prefix_caching,
        ) as engine,
    ):
        _ready(engine, methods, warm_up=warm_up)
        from ..server.app import Service

        service = Service(engine, name or model, methods, chat_tokens, max_requests, key)
        _listen(service, listener, drain, access_log=access_log)


def _all_fit(methods: Sequence[str]) -> Check:
    """What refuses methods that are misspelt or that the model cannot run, before its weights are read."""
    from ..methods import registry

    specs = [registry.parse(method) for method in methods]

    def check(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        for spec in specs:
            spec.build(config)

    return check


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet: a taken port is known before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "expected the name of a host"
        raise RequestError(f"--host: cannot find {host}: {reason}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _taken(host, port, error) from error
    return listener


def _taken(host: str, port: int, error: OSError) -> RequestError:
    return RequestError(f"--port: cannot listen at {host}, port {port}: {error.strerror}")


def _key() -> str | None:
    """What clients must show, by the environment."""
    key = os.environ.get(KEY)
    # Other characters, and spaces at its ends, no header brings through.
    if key is not None and not (key and all("!" <= character <= "~" for character in key)):
        raise RequestError(f"{KEY}: expected a key of visible ASCII characters, or that it is unset")
    return key


def _ready(engine: Engine, methods: Sequence[str], *, warm_up: bool) -> None:
    from .generate import say
    from .terminal import notes

    if warm_up:
        say(engine.warm_up(methods))
    # What is there now stays: the collector need not look at it in the middle of a request.
    gc.collect()
    gc.freeze()
    notes().print(f"{engine.backend}, methods: {', '.join(methods)}", markup=False)


def _listen(service: Service, listener: socket.socket, drain: int, *, access_log: bool) -> None:
    import uvicorn

    from ..server.ending import Ending
    from .terminal import notes

    if access_log:
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.INFO)
    app = Ending(service.app())
    config = uvicorn.Config(
        app, log_config=None, access_log=access_log, lifespan="off", timeout_graceful_shutdown=drain
    )
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(config.backlog)
    except OSError as error:  # Another has been faster since it was bound.
        raise _taken(host, port, error) from error
    shown = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            notes().print(f"serving {service.name} at http://{shown}:{port}/v1", markup=False)

    server = Server(config)

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    # It has a handler of its own while it runs, and sends itself the signal once more when it has ended.
    signal.signal(signal.SIGTERM, end)
    server.run(sockets=[listener])
