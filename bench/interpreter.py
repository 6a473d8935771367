"""Triton's interpreter made quicker, with products that round as matrix units do: for tests and dry runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def mend() -> None:
    """Let the interpreter's dot sum in float64, and spare it work that has no effect; nothing without Triton.

    It calls NumPy's float32 product, which on some processors rounds a row by the shape of the whole block: a property
    of that library that a matrix instruction does not have, and that tests of row invariance would report.

    It puts its functions into triton.language for every function that a kernel calls, not once a launch, and computes
    whether integers overflow, for an assertion that is off.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    module: Any = interpreter
    language, patch, compiled = module.tl, module._patch_lang, module.tl.range
    both = SimpleNamespace(__globals__={"tl": language, "core": language.core})

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> object:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return module.TensorHandle(product + d.data, d.dtype.scalar)

    def patch_once(function: object) -> Any:
        return patch(both) if language.range is compiled else module._LangPatchScope()

    module.InterpreterBuilder.create_dot = create_dot
    module._patch_lang = patch_once
    module.interpreter_builder.options = module.InterpreterOptions(sanitize_overflow=False)
