"""The kernels' build: which instruction set a CPU gets, and what the sanitizers say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool import native_build
from qtool.kernels.cpu.build import INSTRUCTION_SETS, SOURCES
from qtool.native_build import InstructionSet, Unavailable, find_instruction_set


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS, ids=lambda isa: isa.name)
def test_the_sanitizers_find_nothing(
    run_sanitized: Callable[..., str], isa: InstructionSet
) -> None:
    harness = Path(__file__).parent / "native_harness.cpp"
    flags = ["-std=c++17", "-fopenmp", *isa.flags]
    printed = run_sanitized(harness, SOURCES, flags, isa, INSTRUCTION_SETS)
    assert printed == f"{isa.name} clean\n"


def test_the_best_instruction_set_of_the_cpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = frozenset.union(*(isa.needs for isa in INSTRUCTION_SETS))
    monkeypatch.setattr(native_build, "cpu_flags", lambda: everything)
    assert find_instruction_set(INSTRUCTION_SETS).name == "avx512-vnni-intel"
    # Ice Lake and Zen 4.
    monkeypatch.setattr(native_build, "cpu_flags", lambda: everything - {"amx_tile"})
    assert find_instruction_set(INSTRUCTION_SETS).name == "avx512-vnni"
    # Skylake-X has AVX-512 without VNNI.
    monkeypatch.setattr(native_build, "cpu_flags", lambda: everything - {"avx512_vnni"})
    assert find_instruction_set(INSTRUCTION_SETS).name == "avx2"
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset({"sse4_2", "fma"}))
    with pytest.raises(Unavailable, match="this CPU lacks avx2, f16c"):
        find_instruction_set(INSTRUCTION_SETS)
