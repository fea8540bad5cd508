"""Kernels compiled for GPUs that are not here cost no more than `budgets.py` allows."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from qtool.kernels import aot
from qtool.kernels.aot import Compiled, hot_loop, read_listing
from qtool.kernels.cuda import launch
from qtool.kernels.cuda.budgets import CASES, Case, excess
from qtool.kernels.cuda.launch import Launch

LISTING = """
.L_x_1:
        /*0000*/                   LDS.128 R4, [R2] ;
        /*0010*/              @!P0 HGMMA.64x16x16.F32.BF16 R24, R4 ;
.L_x_2:
        /*0020*/                   SHFL.IDX PT, R3, R3, R1, 0x1f ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


def test_the_hot_loop_is_the_one_with_matrix_instructions() -> None:
    listing = read_listing(LISTING)
    assert len(listing.instructions) == 7
    assert listing.labels == {".L_x_1": 0, ".L_x_2": 2}
    assert hot_loop(listing) == {
        "LDS.128": 1,
        "HGMMA.64x16x16.F32.BF16": 1,
        "SHFL.IDX": 1,
        "BRA": 2,
        "IADD3": 1,
    }
    assert hot_loop(read_listing("")) == {}


def test_a_triton_without_its_tools_still_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_tools(capability: tuple[int, int]) -> bool:
        return bool(subprocess.run(["/nowhere/cuobjdump"], check=True))

    monkeypatch.setattr(aot, "wants_inputs_by_thread", without_tools)
    found = launch._on_nvidia.__wrapped__((8, 0))
    assert found == Launch(has_assembly=True, inputs_by_thread=False, has_wgmma=False)


def test_whatever_is_over_its_budget_is_named() -> None:
    case = Case(
        "k", "linear:k", {}, "sm_90", units=2.0, registers=128, per_unit=20, matrix="HGMMA",
        no_shuffle=True,
    )  # fmt: skip
    good = Compiled("sm_90", 128, 0, 1000, {"HGMMA.64": 4}, {"FFMA": 40}, ())
    assert excess(case, good) == []
    bad = Compiled("sm_90", 200, 8, 1000, {"HMMA.16": 4}, {"FFMA": 40, "SHFL.IDX": 2}, ("C7515",))
    assert excess(case, bad) == [
        "spills 8 bytes",
        "200 registers, may have 128",
        "C7515",
        "no HGMMA, has ['HMMA.16']",
        "21.0 instructions a unit, may have 20",
        "2 exchanges in the loop",
    ]


def run_python(*arguments: str) -> Any:
    """The JSON that another process prints: this one may interpret kernels, and cannot do both."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Any]:
    rows = run_python("-m", "qtool.kernels.aot", "--json")
    return {(row["name"], row["arch"]): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.arch}")
def test_no_kernel_is_over_its_budget(
    case: Case, compiled: dict[tuple[str, str], dict[str, Any]]
) -> None:
    found = dict(compiled[case.name, case.arch])
    assert found.pop("excess") == []
    del found["name"]
    assert {field.name for field in dataclasses.fields(Compiled)} == set(found)


def test_cases_are_told_apart_by_name_and_architecture() -> None:
    names = [(case.name, case.arch) for case in CASES]
    assert len(set(names)) == len(names)


ORDERS = """
import json
from qtool.kernels.aot import compile_kernel, wants_inputs_by_thread
from qtool.kernels.cuda.budgets import linear_case

case = linear_case("sm_80", by_thread=wants_inputs_by_thread((8, 0)))
found = compile_kernel(case.kernel(), case.arguments, case.arch, stages=case.stages)
print(json.dumps([found.loop_instructions / case.units, found.in_loop("SHFL")]))
"""


@pytest.mark.slow
def test_the_order_of_inputs_that_is_chosen_leaves_weights_where_they_are() -> None:
    """With any version of Triton; in the other order, a word takes 31 or 41 instructions."""
    per_word, exchanges = run_python("-c", ORDERS)
    assert per_word < 28
    assert exchanges == 0
