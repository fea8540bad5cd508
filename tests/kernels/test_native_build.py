"""The kernels' build: which instruction set a CPU gets, and what the sanitizers say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qtool import native_build
from qtool.kernels.cpu.build import INSTRUCTION_SETS, SOURCES
from qtool.native_build import InstructionSet, Unavailable, find_compiler, find_instruction_set
from qtool.settings import child_environment


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS, ids=lambda isa: isa.name)
def test_the_sanitizers_find_nothing(tmp_path: Path, isa: InstructionSet) -> None:
    try:
        find_instruction_set(INSTRUCTION_SETS, isa.name)
        compiler, _ = find_compiler()
    except Unavailable as reason:
        pytest.skip(str(reason))
    program = tmp_path / "harness"
    command = [compiler, "-std=c++17", "-O1", "-g", "-fopenmp", *isa.flags]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(Path(__file__).parent / "native_harness.cpp"), *SOURCES.glob("*.cpp")]
    made = subprocess.run(
        [*command, *checks, f"-I{SOURCES}", *sources, "-o", program],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find -lasan" in made.stderr or "cannot find -lubsan" in made.stderr:
        pytest.skip("the compiler comes without its sanitizers")
    assert made.returncode == 0, made.stderr
    environment = child_environment(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    ran = subprocess.run([program], capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stdout) == (0, f"{isa.name} clean\n"), ran.stderr


def test_the_best_instruction_set_of_the_cpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = frozenset.union(*(isa.needs for isa in INSTRUCTION_SETS))
    monkeypatch.setattr(native_build, "cpu_flags", lambda: everything)
    assert find_instruction_set(INSTRUCTION_SETS).name == "avx512-vnni"
    # Skylake-X has AVX-512 without VNNI.
    monkeypatch.setattr(native_build, "cpu_flags", lambda: everything - {"avx512_vnni"})
    assert find_instruction_set(INSTRUCTION_SETS).name == "avx2"
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset({"sse4_2", "fma"}))
    with pytest.raises(Unavailable, match="this CPU lacks avx2, f16c"):
        find_instruction_set(INSTRUCTION_SETS)
