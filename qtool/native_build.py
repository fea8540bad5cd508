"""Compile C++ sources with the machine's own compiler, once, and keep the library.

The sources of a `NativeLibrary` speak a plain C interface and include no PyTorch header, so a build
takes seconds and the result does not depend on PyTorch's version. There is one library for each
instruction set; which one a machine runs is decided from the flags that Linux lists for its CPU,
never by `-march=native`, so that a cache shared by different machines stays right.

A library's file is named by the hash of all that went into it: sources, flags, and what the
compiler says of itself. It is written under a name of its own and renamed into place: processes
that build at the same time do the work twice and harm nobody.

`open_library` never raises: where a library cannot be had, it returns a `Missing` with the reason,
and whoever asked has another way to do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.progress import console
from qtool.settings import Settings

# g++ first: its OpenMP runtime is the one PyTorch's Linux builds carry, and the two then share it.
COMPILERS = ("g++", "c++", "clang++")
COMMON_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    # Sums are rounded where the source says so, in all instruction sets alike.
    "-ffp-contract=off",
    "-fno-math-errno",
    # Vector arguments are never passed between instruction sets.
    "-Wno-psabi",
)
LINK_FLAGS = ("-shared", "-fopenmp")
TIMEOUT_SECONDS = 300


class Unavailable(Exception):
    """Why a compiled library cannot be had, in words for a table or a log."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """needs: flags of /proc/cpuinfo, none for a set that every machine has; flags: the
    compiler's."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


Prototypes = Mapping[str, tuple[Any, tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """All .cpp files of a folder as one library.

    name              stands in the file's name
    title             what it is, for the line that says that it is compiled
    flags             the compiler's, beside COMMON_FLAGS
    instruction_sets  best first
    prototypes        function -> (result, arguments), in ctypes; all must be there
    """

    name: str
    title: str
    sources: Path
    flags: tuple[str, ...]
    instruction_sets: tuple[InstructionSet, ...]
    prototypes: Prototypes

    def compile_flags(self, isa: InstructionSet) -> tuple[str, ...]:
        return (*COMMON_FLAGS, *self.flags, *isa.flags)


@dataclass(frozen=True, slots=True)
class Missing:
    """A library is not there, and why."""

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A library and the name of its instruction set."""

    functions: ctypes.CDLL
    isa: str


def open_library(
    library: NativeLibrary, chosen: Settings, isa: str | None = None
) -> Loaded | Missing:
    """The library for an instruction set, or for the best this CPU has; built if it has to be."""
    if not chosen.native:
        return Missing("is switched off by QTOOL_NATIVE")
    try:
        wanted = find_instruction_set(library.instruction_sets, isa)
        functions = load_library(library, wanted, chosen.cache_dir)
        for name, (result, arguments) in library.prototypes.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (Unavailable, AttributeError) as error:
        return Missing(f"is not available: {error}")
    return Loaded(functions, wanted.name)


def cpu_flags() -> frozenset[str]:
    """What Linux lists for the first CPU; raises Unavailable on other systems."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        raise Unavailable(f"written for Linux on x86-64, this is {system} on {machine}")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise Unavailable(f"cannot read /proc/cpuinfo: {error.strerror}") from None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    raise Unavailable("/proc/cpuinfo lists no flags")


def find_instruction_set(
    sets: tuple[InstructionSet, ...], name: str | None = None
) -> InstructionSet:
    """The set of that name, or without one the best, if this CPU can run it."""
    try:
        flags = cpu_flags()
    except Unavailable:
        if all(isa.needs for isa in sets):
            raise
        flags = frozenset()
    for isa in sets:
        if isa.needs <= flags and name in (None, isa.name):
            return isa
    if name is not None:
        raise Unavailable(f"this CPU cannot run {name}")
    missing = ", ".join(sorted(sets[-1].needs - flags))
    raise Unavailable(f"this CPU lacks {missing}")


def load_library(library: NativeLibrary, isa: InstructionSet, cache: Path) -> ctypes.CDLL:
    """From the cache, or built.

    Without a writable cache it is built by each process, in a temporary folder that is gone once
    the library is loaded. Raises Unavailable.
    """
    with _library_file(library, isa, cache) as path:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            # A damaged file (a full disk, a lost write): build it anew.
            path.unlink(missing_ok=True)
    with _library_file(library, isa, cache) as path:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"the library does not load: {error}") from None


@contextmanager
def _library_file(library: NativeLibrary, isa: InstructionSet, cache: Path) -> Iterator[Path]:
    """The path of the built library, good until the context ends."""
    compiler, version = find_compiler()
    files = sorted((*library.sources.glob("*.cpp"), *library.sources.glob("*.h")))
    flags = library.compile_flags(isa)
    digest = hashlib.sha256(repr((version, flags, LINK_FLAGS)).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    path = cache / f"{library.name}-{isa.name}-{digest.hexdigest()[:16]}.so"
    if path.is_absolute() and path.is_file():
        yield path
        return
    units = [file for file in files if file.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(prefix="qtool-build-") as scratch:
        built = Path(scratch) / path.name
        # A line, not a bar: this may happen within another bar, and a terminal shows one at a time.
        console.print(f"compiling {library.title} for {isa.name}, once", highlight=False)
        _compile(compiler, flags, units, built)
        yield _keep(built, path)


def find_compiler() -> tuple[str, str]:
    """A compiler's path and what it answers to --version."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        answer = _run([path, "--version"])
        if answer.returncode == 0:
            return path, f"{name} {answer.stdout}"
    raise Unavailable(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH")


def _compile(compiler: str, flags: tuple[str, ...], units: list[Path], built: Path) -> None:
    """Every unit by a process of its own, then one link."""

    def compile_unit(unit: Path) -> str:
        target = built.with_name(f"{unit.stem}.o")
        _check(_run([compiler, *flags, "-c", str(unit), "-o", str(target)]))
        return str(target)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, units))
    _check(_run([compiler, *objects, *LINK_FLAGS, "-o", str(built)]))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiler could not be run: {error}") from None


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise Unavailable(f"{done.args[0]} failed: {(said or ['it did not say why'])[0].strip()}")


def _keep(built: Path, path: Path) -> Path:
    """Move the library into the cache; where that cannot be written, leave it where it is."""
    if not path.is_absolute():  # no home folder, or a cache named against the XDG rules
        return built
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        try:
            shutil.copyfile(built, name)
            os.chmod(name, 0o755)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError:
        return built
    return path
