"""The console entry point, which imports little: Ctrl-C ends the import of the commands as it ends a command."""

import os
import signal
import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Import the commands and run one."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        # An exception could come out of an import as another one.
        signal.signal(signal.SIGINT, _leave)
    from .cli import main as run

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _leave(*_: object) -> None:
    if sys.stderr and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\n")
    os._exit(EXIT_INTERRUPTED)
