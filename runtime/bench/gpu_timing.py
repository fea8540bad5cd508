"""How long work takes on a GPU, without the time that launching it takes.

The work is recorded as a CUDA graph, many times over, and the recording is timed by the GPU's own
clock: single launches from Python take longer than small kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

# Work is recorded so often that a recording takes about this long, and timed so many times.
RECORDING_SECONDS = 2e-3
REPEATS = 7
MOST_RECORDED = 200


def seconds_of(work: Callable[[int], object]) -> float:
    """Seconds of work(i), i counting up so that it can use other weights each time: the median of
    a few recordings.
    """
    for index in range(3):
        work(index)
    torch.cuda.synchronize()
    once = _timed(lambda: work(0))
    count = max(2, min(MOST_RECORDED, int(RECORDING_SECONDS / max(once, 1e-6))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            work(index)
    graph.replay()
    return median(_timed(graph.replay) for _ in range(REPEATS)) / count


def _timed(work: Callable[[], object]) -> float:
    start, stop = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def copy_bandwidth(device: torch.device, num_bytes: int = 2 << 30) -> float:
    """Bytes a second, read and written, of a copy within the GPU's memory."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda index: target.copy_(source))
