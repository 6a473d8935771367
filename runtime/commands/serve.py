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
    methods = method or ["autoregressive"]
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
        _listen(engine, name or model, methods, listener, chat_tokens, max_requests, drain, access_log=access_log)


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
    except OSError as error:
        raise RequestError(f"--host: cannot find {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RequestError(f"--port: cannot listen at {host}, port {port}: {error.strerror}") from error
    return listener


def _ready(engine: Engine, methods: Sequence[str], *, warm_up: bool) -> None:
    from .generate import say
    from .terminal import notes

    if warm_up:
        say(engine.warm_up(methods))
    # What is there now stays: the collector need not look at it in the middle of a request.
    gc.collect()
    gc.freeze()
    notes().print(f"{engine.backend}, methods: {', '.join(methods)}", markup=False)


def _ended(number: int, frame: FrameType | None) -> None:
    """Nothing is left to end."""


def _listen(
    engine: Engine,
    name: str,
    methods: Sequence[str],
    listener: socket.socket,
    chat_tokens: int,
    most: int,
    drain: int,
    *,
    access_log: bool,
) -> None:
    import uvicorn

    from ..server.app import Service
    from .terminal import notes

    if access_log:
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.INFO)
    service = Service(engine, name, methods, chat_tokens, most, os.environ.get(KEY) or None)
    config = uvicorn.Config(
        service.app(), log_config=None, access_log=access_log, lifespan="off", timeout_graceful_shutdown=drain
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            notes().print(f"serving {name} at http://{shown}:{port}/v1", markup=False)

    # The server ends by itself; then it sends itself the signal once more.
    signal.signal(signal.SIGTERM, _ended)
    Server(config).run(sockets=[listener])
