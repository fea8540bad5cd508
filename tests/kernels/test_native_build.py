"""Building: once, by whatever compiler there is; without one, a reason and no exception."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.kernels.cpu import build
from qtool.kernels.cpu.build import INSTRUCTION_SETS, InstructionSet, Unavailable
from qtool.kernels.cpu.native import Missing, open_library
from qtool.settings import Settings, child_environment

AVX2 = INSTRUCTION_SETS[-1]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A library of one function that compiles in a moment."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(
        '#include "number.h"\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return NUMBER; }\n'
    )
    (folder / "number.h").write_text("#define NUMBER 42\n")
    return folder


@pytest.fixture
def compiler() -> None:
    try:
        build.cpu_flags()
        build._find_compiler()
    except Unavailable as reason:
        pytest.skip(str(reason))


def answer(cache: Path, sources: Path) -> int:
    return int(build.load_library(AVX2, cache, sources).answer())


@pytest.mark.usefixtures("compiler")
def test_a_library_is_built_once_and_again_when_a_source_changes(
    tmp_path: Path, sources: Path
) -> None:
    cache = tmp_path / "cache"
    assert answer(cache, sources) == 42
    (first,) = cache.iterdir()
    written = first.stat().st_mtime_ns
    assert answer(cache, sources) == 42
    assert first.stat().st_mtime_ns == written
    (sources / "number.h").write_text("#define NUMBER 43\n")
    assert answer(cache, sources) == 43
    assert len(list(cache.iterdir())) == 2  # nothing half-written stays


@pytest.mark.usefixtures("compiler")
def test_without_a_writable_cache_the_library_is_loaded_from_a_temporary_folder(
    tmp_path: Path, sources: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert answer(blocked / "cache", sources) == 42
    assert answer(Path("no/home"), sources) == 42
    assert not Path("no").exists()


@pytest.mark.usefixtures("compiler")
def test_a_damaged_library_in_the_cache_is_built_anew(tmp_path: Path, sources: Path) -> None:
    # Elsewhere first: a process loads a path once, and this one must not know the damaged one.
    answer(tmp_path / "first", sources)
    (whole,) = (tmp_path / "first").iterdir()
    damaged = tmp_path / "second" / whole.name
    damaged.parent.mkdir()
    damaged.write_bytes(whole.read_bytes()[:100])
    assert answer(damaged.parent, sources) == 42
    assert damaged.stat().st_size > 1000


@pytest.mark.usefixtures("compiler")
def test_processes_that_build_at_once_do_not_disturb_each_other(
    tmp_path: Path, sources: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from qtool.kernels.cpu import build\n"
        "folders = map(Path, sys.argv[1:])\n"
        "print(build.load_library(build.INSTRUCTION_SETS[-1], *folders).answer())"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "cache"), str(sources)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["42", "42"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def fake_compiler(folder: Path, script: str) -> None:
    folder.mkdir()
    for name in build.COMPILERS:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def reason(tmp_path: Path, isa: str | None = None) -> str:
    found = open_library(Settings(cache_dir=tmp_path / "cache"), isa)
    assert isinstance(found, Missing)
    return found.reason


@pytest.fixture
def capable_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: AVX2.needs)


@pytest.mark.usefixtures("capable_cpu")
def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler: none of g++, c++, clang++ is on the PATH" in reason(tmp_path)


@pytest.mark.usefixtures("capable_cpu")
def test_a_failing_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(
        tmp_path / "bin",
        '[ "$1" = --version ] && exit 0; echo "x.cpp:1: fatal error: no omp.h" >&2; exit 1',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert "failed: x.cpp:1: fatal error: no omp.h" in reason(tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("compiler")
def test_a_library_without_the_functions_is_a_reason(tmp_path: Path, sources: Path) -> None:
    found = open_library(Settings(cache_dir=tmp_path / "cache"), "avx2", sources)
    assert isinstance(found, Missing)
    assert "undefined symbol: qtool_isa" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS, ids=lambda isa: isa.name)
def test_the_sanitizers_find_nothing(tmp_path: Path, isa: InstructionSet) -> None:
    try:
        build.find_instruction_set(isa.name, build.cpu_flags())
        compiler, _ = build._find_compiler()
    except Unavailable as reason:
        pytest.skip(str(reason))
    program = tmp_path / "harness"
    command = [compiler, "-std=c++17", "-O1", "-g", "-fopenmp", *isa.flags]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(Path(__file__).parent / "native_harness.cpp"), *build.SOURCES.glob("*.cpp")]
    made = subprocess.run(
        [*command, *checks, f"-I{build.SOURCES}", *sources, "-o", program],
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


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    found = open_library(Settings(native=False, cache_dir=tmp_path))
    assert found == Missing("is switched off by QTOOL_NATIVE")


def test_the_best_instruction_set_of_the_cpu_is_chosen() -> None:
    everything = frozenset.union(*(isa.needs for isa in INSTRUCTION_SETS))
    assert build.choose_instruction_set(everything).name == "avx512-vnni"
    # Skylake-X has AVX-512 without VNNI.
    assert build.choose_instruction_set(everything - {"avx512_vnni"}).name == "avx2"
    with pytest.raises(Unavailable, match="this CPU lacks avx2, f16c"):
        build.choose_instruction_set(frozenset({"sse4_2", "fma"}))
    with pytest.raises(Unavailable, match="cannot run avx512-vnni"):
        build.find_instruction_set("avx512-vnni", AVX2.needs)


def test_other_machines_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "written for Linux on x86-64, this is" in reason(tmp_path)
