"""The compile gate finds what it is there to find, and the kernels pass a sample of it.

Run as a program this file compiles the kernels below, without a GPU and without the interpreter, and prints what the
gate finds in each.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from skipjack.bench import gate, gate_cases, order, sass
from skipjack.bench.gate_checks import Case, Finding, Launch, Meaning, beside_next, disagreements, failures
from skipjack.kernels import launch
from skipjack.kernels.primitives import dot, prefetch_first, wait_for_producers
from skipjack.runtime.errors import ConfigError

SAMPLE = 36
ROWS, OUT, COLUMNS = 16, 64, 256


@triton.jit
def _product_kernel(
    x_ptr,
    w_ptr,
    ahead_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    FAULT: tl.constexpr,
    PDL: tl.constexpr,
):
    """W·xᵀ → out: x [ROWS, K], W [N, K], out [ROWS, N]; FAULT breaks one rule."""
    if FAULT == "early start":
        tl.extra.cuda.gdc_launch_dependents()
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, K)
    offs_r = tl.arange(0, ROWS)
    if FAULT == "early end" and tl.program_id(0) == 7:
        return
    if FAULT == "early store":
        tl.store(out_ptr + offs_r, 0.0)
    if FAULT == "early load":
        x = tl.load(x_ptr + offs_r[None, :] * K + offs_k[:, None])
    w = tl.load(w_ptr + offs_n[:, None] * K * STRIDE + offs_k[None, :] * STRIDE)
    if ahead_ptr is not None and FAULT != "nothing ahead":
        prefetch_first(ahead_ptr, N << 10)
    if FAULT == "late start":
        tl.extra.cuda.gdc_wait()
    else:
        wait_for_producers(PDL)
    if FAULT != "early load":
        x = tl.load(x_ptr + offs_r[None, :] * K + offs_k[:, None])
    if FAULT == "no product":
        y = (tl.sum(w, axis=1)[:, None] + tl.sum(x, axis=0)[None, :]).to(tl.float32)
    elif FAULT == "TF32":
        y = tl.dot(w, x, input_precision="tf32")
    else:
        y = dot(w, x, tl.zeros((BLOCK_N, ROWS), tl.float32))
    tl.store(out_ptr + offs_r[None, :] * N + offs_n[:, None], y.to(out_ptr.dtype.element_ty))
    if FAULT == "late start":
        tl.extra.cuda.gdc_launch_dependents()


MEANT = Meaning(streams=r"\bw_ptr \+", mma=True, prefetch=("BLOCK_N", "K"))


def product(
    fault: str = "",
    *,
    dtype: str = "bfloat16",
    rows: int = ROWS,
    stride: int = 1,
    columns: int = COLUMNS,
    ahead: bool = False,
    eight_bits: bool = False,
    **options: int,
) -> None:
    def tensor(*shape: int, kind: str = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, kind), device="meta")

    changed = {"not launched so": {"launch_pdl": False}, "no chain": {"PDL": False}}.get(fault, {})
    common = launch.options(4) | changed | options
    _product_kernel[(2,)](
        tensor(rows, columns),
        tensor(OUT, columns * stride, kind="int8" if eight_bits else dtype),
        tensor(OUT, columns) if ahead else None,
        tensor(rows, OUT),
        N=OUT,
        K=columns,
        BLOCK_N=OUT // 2,
        ROWS=rows,
        STRIDE=stride,
        FAULT=fault,
        **common,
    )


def compile_all() -> None:
    """Print a finding of every variant for sm_90, as JSON."""
    from skipjack.bench.gate_worker import findings, record

    launched = record("90")
    for name, (arguments, meaning, _) in VARIANTS.items():
        rows = int(arguments.get("rows", ROWS))
        case = Case(
            op="product",
            name=name,
            group="product",
            layer="",
            place=0,
            rows=rows,
            itemsize=4 if arguments.get("dtype") == "float32" else 2,
            floor=0,
            masked=False,
            launch=lambda arguments=arguments: product(**arguments),
        )
        for finding in findings(case, "90", launched, {"_product_kernel": meaning}):
            print(json.dumps([name, finding.failures]))


# The launch, what it is meant to be, and a part of the one reason for which it fails.
VARIANTS: dict[str, tuple[dict[str, object], Meaning, str | None]] = {
    "as meant": ({}, MEANT, None),
    "float32": ({"dtype": "float32"}, MEANT, None),
    "registers spilled": ({"maxnreg": 32, "rows": 128, "columns": 64}, MEANT, "registers are spilled"),
    "narrow loads": ({"stride": 2}, replace(MEANT, prefetch=()), "narrower than 128 bits"),
    "nothing streamed": ({}, replace(MEANT, streams="other_ptr"), "no load from a line with other_ptr"),
    "early load": ({"fault": "early load"}, MEANT, "dependent loads before the wait"),
    "no prefetch meant": ({}, replace(MEANT, prefetch=()), "dependent loads before the wait"),
    "other prefetch meant": ({}, replace(MEANT, prefetch=(4, "BLOCK_N", "K")), "loads before the wait"),
    "early store": ({"fault": "early store"}, MEANT, "stores before the wait"),
    "early end": ({"fault": "early end"}, MEANT, "may end before the wait"),
    "early start": ({"fault": "early start"}, MEANT, "dependents are started before the wait"),
    "late start": ({"fault": "late start"}, MEANT, "the dependents are started late"),
    "ahead": ({"ahead": True}, MEANT, None),
    "nothing ahead": ({"ahead": True, "fault": "nothing ahead"}, MEANT, "asked for nothing before the wait"),
    "eight bits": ({"eight_bits": True}, MEANT, None),
    "more of eight bits meant": (
        {"eight_bits": True},
        replace(MEANT, prefetch=(2, "BLOCK_N", "K")),
        "loads before the wait",
    ),
    "narrow loads of eight bits": (
        {"eight_bits": True, "columns": 32},
        replace(MEANT, prefetch=()),
        "narrower than 128 bits",
    ),
    "no chain": ({"fault": "no chain"}, MEANT, "no PREEXIT"),
    "not launched so": ({"fault": "not launched so"}, MEANT, "without launch_pdl"),
    "no product": ({"fault": "no product"}, MEANT, "no matrix instruction"),
    "TF32": ({"fault": "TF32", "dtype": "float32"}, MEANT, "float32 operands are rounded"),
    "does not compile": ({"rows": 3}, MEANT, "does not compile"),
}


def compiling() -> dict[str, str]:
    """The environment of a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@cache
def compiled() -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__],
            capture_output=True,
            text=True,
            env=compiling() | {"TRITON_CACHE_DIR": folder},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", VARIANTS)
def test_gate_bites(name: str) -> None:
    reason = VARIANTS[name][2]
    found = compiled()[name]
    if reason is None:
        assert found == []
    else:
        assert any(reason in failure for failure in found), found


LISTING = """
.text._kernel:
\t//## File "/kernels/some.py", line 3
        /*0000*/                   PREEXIT ;
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR10][R14.64] ;
        /*0020*/              @P1 BRA `(.L_x_1) ;
        /*0030*/                   ACQBULK ;
\t//## File "/kernels/some.py", line 5
        /*0040*/                   LDGSTS.E.BYPASS.128 [R29], desc[UR10][R26.64+0x100], !P2 ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/                   STG.E.U16 desc[UR10][R2.64], R9 ;
.L_x_2:
        /*0070*/                   HMMA.16816.F32.BF16 R56, R56, R40, RZ ;
        /*0080*/                   STL.64 [R1], R4 ;
        /*0090*/                   EXIT ;
"""


def machine_code(listing: str = LISTING, registers: int = 32, stack: int = 0) -> sass.MachineCode:
    return sass.MachineCode(*sass.parse(listing), registers, stack)


def test_machine_code_is_read() -> None:
    code = machine_code()
    assert [i.base for i in code.instructions if i.is_load] == ["LDG", "LDGSTS"]
    assert [i.width for i in code.instructions if i.is_load or i.is_store or i.is_spill] == [16, 16, 2, 8]
    assert [i.opcode for i in code.instructions if i.is_mma] == ["HMMA.16816.F32.BF16"]
    assert [i.place for i in code.instructions if i.is_load] == ["some.py:3", "some.py:5"]
    assert code.labels == {".text._kernel": 0, ".L_x_1": 6, ".L_x_2": 7}


def test_every_path_counts() -> None:
    """The branch around the wait reaches the store and the end without it; the load behind the wait is not reached."""
    early = machine_code().before("ACQBULK")
    assert [i.base for i in early] == ["PREEXIT", "LDG", "BRA", "ACQBULK", "STG", "HMMA", "STL", "EXIT"]
    straight = LISTING.replace("@P1 BRA `(.L_x_1)", "NOP")
    assert [i.base for i in machine_code(straight).before("ACQBULK")] == ["PREEXIT", "LDG", "NOP", "ACQBULK"]
    conditional = LISTING.replace("     ACQBULK", "@P3 ACQBULK")
    assert "LDGSTS" in [i.base for i in machine_code(conditional).before("ACQBULK")]


def test_subroutines_return_to_their_call() -> None:
    listing = """
        /*0000*/                   CALL.REL.NOINC `($helper) ;
        /*0010*/                   ACQBULK ;
        /*0020*/                   EXIT ;
$helper:
        /*0030*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0040*/                   RET.REL.NODEC R4 `(_kernel) ;
"""
    early = machine_code(listing).before("ACQBULK")
    assert [i.base for i in early] == ["CALL", "ACQBULK", "LDG", "RET"]
    assert not any(i.is_end for i in early)


def test_a_barrier_that_is_used_again_leads_no_thread_back_or_ahead() -> None:
    listing = """
        /*0000*/                   BSSY.RECONVERGENT B0, `(.L_first) ;
        /*0010*/               @P0 BRA `(.L_first) ;
        /*0020*/                   BSYNC.RECONVERGENT B0 ;
.L_first:
        /*0030*/                   ACQBULK ;
        /*0040*/                   BSSY.RECONVERGENT B0, `(.L_second) ;
        /*0050*/                   BSYNC.RECONVERGENT B0 ;
        /*0060*/                   NOP ;
.L_second:
        /*0070*/                   STG.E [R2.64], R9 ;
        /*0080*/                   EXIT ;
"""
    assert [i.base for i in machine_code(listing).before("ACQBULK")] == ["BSSY", "BRA", "BSYNC", "ACQBULK"]


def test_what_was_known_before_may_be_loaded_before_the_wait(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("p = tl.load(position_ptr + r)\nx = tl.load(x_ptr + k)\n", encoding="utf-8")

    def reasons(*lines: int, known: str | None = r"\bposition_ptr \+") -> list[str]:
        loads = [f'\t//## File "{source}", line {line}\n /*0000*/ LDG.E.64 R8, desc[UR10][R14.64] ;' for line in lines]
        rest = [" /*0010*/ ACQBULK ;", " /*0020*/ PREEXIT ;", " /*0030*/ EXIT ;"]
        launched = Launch({}, 2, 4, 0, True, 90)
        return failures(machine_code("\n".join([*loads, *rest])), Meaning(known=known), launched)

    assert reasons() == reasons(1) == []
    assert "dependent loads before the wait" in reasons(1, known=None)[0]
    assert "dependent loads before the wait" in reasons(1, 2)[0]


def test_warps_do_not_repeat_each_others_products() -> None:
    def reasons(warps: int, parts: int) -> list[str]:
        listing = LISTING.replace("STL.64 [R1], R4", "NOP")
        return failures(machine_code(listing), Meaning(waits=False), Launch({"PARTS": parts}, 2, warps, 0, True, 90))

    assert reasons(4, 4) == reasons(4, 8) == reasons(8, 8) == reasons(8, 1) == []
    assert "8 warps share 4 parts" in reasons(8, 4)[0]


def test_memory_is_limited_by_the_chip() -> None:
    def reasons(arch: int, shared: int, stack: int = 0) -> list[str]:
        listing = LISTING.replace("STL.64 [R1], R4", "NOP")
        return failures(machine_code(listing, stack=stack), Meaning(waits=False), Launch({}, 2, 4, shared, True, arch))

    assert reasons(80, 163 * 1024) == []
    assert "the chip has" in reasons(80, 163 * 1024 + 1)[0]
    assert reasons(90, 227 * 1024) == []
    assert "the chip has" in reasons(100, 227 * 1024 + 1)[0]
    assert reasons(90, 0, stack=8) == ["8 bytes of stack"]


SPILLS = """
        /*0000*/                   STL [R1], R4 ;
.L_loop:
        /*0010*/                   {inside}
        /*0020*/                   HMMA.16816.F32.BF16 R56, R56, R40, RZ ;
        /*0030*/               @P1 BRA `(.L_loop) ;
        /*0040*/                   LDL.LU R4, [R1] ;
        /*0050*/                   EXIT ;
.L_trap:
        /*0060*/                   BRA `(.L_trap);
"""


def test_registers_may_be_put_aside_before_a_loop_but_not_in_it() -> None:
    def reasons(inside: str, stack: int = 8, before: int = 1) -> list[str]:
        listing = SPILLS.format(inside=inside).replace("/*0000*/ ", "/*0000*/ STL [R1], R4 ;\n /*0000*/ " * before)
        return failures(machine_code(listing, stack=stack), Meaning(waits=False), Launch({}, 2, 4, 0, True, 90))

    assert reasons("NOP ;") == reasons("NOP ;", before=14) == []
    assert "17 loads and stores of local memory: " in reasons("NOP ;", before=15)[0]
    assert "1 loads and stores of local memory in loops" in reasons("LDL R4, [R1] ;")[0]
    assert reasons("NOP ;", stack=16) == [], "four bytes in a frame of sixteen"
    assert reasons("NOP ;", stack=24) == ["24 bytes of stack"], "an array"


LAYOUTS = """
#blocked = #ttg.blocked<{sizePerThread = [8, 1], threadsPerWarp = [16, 2], warpsPerCTA = [1, 4], order = [0, 1]}>
#other = #ttg.blocked<{sizePerThread = [4, 1], threadsPerWarp = [32, 1], warpsPerCTA = [1, 4], order = [0, 1]}>
#linear = #ttg.linear<{register = [[0, 1], [4, 0]], lane = [[1, 0], [2, 0]], warp = [[0, 2]], block = []}>
"""
SUM = """
    %9 = "tt.reduce"(%8) <{axis = 0 : i32}> ({
    ^bb0(%a: f32, %b: f32):
      %c = arith.addf %a, %b : f32 loc(#loc1)
      tt.reduce.return %c : f32 loc(#loc1)
    }) : (tensor<128x8xf32, #blocked>) -> tensor<8xf32, #ttg.slice<{dim = 0, parent = #blocked}>> loc(#loc2)
"""


def test_order_of_sums_is_read() -> None:
    def of(text: str) -> list[str]:
        return order.sums(LAYOUTS + text)

    assert of(SUM) == of(SUM.replace("128x8x", "128x16x"))
    assert of(SUM) != of(SUM.replace("#blocked>) ->", "#other>) ->"))
    assert of(SUM) != of(SUM.replace("128x8x", "256x8x"))
    assert of(SUM.replace("addf", "maxnumf")) == []
    assert of(SUM.replace("128x8x", "2x8x")) == []
    sliced = SUM.replace("tensor<128x8xf32, #blocked>", "tensor<8xf32, #ttg.slice<{dim = 0, parent = #linear}>>")
    assert of(sliced) == ["reduce of 8 f32: #ttg.linear register [1], lane [], warp [2], block []"]
    pair = "tensor<16x64xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>> * tensor<64x16xbf16, #other>"
    assert of(f"%1 = tt.dot %a, %b, %c : {pair}") == ["tt.dot kWidth 4"]
    assert of("%1 = ttng.warp_group_dot %a, %b, %c") == ["ttng.warp_group_dot"]


def finding(**fields: object) -> Finding:
    fixed = {"kernel": "_some_kernel", "case": "some", "group": "some", "layer": "all", "place": 0, "rows": 1}
    return Finding(**fixed | {"arch": "90", "triton": "3.9.0", "floor": 1} | fields)


def test_rows_that_round_differently_are_found() -> None:
    one, other = finding(mma_opcodes=("HMMA",), sums=("a",)), finding(rows=16, mma_opcodes=("HMMA",), sums=("a",))
    assert disagreements([one, other]) == {}
    assert len(disagreements([one, replace(other, mma_opcodes=("HGMMA",))])) == 1
    assert len(disagreements([one, replace(other, sums=("b",))])) == 1
    assert disagreements([one, replace(other, sums=("b",), arch="100")]) == {}
    assert disagreements([one, replace(other, sums=("b",), group="other")]) == {}
    assert len(disagreements([one, replace(other, sums=("b",), rows=1, case="some, masked")])) == 1


def test_neighbours_share_an_sm() -> None:
    kernels = [
        finding(place=place, registers=64, threads=128, shared=kib * 1024) for place, kib in enumerate((99, 60, 150))
    ]
    assert [beside_next(kernels, 90)[id(kernel)] for kernel in kernels] == [True, True, False]
    assert [beside_next(kernels, 80)[id(kernel)] for kernel in kernels] == [True, False, False]
    many = [finding(place=place, registers=255, threads=256) for place in range(2)]
    assert not any(beside_next(many, 90).values())


def test_sample_is_spread_and_steady() -> None:
    targets = [gate.Target(version, None, arch) for version in ("3.6.0", "3.9.0") for arch in ("80", "90", "100")]
    kinds = {"linear": 40, "head": 3, "verify": 1}
    cases = [
        Case(op, f"{op} {n}", f"{op} {n}", "", 0, 1, 2, 0, False, object)
        for op, count in kinds.items()
        for n in range(count)
    ]
    chosen = gate.sample(cases, targets, 24)
    assert chosen == gate.sample(list(reversed(cases)), targets, 24)
    assert len(set(chosen)) == 24
    assert {(target, group.split()[0]) for target, group in chosen} == {(t, op) for t in targets for op in kinds}
    assert len(gate.sample(cases, targets, 10**6)) == 44 * len(targets)


def test_tritons_set_aside_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '1.2.3'\n")
    monkeypatch.setenv("SKIPJACK_GATE_TRITON", str(tmp_path))
    assert gate.tritons() == {"1.2.3": tmp_path, triton.__version__: None}
    with pytest.raises(FileNotFoundError, match="cuobjdump"):
        sass.tools(package)
    monkeypatch.setenv("SKIPJACK_GATE_TRITON", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="SKIPJACK_GATE_TRITON"):
        gate.tritons()


def test_attention_rounds_alike_whatever_rows_it_is_given() -> None:
    group = "SmolLM2-135M bfloat16 attention"
    names = [case.name for case in gate_cases.cases() if case.group == group and case.rows in (1, 16)]
    assert len(names) == 12
    here = gate.tritons()
    found = gate.compile_all({gate.Target(version, here[version], "90"): names for version in here})
    assert len(found) >= len(names) * len(here)
    assert not any(finding.failures for finding in found)
    assert disagreements([one for one in found if one.kernel == "_attend_kernel"]) == {}


def test_sample_of_the_kernels_is_as_meant() -> None:
    missing = {"3.6.0", "3.9.0"} - set(gate.tritons())
    if missing:
        pytest.skip(
            f"Triton {', '.join(sorted(missing))} is not set aside; `make test` does it, or SKIPJACK_GATE_TRITON"
        )
    command = [sys.executable, "-m", "skipjack.bench.gate", "--sample", str(SAMPLE)]
    targets = ["--triton", "3.6.0", "--triton", "3.9.0", "--arch", "80", "--arch", "90", "--arch", "100"]
    done = subprocess.run([*command, *targets], capture_output=True, text=True, env=compiling(), check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


if __name__ == "__main__":
    compile_all()
