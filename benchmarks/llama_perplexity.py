"""llama-perplexity as a process: what it took, and the numbers that it printed.

It writes through a thread of its own and ends without waiting for it (common/log.cpp: "this design
may cause logs to be lost"), so on a busy machine the last lines can be missing though the exit
status is 0; and it is 0, too, where it stops for an error. So what is wanted is looked for, the run
is repeated where it is missing, and in the end its own words are shown. The program that peers.py
compiles does wait.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qtool.settings import child_environment

WINDOW = 512
ATTEMPTS = 3
# The last of the block that --kl-divergence prints, and of a run without it. A colon comes after
# them: the first is a column's head, too.
LAST_OF_BLOCK, LAST_OF_RUN = "Same top p", "Final estimate"
NUMBER = r"(-?[\d.]+|-?nan|inf)"
# What its errors look like: "0.01.124.007 E kl_divergence: failed reading log-probs for chunk 1".
ERROR = re.compile(r"^[\d.]+ E .*$", re.MULTILINE)


class Cost(NamedTuple):
    cpu_seconds: float
    wall_seconds: float
    text: str


class Printed(NamedTuple):
    """A line's numbers, and how many digits are printed behind the point of the first."""

    numbers: list[float]
    digits: int


class Peer(NamedTuple):
    """The program, an interpreter that has llama_cpp, and the folder of its libraries."""

    program: Path
    python: str
    library: Path

    def perplexity(
        self,
        model: Path,
        text: Path,
        windows: int,
        threads: int,
        *more: str,
        last: str = LAST_OF_RUN,
    ) -> Cost:
        """Of a run that has printed what stands behind `last` and a colon."""
        command = [
            *(str(self.program), "-m", str(model), "-f", str(text), "-c", str(WINDOW)),
            *("-b", str(WINDOW), "--chunks", str(windows), "-t", str(threads), *more),
        ]
        wanted = re.compile(rf"{re.escape(last)} *:")
        for _ in range(ATTEMPTS):
            cost = run(command, threads, self.library)
            if wanted.search(cost.text):
                return cost
        said = ERROR.findall(cost.text) or [cost.text[-2000:]]
        raise SystemExit(
            f"{' '.join(command)}\nended well {ATTEMPTS} times and never printed {last!r}; "
            "it said:\n" + "\n".join(said)
        )

    def divergence(
        self, model: Path, text: Path, windows: int, threads: int, base: Path, *more: str
    ) -> dict[str, Printed]:
        """Each line of the block, against the predictions in `base`."""
        words = ("--kl-divergence", "--kl-divergence-base", str(base), *more)
        cost = self.perplexity(model, text, windows, threads, *words, last=LAST_OF_BLOCK)
        return printed_block(cost.text)


def run(command: Sequence[str], threads: int, library: Path | None = None) -> Cost:
    """A process and what it took; what it printed, both streams."""
    environment = child_environment(OMP_NUM_THREADS=str(threads), PYTHONSAFEPATH="1")
    if library is not None:
        environment["LD_LIBRARY_PATH"] = str(library)
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode("utf-8", errors="replace")
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{text[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, text)


def printed_block(text: str) -> dict[str, Printed]:
    found = {}
    for line in text.splitlines():
        match = re.search(rf"(?:^| I )([^:]+?) *: *{NUMBER}(?: *± *{NUMBER})?", line)
        if match is None:
            continue
        numbers = [float(part) for part in match.groups()[1:] if part is not None]
        found[match[1].strip()] = Printed(numbers, len(match[2].partition(".")[2]))
    return found
