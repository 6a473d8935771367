"""The console entry point, which imports little: Ctrl-C ends the import of the commands as it ends a command."""

import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130
# What commands import when they need it; with the last come kernels that numba compiles, or loads from the disk.
LOADED_LATE = ("torch.", "triton.", "numba.", "skipjack.kernels.cpu.")


def main() -> None:
    """Import the commands and run one."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        # An exception could come out of an import as another one.
        signal.signal(signal.SIGINT, _leave)
    from .cli import main as run

    if usual:
        signal.signal(signal.SIGINT, _interrupt)
    run()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As usual; but while these load, an exception would come out as another one, or as the end of the process."""
    loading = (module for name, module in list(sys.modules.items()) if f"{name}.".startswith(LOADED_LATE))
    if any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in loading):
        _leave()
    signal.default_int_handler(number, frame)


def _leave(*_: object) -> None:
    if sys.stderr and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\n")
    os._exit(EXIT_INTERRUPTED)
