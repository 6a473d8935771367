import json
import os
import subprocess
import sys
import typing
from dataclasses import is_dataclass

import pytest

import skipjack
from skipjack import Engine

WATCH = """
import json, logging, os, sys, threading
before = dict(os.environ), list(logging.root.handlers), threading.active_count(), set(sys.modules)
{statement}
added = set(sys.modules) - before[3]
print(json.dumps({{
    "environment": dict(os.environ) == before[0],
    "handlers": logging.root.handlers == before[1] and not any(
        getattr(logger, "handlers", []) for logger in logging.root.manager.loggerDict.values()
    ),
    "threads": threading.active_count() - before[2],
    "packages": sorted({{name.partition(".")[0] for name in added}}),
    "modules": sorted(name for name in added if name.startswith("skipjack")),
}}))
"""
HEAVY = {"torch", "numpy", "triton", "typer", "rich", "tokenizers", "safetensors", "jinja2", "transformers", "click"}


def type_of(function: typing.Any) -> typing.Any:
    return eval(function.__annotations__["return"], vars(sys.modules[function.__module__]))


def watch(statement: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST"))}
    command = [sys.executable, "-c", WATCH.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_loads_nothing_but_the_face() -> None:
    seen = watch("import skipjack")
    assert seen["modules"] == ["skipjack"]
    assert not (HEAVY | {"asyncio", "email", "zipfile"}) & set(seen["packages"])


@pytest.mark.parametrize(
    "statement",
    [
        "from skipjack import SamplingParams; SamplingParams()",
        "from skipjack import LayerPlan; LayerPlan.full(4)",
        "from skipjack import SkipjackError, RequestError",
        "from skipjack import Choice, Chunk, Output, Piece, Stats, TokenLogprob",
    ],
)
def test_requests_and_plans_need_no_torch(statement: str) -> None:
    assert not HEAVY & set(watch(statement)["packages"])


def test_the_command_line_parses_without_torch() -> None:
    seen = watch("import skipjack.runtime.commands.cli")
    assert not {"torch", "numpy", "triton", "tokenizers", "transformers"} & set(seen["packages"])
    assert "skipjack.bench" not in seen["modules"]


@pytest.mark.parametrize("statement", ["import skipjack", "import skipjack.runtime.commands.cli"])
def test_import_leaves_the_process_as_it_was(statement: str) -> None:
    seen = watch(statement)
    assert seen["environment"]
    assert seen["handlers"]
    assert seen["threads"] == 0


def test_importing_the_engine_starts_no_cuda() -> None:
    statement = "from skipjack import Engine; import torch; assert not torch.cuda.is_initialized()"
    assert "skipjack.runtime.engine" in watch(statement)["modules"]


def test_what_the_engine_gives_back_has_a_public_name() -> None:
    found = list(map(type_of, (Engine.generate, Engine.stream, Engine.astream, Engine.score, Engine.warm_up)))
    parts = [type(None)]
    while found:
        if isinstance(kind := found.pop(), type) and kind not in parts:
            parts.append(kind)
            hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
            shown = [one.fget for one in vars(kind).values() if isinstance(one, property)]
            found += [*hints.values(), *map(type_of, shown)]
            found += [type_of(vars(kind)[name]) for name in ("__next__", "__anext__") if name in vars(kind)]
        found += typing.get_args(kind)
    own = {kind.__name__ for kind in parts if kind.__module__.startswith("skipjack.")}
    assert len(own) == 10
    assert own <= set(skipjack.__all__)
    assert all(getattr(skipjack, name).__name__ == name for name in own)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert watch("import skipjack; assert not hasattr(skipjack, 'Nonsense')")["modules"] == ["skipjack"]
