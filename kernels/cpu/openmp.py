"""The threads PyTorch computes with on a CPU: the OpenMP library that it has loaded."""

import ctypes
import re
from functools import cache
from pathlib import Path

import numpy as np

_LIBRARIES = re.compile(r"/lib(gomp|omp|iomp5)[^/]*\.so[^/]*$")
_SOFTLY = 1


def team() -> int:
    """The address of what `team.py` calls a team, or 0 where the library has no `GOMP_parallel`."""
    return _team().ctypes.data if _team()[0] else 0


@cache
def _team() -> np.ndarray:
    functions = getattr(_library(), "GOMP_parallel", None), getattr(ctypes.CDLL(None), "sched_yield", None)
    addresses = [0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
    return np.array([*addresses, 0], np.int64)


def disband() -> None:
    """Let go of the threads that this thread computes with; its next computation starts them anew, in some 0.1 ms.

    Every thread that computes has a team of its own. Once GNU's library has more threads in all than there are
    processors, none of them waits awake for the next piece of work any more, and those are a few microseconds apart.
    Other libraries deal their threads out among teams; there nothing is done.
    """
    pause = getattr(_library(), "omp_pause_resource_all", None)
    if pause is not None and "/libgomp" in _path():
        pause(_SOFTLY)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path) if (path := _path()) else None
    except OSError:
        return None


@cache
def _path() -> str:
    """Where that of PyTorch lies; empty where there is none or a doubt which it is."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    paths = {line.split(maxsplit=5)[-1] for line in loaded if _LIBRARIES.search(line)}
    own = [path for path in paths if "/torch/" in path] or list(paths)
    return own[0] if len(own) == 1 else ""
