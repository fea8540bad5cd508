"""Every benchmark that this machine can run, one after another: `make bench`.

    python benchmarks/all.py                        hours on two cores
    python benchmarks/all.py --only claims evaluate
    python benchmarks/all.py --quick                few rounds, small models: an hour

Results go to benchmarks/results/NAME.json. A benchmark that fails says why and the others go on;
the exit status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))
from peers import VENVS, LlamaCpp, build_llama_cpp

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True, slots=True)
class Area:
    """script: in this folder; out: its option for the JSON file; quick: options for a short run;
    peer: options that name llama.cpp, where it takes part.
    """

    script: str
    out: str
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    peer: Callable[[LlamaCpp], tuple[str, ...]] | None = None


def _python_of(peer: LlamaCpp) -> tuple[str, ...]:
    return ("--llama-python", peer.python)


AREAS = {
    "claims": Area("claims.py", "--out", quick=("--rounds", "1")),
    "evaluate": Area(
        "evaluate.py",
        "--out",
        quick=("--windows", "8", "--speed-windows", "2", "--rounds", "1"),
        peer=lambda peer: (*_python_of(peer), "--llama-perplexity", str(peer.program)),
    ),
    "tasks": Area("tasks.py", "--out", quick=("--limit", "30")),
    "gguf_blocks": Area(
        "gguf_blocks.py",
        "--out",
        quick=("--types", "Q4_K"),
        peer=lambda peer: ("--ggml", str(peer.library / "libggml-base.so")),
    ),
    "kernels": Area("kernels_cpu.py", "--out", quick=("--seconds", "0.1")),
    "engine": Area("engine.py", "--out", quick=("--rounds", "1", "--loads", "1"), peer=_python_of),
    "engine_load": Area("engine_load.py", "--json", quick=("--rows", "overhead", "memory")),
    "sampling": Area("sampling.py", "--json", quick=("--repeats", "5")),
    "ranks": Area("ranks.py", "--out", quick=("--rounds", "3")),
    "serve": Area("serve.py", "--out", quick=("--rounds", "1", "--hold-seconds", "0")),
    "quantize": Area("quantize.py", "--out", quick=("--methods", "rtn", "default", "--bits", "4")),
    "gguf_quality": Area("gguf_quality.py", "--out", quick=("--num-samples", "16")),
    "plan": Area("plan.py", "--out", quick=("--num-requests", "30")),
    "convert": Area("convert.py", "--json", peer=_python_of),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=AREAS, default=list(AREAS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--venvs", type=Path, default=VENVS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    peer = None
    if any(AREAS[name].peer is not None for name in options.only):
        try:
            peer = build_llama_cpp(options.venvs)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"llama.cpp takes no part: {error}", file=sys.stderr)
    failed = []
    for name in options.only:
        area = AREAS[name]
        if name == "evaluate" and peer is None:
            failed.append(f"{name}: has nothing to compare with")
            continue
        words = [*area.options, *(area.quick if options.quick else ())]
        if area.peer is not None and peer is not None:
            words += area.peer(peer)
        out = options.results / f"{name}.json"
        command = [sys.executable, str(HERE / area.script), *words, area.out, str(out)]
        print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
        began = time.monotonic()
        status = subprocess.run(command, check=False).returncode
        print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
        if status:
            failed.append(f"{name}: ended with {status}")
    for line in failed:
        print(line, file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
