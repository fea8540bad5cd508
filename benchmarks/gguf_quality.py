"""How far GGUF files of one size are from their original: ours, and llama-quantize's.

    python benchmarks/gguf_quality.py --out gguf_quality.json

For each type four files are made from one model, all with the same tensor types and one importance
matrix, measured on text that is disjoint from the text they are scored on:

    plain            qtool without the matrix
    imatrix          qtool with it
    best             qtool --search best, with the calibration text that the matrix is from
    llama_quantize   llama.cpp's own quantizer, with the same matrix (where llama_cpp is installed)

and the mean KL divergence from the original over held-out tokens is taken, in float32. `ratio` is
best by llama_quantize (by imatrix where llama_cpp is missing; the two write the same bytes).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qtool.convert.formats import open_weights
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.imatrix import ImportanceMatrix
from qtool.convert.gguf.plan import ExportPlan, plan_export
from qtool.convert.gguf.types import FILE_TYPES
from qtool.convert.imatrix_command import measure
from qtool.convert.search import BestSearch
from qtool.recipe import Calibration
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.evaluate.run import evaluate
from qtool.source import Source, resolve

TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")


def write(plan: ExportPlan, path: Path) -> float:
    started = time.monotonic()
    write_gguf(plan, path, progress=lambda size: None)
    return time.monotonic() - started


def llama_quantize(half_way: Path, out: Path, type: str, matrix: ImportanceMatrix) -> float:
    """llama.cpp on our bfloat16 file, with the means of our matrix."""
    import llama_cpp

    vectors = {name: entry.mean.reshape(-1) for name, entry in matrix.entries.items()}
    given = (llama_cpp.llama_model_imatrix_data * (len(vectors) + 1))()
    for item, (name, vector) in zip(given, vectors.items(), strict=False):
        item.name, item.size = name.encode(), vector.numel()
        item.data = ctypes.cast(vector.data_ptr(), ctypes.POINTER(ctypes.c_float))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.imatrix = FILE_TYPES[type], 1, given
    started = time.monotonic()
    status = llama_cpp.llama_model_quantize(
        str(half_way).encode(), str(out).encode(), ctypes.byref(parameters)
    )
    assert status == 0, status
    return time.monotonic() - started


def same_data(one: Path, other: Path) -> bool:
    ours, theirs = GgufFile.open(one), GgufFile.open(other)
    return all(ours.data(name).equal(theirs.data(name)) for name in theirs.tensors)


def compare(source: Source, type: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    reader = open_weights(source)
    wanted = Calibration(options.calibration, options.num_samples, options.sequence_length)
    matrix = options.matrix
    paths = {name: folder / f"{type}-{name}.gguf" for name in ("plain", "imatrix", "best")}
    plan = plan_export(reader, type, importance=matrix)
    searched = dataclasses.replace(plan, prepared=BestSearch(plan, wanted))
    seconds = {
        "plain": write(plan_export(reader, type), paths["plain"]),
        "imatrix": write(plan, paths["imatrix"]),
        "best": write(searched, paths["best"]),
    }
    facts: dict[str, Any] = {"type": type, "bits_per_weight": plan.bits_per_weight}
    if importlib.util.find_spec("llama_cpp") is not None:
        paths["llama_quantize"] = folder / f"{type}-llama_quantize.gguf"
        theirs = paths["llama_quantize"]
        seconds["llama_quantize"] = llama_quantize(folder / "bf16.gguf", theirs, type, matrix)
        facts["imatrix_equals_llama_quantize"] = same_data(paths["imatrix"], theirs)
    report = evaluate(
        [str(path) for path in paths.values()],
        against=source,
        text=options.text,
        max_tokens=options.max_tokens,
        speed=False,
    )
    files: dict[str, Any] = {}
    for (name, path), model in zip(paths.items(), report.models, strict=True):
        assert model.divergence is not None
        kld = model.divergence.kld
        files[name] = {
            "kld": kld.value,
            "kld_error": kld.error,
            "bytes": path.stat().st_size,
            "seconds": round(seconds[name], 2),
        }
    other = files.get("llama_quantize", files["imatrix"])
    ratio = files["best"]["kld"] / other["kld"]
    text = {"name": report.text.name, "tokens": report.text.num_tokens_used}
    return {**facts, "text": text, "files": files, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="builtin:books-7m")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--calibration", help="text of the matrix and of the search")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--text", type=Path, help="held-out text; the one that ships otherwise")
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    source = resolve(options.model)
    wanted = Calibration(options.calibration, options.num_samples, options.sequence_length)
    options.matrix, _ = measure(source, wanted)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(plan_export(open_weights(source), "BF16"), folder / "bf16.gguf")
        for type in options.types:
            results.append(compare(source, type, options, folder))
            print(f"{type}: {results[-1]['ratio']:.3f}", file=sys.stderr)
    facts = {
        "model": source.name,
        "calibration": {
            "dataset": options.calibration or "builtin",
            "num_samples": options.matrix.chunk_count,
            "sequence_length": options.matrix.chunk_size,
        },
        "results": results,
    }
    if options.out is not None:
        write_result(options.out, facts, load_before=load_before)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
