"""llama.cpp itself on files written here. Runs where `llama-cpp-python` is installed.

pip install llama-cpp-python && pytest tests/interop
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from qtool.convert.formats import open_weights
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.imatrix import Importance, ImportanceMatrix
from qtool.convert.gguf.plan import plan_export
from qtool.convert.gguf.split import SplitLimits
from qtool.convert.gguf.types import FILE_TYPES
from qtool.source import Source

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PROMPT = "It was the best of times"


def written(model: Path, out: Path, type: str) -> Path:
    write_gguf(plan_export(open_weights(Source(model.name, model)), type), out)
    return out


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0"])
def test_llama_cpp_continues_a_text_as_transformers_does(
    type: str, books_7m: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(books_7m, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(books_7m)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    expected = tokenizer.decode(ids[inputs.input_ids.shape[1] :])

    path = written(books_7m, tmp_path / "model.gguf", type)
    llama = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, n_threads=1)
    assert llama.tokenize(PROMPT.encode(), add_bos=False) == inputs.input_ids[0].tolist()
    found = llama.create_completion(PROMPT, max_tokens=16, temperature=0)
    assert found["choices"][0]["text"] == expected


@pytest.mark.parametrize("metadata_first", [False, True])
def test_llama_cpp_loads_all_parts_from_the_first(
    metadata_first: bool, books_7m: Path, tmp_path: Path
) -> None:
    whole = written(books_7m, tmp_path / "whole.gguf", "Q8_0")
    reader = open_weights(Source("parts", books_7m))
    limits = SplitLimits(max_bytes=2_000_000, metadata_first=metadata_first)
    parts = write_gguf(plan_export(reader, "Q8_0", limits=limits), tmp_path / "model.gguf").paths
    assert len(parts) > 3
    texts = []
    for path in (whole, parts[0]):
        llama = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, n_threads=1)
        found = llama.create_completion(PROMPT, max_tokens=24, temperature=0)
        texts.append(found["choices"][0]["text"])
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K_M"])
def test_llama_cpp_generates_from_quantized_files(
    type: str, books_7m: Path, tmp_path: Path
) -> None:
    path = written(books_7m, tmp_path / "model.gguf", type)
    llama = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, n_threads=1)
    assert len(llama.create_completion(PROMPT, max_tokens=16)["choices"][0]["text"]) > 10


QUANTIZED_TYPES = [
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M"),
    *("Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE"),
]


@pytest.mark.parametrize("type", QUANTIZED_TYPES)
def test_llama_quantize_makes_the_same_file(type: str, books_7m: Path, tmp_path: Path) -> None:
    """Its second step on our bfloat16 file gives, byte for byte, our one step."""
    half_way = written(books_7m, tmp_path / "bf16.gguf", "BF16")
    ours = written(books_7m, tmp_path / "ours.gguf", type)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[type], 1
    theirs = tmp_path / "theirs.gguf"
    status = llama_cpp.llama_model_quantize(
        str(half_way).encode(), str(theirs).encode(), ctypes.byref(parameters)
    )
    assert status == 0
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("type", ["Q4_K_M", "Q3_K_M", "Q2_K", "Q2_K_S", "Q4_0", "Q5_1", "IQ4_XS"])
def test_llama_quantize_makes_the_same_file_with_an_importance_matrix(
    type: str, books_7m: Path, tmp_path: Path
) -> None:
    half_way = written(books_7m, tmp_path / "bf16.gguf", "BF16")
    generator = torch.Generator().manual_seed(0)
    entries = {
        name: Importance(
            torch.rand(1, tensor.shape[-1], generator=generator).pow(3), torch.tensor([7.0])
        )
        for name, tensor in GgufFile.open(half_way).tensors.items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    }
    matrix = ImportanceMatrix(entries, ("some text",), 3, 16, "some.imatrix")
    ours = tmp_path / "ours.gguf"
    reader = open_weights(Source(books_7m.name, books_7m))
    write_gguf(plan_export(reader, type, importance=matrix), ours)

    vectors = {name: entry.mean[0].contiguous() for name, entry in entries.items()}
    given = (llama_cpp.llama_model_imatrix_data * (len(vectors) + 1))()
    for item, (name, vector) in zip(given, vectors.items(), strict=False):
        item.name, item.size = name.encode(), vector.numel()
        item.data = ctypes.cast(vector.data_ptr(), ctypes.POINTER(ctypes.c_float))
    notes = {"file": b"some.imatrix", "dataset": b"some text", "entries_count": len(vectors)}
    overrides = (llama_cpp.llama_model_kv_override * (len(notes) + 2))()
    pairs = {**notes, "chunks_count": 3}.items()
    for override, (key, value) in zip(overrides, pairs, strict=False):
        override.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, bytes):
            override.tag, override.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value
        else:
            override.tag, override.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[type], 1
    parameters.imatrix, parameters.kv_overrides = given, overrides
    theirs = tmp_path / "theirs.gguf"
    status = llama_cpp.llama_model_quantize(
        str(half_way).encode(), str(theirs).encode(), ctypes.byref(parameters)
    )
    assert status == 0
    assert ours.read_bytes() == theirs.read_bytes()
