"""llama.cpp itself on files written here. Runs where `llama-cpp-python` is installed.

pip install llama-cpp-python && pytest tests/convert/gguf/test_llama_cpp.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.checkpoint import Source
from qtool.convert.formats import open_weights
from qtool.convert.gguf.export import plan_export, write_gguf
from qtool.convert.gguf.types import FILE_TYPES

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


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K_M"])
def test_llama_cpp_generates_from_quantized_files(
    type: str, books_7m: Path, tmp_path: Path
) -> None:
    path = written(books_7m, tmp_path / "model.gguf", type)
    llama = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, n_threads=1)
    assert len(llama.create_completion(PROMPT, max_tokens=16)["choices"][0]["text"]) > 10


QUANTIZED_TYPES = [
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M"),
    *("Q6_K", "IQ4_NL", "IQ4_XS"),
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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_computes_the_logits_of_transformers(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family)
    ids = torch.randint(3, 4096, (64,), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    path = written(folder, tmp_path / "model.gguf", "F32")
    llama = llama_cpp.Llama(str(path), n_ctx=64, verbose=False, n_threads=1, logits_all=True)
    llama.eval(ids.tolist())
    found = torch.from_numpy(llama.scores[:64])
    # its key-value cache is half precision
    assert torch.allclose(found, expected, atol=3e-3)
