"""What the machine can do, and what of it a model used.

    MBU = bytes that had to be read for a step / seconds of the step / the memory's bandwidth
    MFU = 2 * weights of the linears * tokens / seconds / the arithmetic the machine has

The bytes of a decoding step are the weights as they lie packed in memory, once for the whole batch,
and each sequence's keys and values. Both roofs are measured here, on the threads that the model
uses: a figure from a data sheet would hide what a virtual machine was given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Larger than the last-level cache of any CPU, or the cache is measured.
BUFFER_BYTES = 512 << 20
MATRIX_SIZE = 1024
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Roofs:
    """bytes_per_second read from memory; operations_per_second of a product in `dtype`."""

    bytes_per_second: float
    operations_per_second: float
    dtype: str
    threads: int


def measure_roofs(dtype: torch.dtype, device: torch.device) -> Roofs:
    """The best of a few tries: what else runs on the machine can only slow it."""
    buffer = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    reading = _best(lambda: buffer.sum(), device)
    matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=device)
    product = _best(lambda: matrix @ matrix, device)
    return Roofs(
        BUFFER_BYTES / reading,
        2 * MATRIX_SIZE**3 / product,
        str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
    )


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of REPEATS runs, after one to warm up."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def bandwidth_use(
    *,
    weight_bytes: int,
    cache_bytes_per_token: float,
    batch: int,
    context: float,
    step_seconds: float,
    roofs: Roofs,
) -> float:
    """MBU of a decoding step, 0 to 1.  context: tokens that a sequence attends to."""
    needed = weight_bytes + batch * context * cache_bytes_per_token
    return needed / step_seconds / roofs.bytes_per_second


def arithmetic_use(*, num_weights: int, tokens: int, seconds: float, roofs: Roofs) -> float:
    """MFU, 0 to 1.  num_weights: of the linears, the head's among them."""
    return 2 * num_weights * tokens / seconds / roofs.operations_per_second
