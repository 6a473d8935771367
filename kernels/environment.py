"""What environment variables say of kernels; what they cannot say is an error that names them."""

from __future__ import annotations

import os


class VariableError(ValueError):
    """An environment variable has a value that means nothing."""


def dependent_launch() -> bool:
    """SKIPJACK_PDL, "1" or "0": whether kernels overlap their start with the end of the one before."""
    return _one_of("SKIPJACK_PDL", ("1", "0")) != "0"


def ahead_mib() -> int:
    """SKIPJACK_AHEAD_MIB: how much of the next weight is asked for ahead, 8 unless that says otherwise."""
    value = os.environ.get("SKIPJACK_AHEAD_MIB") or "8"
    if not (value.isascii() and value.isdigit() and len(value) < 6):
        raise VariableError(f"SKIPJACK_AHEAD_MIB: expected a whole number of MiB below 100000, got {value!r}")
    return int(value)


def cpu_kernels() -> str:
    """SKIPJACK_CPU_KERNELS: "torch" keeps PyTorch's small operations, "pairs" does without the matrix unit, or ""."""
    return _one_of("SKIPJACK_CPU_KERNELS", ("torch", "pairs"))


def check() -> None:
    """Raises VariableError: one of them has a value that means nothing."""
    for variable in (dependent_launch, ahead_mib, cpu_kernels):
        variable()


def _one_of(variable: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "")
    if value and value not in choices:
        raise VariableError(f"{variable}: expected one of {', '.join(choices)}, got {value!r}")
    return value
