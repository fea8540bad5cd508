"""Native libraries: built once, by whatever compiler there is; without one, a reason and no
exception."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from ctypes import c_int
from dataclasses import replace
from pathlib import Path

import pytest

from qtool import native_build
from qtool.native_build import (
    InstructionSet,
    Loaded,
    Missing,
    NativeLibrary,
    Unavailable,
    find_instruction_set,
    open_library,
)
from qtool.settings import Settings

ANY_CPU = InstructionSet("any", frozenset(), ())
WIDE = InstructionSet("wide", frozenset({"avx512f", "fma"}), ())
NARROW = InstructionSet("narrow", frozenset({"avx2", "fma"}), ())


@pytest.fixture
def library(tmp_path: Path) -> NativeLibrary:
    """A library of one function that compiles in a moment."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(
        '#include "number.h"\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return NUMBER; }\n'
    )
    (folder / "number.h").write_text("#define NUMBER 42\n")
    return NativeLibrary("test", "a test", folder, (), (ANY_CPU,), {"answer": (c_int, ())})


@pytest.fixture
def compiler() -> None:
    try:
        native_build.find_compiler()
    except Unavailable as reason:
        pytest.skip(str(reason))


def answer(cache: Path, library: NativeLibrary) -> int:
    found = open_library(library, Settings(cache_dir=cache))
    assert isinstance(found, Loaded), found
    return int(found.functions.answer())


def reason(cache: Path, library: NativeLibrary, isa: str | None = None) -> str:
    found = open_library(library, Settings(cache_dir=cache), isa)
    assert isinstance(found, Missing)
    return found.reason


@pytest.mark.usefixtures("compiler")
def test_a_library_is_built_once_and_again_when_a_source_changes(
    tmp_path: Path, library: NativeLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert answer(cache, library) == 42
    assert "compiling a test for any, once" in capsys.readouterr().err
    (first,) = cache.iterdir()
    written = first.stat().st_mtime_ns
    assert answer(cache, library) == 42
    assert first.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    (library.sources / "number.h").write_text("#define NUMBER 43\n")
    assert answer(cache, library) == 43
    assert len(list(cache.iterdir())) == 2  # nothing half-written stays


@pytest.mark.usefixtures("compiler")
def test_without_a_writable_cache_the_library_is_loaded_from_a_temporary_folder(
    tmp_path: Path, library: NativeLibrary
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert answer(blocked / "cache", library) == 42
    assert answer(Path("no/home"), library) == 42
    assert not Path("no").exists()


@pytest.mark.usefixtures("compiler")
def test_a_damaged_library_in_the_cache_is_built_anew(
    tmp_path: Path, library: NativeLibrary
) -> None:
    # Elsewhere first: a process loads a path once, and this one must not know the damaged one.
    answer(tmp_path / "first", library)
    (whole,) = (tmp_path / "first").iterdir()
    damaged = tmp_path / "second" / whole.name
    damaged.parent.mkdir()
    damaged.write_bytes(whole.read_bytes()[:100])
    assert answer(damaged.parent, library) == 42
    assert damaged.stat().st_size > 1000


@pytest.mark.usefixtures("compiler")
def test_processes_that_build_at_once_do_not_disturb_each_other(
    tmp_path: Path, library: NativeLibrary
) -> None:
    program = (
        "import sys; from ctypes import c_int; from pathlib import Path\n"
        "from qtool.native_build import *; from qtool.settings import Settings\n"
        "cache, sources = map(Path, sys.argv[1:])\n"
        "isa = InstructionSet('any', frozenset(), ())\n"
        "one = NativeLibrary('test', 'a test', sources, (), (isa,), {'answer': (c_int, ())})\n"
        "print(open_library(one, Settings(cache_dir=cache)).functions.answer())"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "cache"), str(library.sources)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["42", "42"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_compiler_is_a_reason(
    tmp_path: Path, library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = reason(tmp_path / "cache", library)
    assert said == ("is not available: no C++ compiler: none of g++, c++, clang++ is on the PATH")


def test_a_failing_compiler_is_a_reason(
    tmp_path: Path, library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in native_build.COMPILERS:
        script = '[ "$1" = --version ] && exit 0; echo "x.cpp:1: fatal error: no omp.h" >&2; exit 1'
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")
    said = reason(tmp_path / "cache", library)
    assert "failed: x.cpp:1: fatal error: no omp.h" in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("compiler")
def test_a_library_without_the_functions_is_a_reason(
    tmp_path: Path, library: NativeLibrary
) -> None:
    other = replace(library, prototypes={"question": (c_int, ())})
    assert "undefined symbol: question" in reason(tmp_path / "cache", other)


def test_it_can_be_switched_off(tmp_path: Path, library: NativeLibrary) -> None:
    found = open_library(library, Settings(native=False, cache_dir=tmp_path))
    assert found == Missing("is switched off by QTOOL_NATIVE")


def test_the_best_instruction_set_of_the_cpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = (WIDE, NARROW)
    monkeypatch.setattr(native_build, "cpu_flags", lambda: WIDE.needs | NARROW.needs)
    assert find_instruction_set(sets) == WIDE
    assert find_instruction_set(sets, "narrow") == NARROW
    monkeypatch.setattr(native_build, "cpu_flags", lambda: NARROW.needs)
    assert find_instruction_set(sets) == NARROW
    with pytest.raises(Unavailable, match="this CPU cannot run wide"):
        find_instruction_set(sets, "wide")
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset({"sse4_2"}))
    with pytest.raises(Unavailable, match="this CPU lacks avx2, fma"):
        find_instruction_set(sets)
    assert find_instruction_set((*sets, ANY_CPU)) == ANY_CPU


def test_other_machines_are_told_so_or_get_what_runs_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(Unavailable, match="written for Linux on x86-64, this is"):
        find_instruction_set((WIDE, NARROW))
    assert find_instruction_set((WIDE, ANY_CPU)) == ANY_CPU
