"""Block quantization: compiled code, torch and llama.cpp's C, in one run.

    python benchmarks/gguf_blocks.py --out gguf_blocks.json
    python benchmarks/gguf_blocks.py --types Q4_K Q6_K --ggml .../llama_cpp/lib/libggml-base.so

Million weights a second for each type, without and with importance, on normal weights of the size
of a layer's slab. llama.cpp takes part where its library is at hand: from the package
llama-cpp-python, or by --ggml. All run on one thread in turn; time is that of the thread, the
smallest of many samples, so that other work on the machine counts little. Beside the speeds stands
the number of blocks in which two results differ: 0, or something is wrong. (llama.cpp built for ARM
or with -march=native rounds otherwise: there its own builds differ among themselves.)
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtool.convert.gguf.blocks import native
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, Codec, quantize_by_torch
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.native_build import Missing
from qtool.runtime.bench.conditions import write_result

Quantizer = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Result:
    """Million weights a second; None where it did not take part."""

    type: str
    importance: bool
    compiled: float
    torch: float | None
    llama_cpp: float | None
    compiled_decoding: float
    torch_decoding: float | None
    blocks_unlike_torch: int | None
    blocks_unlike_llama_cpp: int | None


def find_ggml() -> Path | None:
    """The library that llama-cpp-python carries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "lib").glob("libggml-base.so*"), None)


def ggml_quantizer(library: Path) -> Callable[[str], Quantizer]:
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64,) * 3,
        ctypes.c_void_p,
    ]

    def of_type(name: str) -> Quantizer:
        type = TENSOR_TYPES[name]

        def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
            height, columns = rows.shape
            data = torch.empty(
                height, columns // type.block_size * type.block_bytes, dtype=torch.uint8
            )
            weighting = None if importance is None else importance.data_ptr()
            chunk(type.id, rows.data_ptr(), data.data_ptr(), 0, height, columns, weighting)
            return data

        return quantize

    return of_type


def compiled_quantizer(name: str, isa: str | None) -> Quantizer:
    def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
        done = native.quantize(TENSOR_TYPES[name], rows, importance, isa)
        assert done is not None
        return done[0]

    return quantize


def speed(weights: int, seconds: float, work: Callable[[], object]) -> float:
    """Million weights a second: the best of the samples that fit in `seconds`, two at least."""
    work()
    samples: list[float] = []
    while sum(samples) < seconds or len(samples) < 2:
        began = time.thread_time()
        work()
        samples.append(time.thread_time() - began)
    return weights / min(samples) / 1e6


def unlike(type: str, found: Tensor, wanted: Tensor) -> int:
    size = TENSOR_TYPES[type].block_bytes
    return int((found.view(-1, size) != wanted.view(-1, size)).any(1).sum())


def measure(
    name: str,
    rows: Tensor,
    importance: Tensor | None,
    ggml: Callable[[str], Quantizer] | None,
    arguments: argparse.Namespace,
) -> Result:
    codec = BLOCK_CODECS[name]
    assert isinstance(codec, Codec)
    compiled = compiled_quantizer(name, arguments.isa)
    c = None if ggml is None else ggml(name)
    data = compiled(rows, importance)
    slow = None if arguments.no_torch else quantize_by_torch(name, rows, importance)[0]

    def rate(work: Callable[[], object]) -> float:
        return speed(rows.numel(), arguments.seconds, work)

    return Result(
        name,
        importance is not None,
        rate(lambda: compiled(rows, importance)),
        None if slow is None else rate(lambda: quantize_by_torch(name, rows, importance)),
        None if c is None else rate(lambda: c(rows, importance)),
        rate(lambda: native.dequantize(codec.type, data, arguments.isa)),
        None if slow is None else rate(lambda: codec.dequantize_by_torch(data)),
        None if slow is None else unlike(name, data, slow),
        None if c is None else unlike(name, data, c(rows, importance)),
    )


def show(result: Result) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{result.compiled / value:.1f}x"

    cells = [
        *(result.type, "importance" if result.importance else ""),
        *(number(result.torch), number(result.llama_cpp), number(result.compiled)),
        *(ratio(result.torch), ratio(result.llama_cpp)),
        *(number(result.torch_decoding), number(result.compiled_decoding)),
        f"{result.blocks_unlike_torch}/{result.blocks_unlike_llama_cpp}".replace("None", "-"),
    ]
    return line(cells)


def line(cells: list[str]) -> str:
    widths = (7, 11, 7, 10, 9, 9, 11, 9, 9, 7)
    return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Block quantization, compiled, torch and C.")
    parser.add_argument("--types", nargs="*", choices=native.TYPES, default=list(native.TYPES))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    isas = [isa.name for isa in native.QUANTIZERS.instruction_sets]
    parser.add_argument("--isa", choices=isas, default=None, help="the best by default")
    parser.add_argument("--ggml", type=Path, help="libggml-base.so, by default llama-cpp-python's")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(1)
    found = native.load(arguments.isa)
    if isinstance(found, Missing):
        raise SystemExit(f"compiled code {found.reason}")
    library = arguments.ggml or find_ggml()
    ggml = None if library is None else ggml_quantizer(library)
    generator = torch.Generator().manual_seed(0)
    rows = 0.02 * torch.randn(arguments.rows, arguments.columns, generator=generator)
    uniform = torch.rand(arguments.columns, generator=generator)
    heads = ["type", "", "torch", "llama.cpp", "compiled", "of torch", "of llama.cpp"]
    print(f"million weights a second, one thread, {found.isa}")
    print(line([*heads, "read", "read", "unlike"]))
    results = []
    with torch.inference_mode():
        for name, importance in itertools.product(arguments.types, (None, uniform)):
            result = measure(name, rows, importance, ggml, arguments)
            results.append(result)
            print(show(result), flush=True)
    if arguments.out is not None:
        report = {"isa": found.isa, "results": [asdict(result) for result in results]}
        write_result(arguments.out, report, load_before=load_before)


if __name__ == "__main__":
    main()
