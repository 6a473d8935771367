import os
from pathlib import Path

import pytest


def _from_environment(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of conformance cases."""
    return _from_environment("SKIPJACK_GOLDEN")


@pytest.fixture(scope="session")
def prompts_file() -> Path:
    """A JSON-lines file of prompts with the fields question_id, category and turns."""
    return _from_environment("SKIPJACK_PROMPTS")
