"""Compile the C++ kernels with the machine's own compiler, once, and keep the library.

The sources in `csrc/` speak a plain C interface and include no PyTorch header, so a build takes
seconds and the result does not depend on PyTorch's version. There is one library for each
instruction set; which one a machine runs is decided from the flags that Linux lists for its CPU,
never by `-march=native`, so that a cache shared by different machines stays right.

A library's name is the hash of all that went into it: sources, flags, and what the compiler says
of itself. It is written under a name of its own and renamed into place: processes that build at
the same time do the work twice and harm nobody.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qtool.progress import bar

SOURCES = Path(__file__).parent / "csrc"
# g++ first: its OpenMP runtime is the one PyTorch's Linux builds carry, and the two then share it.
COMPILERS = ("g++", "c++", "clang++")
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    # Sums are rounded where the source says so, in both instruction sets alike.
    "-ffp-contract=off",
    "-fno-math-errno",
    # Vector arguments are never passed between the two sets.
    "-Wno-psabi",
)
LINK_FLAGS = ("-shared", "-fopenmp")
TIMEOUT_SECONDS = 300


class Unavailable(Exception):
    """Why the compiled kernels cannot be had, in words for the table of kernels."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """needs: flags of /proc/cpuinfo; flags: the compiler's."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


# Best first.
INSTRUCTION_SETS = (
    InstructionSet(
        "avx512-vnni",
        frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c")),
        (
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
            *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
        ),
    ),
    InstructionSet("avx2", frozenset(("avx2", "fma", "f16c")), ("-mavx2", "-mfma", "-mf16c")),
)


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


def choose_instruction_set(flags: frozenset[str]) -> InstructionSet:
    """The best set that the flags allow."""
    for isa in INSTRUCTION_SETS:
        if isa.needs <= flags:
            return isa
    missing = ", ".join(sorted(INSTRUCTION_SETS[-1].needs - flags))
    raise Unavailable(f"needs AVX2, FMA and F16C, this CPU lacks {missing}")


def find_instruction_set(name: str, flags: frozenset[str]) -> InstructionSet:
    """The set of that name, if the flags allow it."""
    for isa in INSTRUCTION_SETS:
        if isa.name == name and isa.needs <= flags:
            return isa
    raise Unavailable(f"this CPU cannot run {name}")


def load_library(isa: InstructionSet, cache: Path, sources: Path = SOURCES) -> ctypes.CDLL:
    """The library of all .cpp files in `sources`, from the cache or built.

    Without a writable cache it is built by each process, in a temporary folder that is gone once
    the library is loaded. Raises Unavailable.
    """
    with _library(isa, cache, sources) as path:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            # A damaged file (a full disk, a lost write): build it anew.
            path.unlink(missing_ok=True)
    with _library(isa, cache, sources) as path:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"the library does not load: {error}") from None


@contextmanager
def _library(isa: InstructionSet, cache: Path, sources: Path) -> Iterator[Path]:
    """The path of the built library, good until the context ends."""
    compiler, version = _find_compiler()
    files = sorted((*sources.glob("*.cpp"), *sources.glob("*.h")))
    flags = (*COMPILE_FLAGS, *isa.flags)
    digest = hashlib.sha256(repr((version, flags, LINK_FLAGS)).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    path = cache / f"kernels-{isa.name}-{digest.hexdigest()[:16]}.so"
    if path.is_absolute() and path.is_file():
        yield path
        return
    units = [file for file in files if file.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(prefix="qtool-build-") as scratch:
        built = Path(scratch) / path.name
        with bar(f"compiling the CPU kernels for {isa.name}, once"):
            _compile(compiler, flags, units, built)
        yield _keep(built, path)


def _find_compiler() -> tuple[str, str]:
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
