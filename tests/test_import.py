import json
import os
import subprocess
import sys

import pytest

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


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert watch("import skipjack; assert not hasattr(skipjack, 'Nonsense')")["modules"] == ["skipjack"]
