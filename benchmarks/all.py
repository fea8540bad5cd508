"""Every benchmark that this machine can run, one after another: `make bench`.

    python benchmarks/all.py                        hours on two cores
    python benchmarks/all.py --only claims evaluate
    python benchmarks/all.py --quick                few rounds, small models, fewer peers

Results go to benchmarks/results/NAME.json, those of --quick, which are no figures to tell anybody,
to build/benchmarks. What a benchmark prints is also kept there, in NAME.log. peers.py makes the
peers that are asked for, once. A benchmark that fails says why and the others go on; a table at the
end tells what ran, and the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))
from peers import VENVS, LlamaCpp, Peers

HERE = Path(__file__).parent
RESULTS, QUICK_RESULTS = HERE / "results", Path("build") / "benchmarks"
MODELS = Path("benchmark-models")

# What a benchmark is given for a peer.
GiveOptions = Callable[[Peers], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Area:
    """One script of this folder.

    out      its option for the JSON file
    options  always; quick: for a short run
    peers    options that name a peer, each by itself: without it the benchmark runs with the rest
    needs    without this one there is nothing to measure
    models   whether it keeps models (--models); venvs: whether it makes environments (--venvs)
    python   the interpreter that it runs in, where that is a peer's
    """

    script: str
    out: str = "--out"
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    peers: tuple[GiveOptions, ...] = ()
    needs: GiveOptions | None = None
    models: bool = False
    venvs: bool = False
    python: Callable[[Peers], str] | None = None


def _perplexity(peers: Peers) -> Sequence[str]:
    peer = peers.llama_cpp
    return "--llama-python", peer.python, "--llama-perplexity", str(peer.program)


def _ggml(peers: Peers) -> Sequence[str]:
    return "--ggml", str(peers.llama_cpp.library / "libggml-base.so")


def _converter(peers: Peers) -> Sequence[str]:
    peer: LlamaCpp = peers.llama_cpp
    vocabulary = peer.source / "models" / "ggml-vocab-qwen2.gguf"
    tokenizer = ("--tokenizer", str(vocabulary)) if vocabulary.is_file() else ()
    return "--llama-python", peers.converter, "--llama-cpp", str(peer.source), *tokenizer


def _llama_python(peers: Peers) -> Sequence[str]:
    return "--llama-python", peers.llama_cpp.python


def _vllm(peers: Peers) -> Sequence[str]:
    return "--vllm-python", peers.vllm


AREAS = {
    "claims": Area("claims.py", quick=("--rounds", "1")),
    "evaluate": Area(
        "evaluate.py",
        quick=("--windows", "8", "--speed-windows", "2", "--rounds", "1", "--threads", "1"),
        needs=_perplexity,
    ),
    "tasks": Area("tasks.py", quick=("--limit", "30"), python=lambda peers: peers.lm_eval),
    "gguf_blocks": Area("gguf_blocks.py", quick=("--types", "Q4_K"), peers=(_ggml,)),
    "kernels": Area("kernels_cpu.py", quick=("--seconds", "0.05", "--shapes", "square")),
    "engine": Area(
        "engine.py",
        options=("--peers", "llama_cpp", "transformers", "vllm"),
        quick=("--peers", "llama_cpp", "--rounds", "1", "--loads", "1"),
        peers=(_llama_python, _vllm),
        models=True,
    ),
    "engine_load": Area("engine_load.py", "--json", quick=("--rows", "overhead", "memory")),
    "sampling": Area("sampling.py", "--json", quick=("--repeats", "5")),
    "ranks": Area("ranks.py", quick=("--rounds", "3")),
    "serve": Area("serve.py", quick=("--rounds", "1", "--hold-seconds", "0")),
    "quantize": Area(
        "quantize.py", quick=("--methods", "rtn", "default", "--bits", "4"), venvs=True
    ),
    "quantize_loads": Area("quantize_loads.py", venvs=True),
    "methods": Area("methods.py", quick=("--only", "rtn-int4", "nf4")),
    "gguf_quality": Area(
        "gguf_quality.py",
        quick=("--types", "Q4_K_M", "--num-samples", "8"),
        python=lambda peers: peers.converter,
    ),
    "plan": Area("plan.py", quick=("--num-requests", "20"), models=True),
    "convert": Area("convert.py", "--json", peers=(_converter,)),
}


class Outcome(NamedTuple):
    """seconds: 0 where it was not started; note: why, or what was missing."""

    name: str
    status: Literal["ran", "failed", "skipped"]
    seconds: float
    note: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=AREAS, default=list(AREAS))
    parser.add_argument("--skip", nargs="+", choices=AREAS, default=[])
    parser.add_argument("--quick", action="store_true", help="few rounds, and fewer peers")
    parser.add_argument("--venvs", type=Path, default=VENVS, help="environments of peers; kept")
    parser.add_argument("--models", type=Path, default=MODELS, help="made once; kept")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}; quick: {QUICK_RESULTS}")
    options = parser.parse_args()
    results = options.results or (QUICK_RESULTS if options.quick else RESULTS)
    QUICK_RESULTS.mkdir(parents=True, exist_ok=True)
    names = [name for name in options.only if name not in options.skip]
    print(f"to run: {', '.join(names)}\nresults: {results}\nlogs: {QUICK_RESULTS}", flush=True)
    peers = Peers(options.venvs)
    outcomes = []
    for name in names:
        outcomes.append(run_area(name, AREAS[name], peers, results / f"{name}.json", options))
        print(show(outcomes[-1:]), flush=True)
    left = [f"{name:13} not asked for" for name in AREAS if name not in names]
    print("\n" + "\n".join([show(outcomes), *left]))
    return any(outcome.status == "failed" for outcome in outcomes)


def run_area(
    name: str, area: Area, peers: Peers, out: Path, options: argparse.Namespace
) -> Outcome:
    words, missing = [*area.options, *(area.quick if options.quick else ())], []
    if area.models:
        words += ["--models", str(options.models)]
    if area.venvs:
        words += ["--venvs", str(options.venvs)]
    try:
        python = sys.executable if area.python is None else area.python(peers)
        if area.needs is not None:
            words += area.needs(peers)
    except (OSError, subprocess.CalledProcessError) as error:
        return Outcome(name, "skipped", 0.0, f"its peer cannot be made: {error}")
    for give in area.peers:
        if options.quick and give is _vllm:
            continue
        try:
            words += give(peers)
        except (OSError, subprocess.CalledProcessError) as error:
            missing.append(f"without a peer, which cannot be made: {error}")
    command = [python, str(HERE / area.script), *words, area.out, str(out)]
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    status, last = run_and_keep(command, QUICK_RESULTS / f"{name}.log")
    seconds = time.monotonic() - began
    if status:
        return Outcome(name, "failed", seconds, f"ended with {status}: {last}")
    return Outcome(name, "ran", seconds, "; ".join(missing))


def run_and_keep(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Its output goes to ours and to the log as it comes. The status, and the last line."""
    with log.open("wb") as kept:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            kept.write(piece)
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return process.wait(), lines[-1] if lines else "it said nothing"


def show(outcomes: Iterable[Outcome]) -> str:
    return "\n".join(
        f"{name:13} {status:8} {seconds:6.0f} s  {note[:160]}".strip()
        for name, status, seconds, note in outcomes
    )


if __name__ == "__main__":
    raise SystemExit(main())
