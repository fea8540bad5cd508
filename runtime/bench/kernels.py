"""`bench kernels`: the linears of a model, each by the kernel that would run it.

One row for each distinct shape and storage of the model's linears and each number of tokens: how
long a product takes, the bytes of weights it reads a second and the operations it does. Products
are repeated for a while and the median is taken; weights are used in turn where a layer has many,
so that a small one is not measured out of the cache it would not be in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from qtool.convert.formats import open_weights
from qtool.kernels.dispatch import describe
from qtool.progress import bar
from qtool.runtime.config import Device, Dtype
from qtool.runtime.layers import Linear, pack
from qtool.runtime.loading import choose_device, choose_dtype
from qtool.source import Source
from qtool.weights import Weight

SECONDS = 0.3
WARM_UPS = 2
# Copies of one matrix that are used in turn take this much together, more than a CPU's cache.
COLD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One matrix [out, in] as `stored`, multiplied with `tokens` rows."""

    modules: int
    out_features: int
    in_features: int
    stored: str
    kernel: str
    tokens: int
    microseconds: float
    gigabytes_per_second: float
    giga_operations_per_second: float


def measure(
    source: Source, *, dtype: Dtype, device: Device, tokens: Sequence[int]
) -> Iterator[KernelRow]:
    reader = open_weights(source)
    where = choose_device(device)
    chosen, _ = choose_dtype(dtype, str(reader.config.get("dtype", "bfloat16")), where)
    kinds: dict[tuple[tuple[int, ...], str], list[str]] = {}
    modules = [*reader.modules(), *_dense_modules(reader.tensor_names())]
    for module in modules:
        weight = reader.weight(module)
        if len(weight.shape) == 2:
            kinds.setdefault((tuple(weight.shape), describe(weight)), []).append(module)
    with bar("kernels", total=len(kinds) * len(tokens)) as shown:
        for (shape, stored), names in kinds.items():
            weight = reader.weight(names[0])
            linears = _copies(weight, chosen, where)
            for count in tokens:
                seconds = _time(linears, count, shape[1], chosen, where)
                shown.advance()
                yield KernelRow(
                    modules=len(names),
                    out_features=shape[0],
                    in_features=shape[1],
                    stored=stored,
                    kernel=linears[0].kernel.name,
                    tokens=count,
                    microseconds=1e6 * seconds,
                    gigabytes_per_second=linears[0].nbytes / seconds / 1e9,
                    giga_operations_per_second=2 * count * shape[0] * shape[1] / seconds / 1e9,
                )


def _dense_modules(names: Sequence[str]) -> list[str]:
    """Linears that are held in 16 or 32 bits; norms and embeddings are none."""
    return [
        name.removesuffix(".weight")
        for name in names
        if name.endswith("_proj.weight") or name == "lm_head.weight"
    ]


def _copies(weight: Weight, dtype: torch.dtype, device: torch.device) -> list[Linear]:
    def one() -> Linear:
        layer = pack([weight], [None], dtype, device).layer
        assert isinstance(layer, Linear)
        return layer

    first = one()
    return [first, *(one() for _ in range(min(15, COLD_BYTES // max(1, first.nbytes))))]


def _time(
    linears: Sequence[Linear],
    tokens: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Seconds of one product, the median."""
    x: Tensor = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    seconds: list[float] = []
    with torch.inference_mode():
        while len(seconds) < WARM_UPS + 3 or sum(seconds) < SECONDS:
            linear = linears[len(seconds) % len(linears)]
            start = time.perf_counter()
            linear(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return median(seconds[WARM_UPS:])
