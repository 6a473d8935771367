import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Triton reads this when a kernel is defined, so it stands before the first import of one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from skipjack import Engine
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights


def _interpret_products_exactly() -> None:
    """Let the interpreter's dot sum in float64.

    It calls NumPy's float32 product, which on some processors rounds a row by the shape of the whole block: a property
    of that library that a matrix instruction does not have, and that tests of row invariance would report.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> object:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


_interpret_products_exactly()


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


@pytest.fixture(scope="session")
def synthetic() -> Callable[..., Engine]:
    """Engines over small random models, one per (shape, dtype, late_scale), shared by the tests."""

    @cache
    def engine(
        shape: str = "tiny", dtype: torch.dtype = torch.float32, late_scale: float = 0.3, vocab: int | None = None
    ) -> Engine:
        fields = synthetic_config(shape) | ({"vocab_size": vocab} if vocab else {})
        config = ModelConfig.parse(fields, shape)
        return Engine(config, synthetic_weights(config, 0, dtype, late_scale))

    return engine


@pytest.fixture(scope="session")
def demo() -> Engine:
    """The packaged model, in its own dtype."""
    pytest.importorskip("gguf", reason="the demo model's packages are not installed")
    return Engine.load("demo")
