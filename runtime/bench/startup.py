"""`bench startup`: how long until a fresh process has its first token.

Each run is a new Python process, so that imports, compilation, reading and packing are all in it;
the file itself may lie in the page cache from the run before, which the first run shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from qtool.errors import QtoolError

# Prints one line of JSON. Times are of time.monotonic, one clock for all processes of a machine.
PROGRAM = """
import json, sys, time
begin = time.monotonic()
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.llm import LLM
imported = time.monotonic()
llm = LLM(sys.argv[1], dtype=sys.argv[2])
loaded = time.monotonic()
llm.generate(["It was"], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
print(json.dumps([begin, imported, loaded, time.monotonic()]))
"""


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds, each from the one before, and the whole from the start of the process."""

    python: float
    imports: float
    loading: float
    first_token: float
    total: float


def startups(model: str, dtype: str, num_runs: int) -> Iterator[Startup]:
    for _ in range(num_runs):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, model, dtype], capture_output=True, text=True
        )
        if done.returncode:
            raise QtoolError(
                f"a process with {model} failed: {done.stderr.strip().splitlines()[-1:]}",
                f"see what `qtool chat {model}` says",
            )
        begin, imported, loaded, end = json.loads(done.stdout.splitlines()[-1])
        yield Startup(begin - start, imported - begin, loaded - imported, end - loaded, end - start)
