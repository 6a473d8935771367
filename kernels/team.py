"""The threads PyTorch computes with on a CPU, for kernels that are not its own.

Another pool of threads would fight with them for the cores. They belong to the OpenMP library that PyTorch has loaded,
whose entry for compiled code is called by its address; where it has none a kernel runs on one thread.
"""

import ctypes
import re
from functools import cache
from pathlib import Path

_LIBRARIES = re.compile(r"/lib(gomp|omp|iomp5)[^/]*\.so[^/]*$")


@cache
def entry() -> int:
    """The address of `GOMP_parallel(function, data, threads, flags)`, or 0."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    paths = {line.split(maxsplit=5)[-1] for line in loaded if _LIBRARIES.search(line)}
    own = [path for path in paths if "/torch/" in path] or list(paths)
    if len(own) != 1:
        return 0
    try:
        function = ctypes.CDLL(own[0]).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
