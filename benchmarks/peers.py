"""llama.cpp for the benchmarks, in a virtual environment of its own, built for this machine.

    python benchmarks/peers.py                      builds and prints the options that name it

pip compiles llama-cpp-python from its sources (CMAKE_ARGS, by default GGML_NATIVE=ON); the program
llama-perplexity, which wheels leave out, is compiled from the same sources against the wheel's
libraries. Both are made once. Where the processor has instructions that the system refuses, or
llama.cpp's code for them stops (its AMX code does on some virtual machines), name others:
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON".
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

VENVS = Path(".benchmark-venvs")
LIBRARIES = ("llama-common", "llama", "ggml", "ggml-base", "ggml-cpu")


class LlamaCpp(NamedTuple):
    """The interpreter that has llama_cpp, the folder of its libraries, llama-perplexity."""

    python: str
    library: Path
    program: Path


def build_llama_cpp(venvs: Path = VENVS) -> LlamaCpp:
    folder = venvs.absolute() / "llama-cpp"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if _version(str(python)) is None:
        flags = os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON")
        wanted = ("--no-binary", "llama-cpp-python", "llama-cpp-python")
        environment = {**os.environ, "CMAKE_ARGS": flags}
        command = [str(python), "-m", "pip", "install", *wanted]
        subprocess.run(command, check=True, env=environment)
    library = find_library(str(python))
    return LlamaCpp(str(python), library, _perplexity(folder, library))


def find_library(python: str) -> Path:
    code = "import llama_cpp; print(llama_cpp.__file__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} has no llama_cpp: name another with --llama-python")
    return Path(done.stdout.strip()).parent.parent / "lib"


def _version(python: str) -> str | None:
    code = "import llama_cpp; print(llama_cpp.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _perplexity(folder: Path, library: Path) -> Path:
    program = folder / "llama-perplexity"
    if program.exists():
        return program
    python = str(folder / "bin" / "python")
    wanted = ("--no-deps", "--no-binary", "llama-cpp-python")
    package = f"llama-cpp-python=={_version(python)}"
    download = [python, "-m", "pip", "download", "-d", str(folder), *wanted, package]
    subprocess.run(download, check=True)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    files = [str(source / "tools" / "perplexity" / name) for name in ("perplexity.cpp", "main.cpp")]
    headers = [f"-I{source / name}" for name in ("common", "include", "ggml/include", "vendor")]
    links = [f"-L{library}", *(f"-l{name}" for name in LIBRARIES), f"-Wl,-rpath,{library}"]
    command = ["g++", "-O3", "-std=c++17", *headers, *files, *links, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--venvs", type=Path, default=VENVS)
    built = build_llama_cpp(parser.parse_args().venvs)
    print(f"--llama-python {built.python} --llama-perplexity {built.program}")


if __name__ == "__main__":
    main()
