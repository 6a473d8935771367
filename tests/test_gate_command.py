"""The compile gate looks at everything there is, and tells a mistake of its user from a failure."""

import sys
from dataclasses import fields

import pytest

from skipjack.bench import gate, gate_cases, gate_kernels
from skipjack.kernels.ops import Ops


def test_no_op_and_no_kernel_is_left_out() -> None:
    ops = [field.name for field in fields(Ops)]
    assert {*ops[ops.index("enter") :]} == {case.op for case in gate_cases.cases()}
    names = [name for name in sys.modules if name.startswith("skipjack.kernels.")]
    assert {*gate_kernels.KERNELS} == {n for name in names for n in vars(sys.modules[name]) if n.endswith("_kernel")}


@pytest.mark.parametrize("wrong", [["--kernel", "nope"], ["--arch", "75"], ["--json", "."]], ids=str)
def test_a_mistake_is_no_failure_of_a_kernel(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gate", *wrong])
    with pytest.raises(SystemExit) as end:
        gate.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {wrong[0]}: ")
