"""Thousands of broken files for every reader: a model or a QtoolError, within bounds.

Each reader gets a small sound model first; a mutant differs from it by a few bytes, values, or
pieces (fuzz_readers.py). The quick test tries a few hundred files of three readers, the slow one
ten thousand of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from qtool.convert import codebook
from qtool.convert.formats import FORMATS
from qtool.convert.gguf.blocks.codecs import quantize
from qtool.convert.gguf.container import KeyValue
from qtool.convert.gguf.imatrix import (
    Importance,
    ImportanceMatrix,
    default_format,
    write_imatrix,
)
from qtool.convert.gguf.types import TENSOR_TYPES, ValueType
from qtool.convert.gguf.vocab import TokenKind, tokenizer_from_gguf
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
from qtool.scheme import QuantScheme, codebook_scheme
from qtool.weights import QuantizedWeight, TableWeight

RandomWeight = Callable[..., QuantizedWeight]
ForeignParts = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], dict[str, Any]]]
WORKER = Path(__file__).parent / "fuzz_readers.py"
# Every layout that a reader has is in its model, a linear each.
OF_COMPRESSED_TENSORS = ("int8-asym", "fp8-tensor", "fp8-block", "mxfp8", "mxfp4", "nvfp4")
OF_FP8 = ("fine-grained-fp8", "fine-grained-ue8m0")
OF_BITSANDBYTES = {"bitsandbytes-4": ("nf4", "nf4-nested"), "bitsandbytes-8": ("llm-int8",)}
BESIDE_MODELS = ("imatrix.dat", "imatrix.gguf", "tokenizer.json")
READERS = ("dense", "bin", "gguf", *FORMATS, "fp8", "codebook", *OF_BITSANDBYTES, *BESIDE_MODELS)
PACKED = "model.layers.0.packed"

Parts = dict[str, torch.Tensor]
Model = tuple[dict[str, Parts], dict[str, Any] | None]


@pytest.fixture
def sound_model(
    tmp_path: Path, random_weight: RandomWeight, foreign_parts: ForeignParts
) -> Callable[[str], Path]:
    """`sound_model("gptq")` -> a folder with a small model of that reader under "model"."""

    def make(reader: str) -> Path:
        root = tmp_path / reader
        model = root / "model"
        model.mkdir(parents=True)
        if reader == "gguf":
            write_gguf(model / "model.gguf")
            return root
        if reader in BESIDE_MODELS:
            write_beside(model / reader)
            return root
        linears, quantization = linears_of(reader, random_weight, foreign_parts)
        config: dict[str, Any] = {"model_type": "llama", "hidden_size": 64}
        if quantization is not None:
            config["quantization_config"] = quantization
        tensors = {"model.norm.weight": torch.ones(64), "lm_head.weight": torch.ones(8, 64).half()}
        for module, parts in linears.items():
            tensors |= {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        (model / "config.json").write_text(json.dumps(config, default=str))
        if reader == "bin":
            torch.save(tensors, model / "pytorch_model.bin")
        else:
            save_file(tensors, model / "model.safetensors")
        return root

    return make


def linears_of(reader: str, random_weight: RandomWeight, foreign_parts: ForeignParts) -> Model:
    """Packed linears by module, and the config's entry."""
    values = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    if reader == "compressed-tensors":
        return of_compressed_tensors(values, random_weight, foreign_parts)
    if reader in FORMATS:
        scheme = QuantScheme(4, 32, symmetric=reader != "awq")
        layout = FORMATS[reader]
        packed = layout.pack(random_weight(scheme, 64, 128), torch.float16)
        return {PACKED: packed}, layout.quantization_config({PACKED: scheme}, [])
    if reader == "codebook":
        scheme, codes = codebook_scheme(3), values.abs().mul(100).to(torch.uint8) % 8
        tables = TableWeight(codes, values[:, :8].half(), scheme)
        packed = codebook.pack_layer(tables, torch.float16)
        return {PACKED: packed}, codebook.quantization_config({PACKED: scheme}, [])
    kinds = OF_FP8 if reader == "fp8" else OF_BITSANDBYTES.get(reader, ())
    if not kinds:
        return {"model.layers.0.up": {"weight": values[:16].bfloat16()}}, None
    made = {kind: foreign_parts(kind, values) for kind in kinds}
    return {f"model.{kind}": parts for kind, (parts, _) in made.items()}, made[kinds[0]][1]


def of_compressed_tensors(
    values: torch.Tensor, random_weight: RandomWeight, foreign_parts: ForeignParts
) -> Model:
    """A group of the config for each layout."""
    scheme, layout = QuantScheme(4, 32), FORMATS["compressed-tensors"]
    linears = {PACKED: layout.pack(random_weight(scheme, 64, 128), torch.float16)}
    config = layout.quantization_config({PACKED: scheme}, [])
    groups = {"packed": config["config_groups"]["group_0"] | {"format": "pack-quantized"}}
    groups["packed"]["targets"] = [PACKED]
    for kind in OF_COMPRESSED_TENSORS:
        parts, theirs = foreign_parts(kind, values)
        linears[f"model.{kind}"] = parts
        groups[kind] = theirs["config_groups"]["group_0"] | {
            "format": theirs["format"],
            "targets": [f"re:model\\.{kind}$"],
        }
    return linears, config | {"format": "mixed-precision", "config_groups": groups}


def write_beside(path: Path) -> None:
    """An importance matrix, or a tokenizer with its settings."""
    if path.name == "tokenizer.json":
        tokenizer_from_gguf({entry.key: entry.value for entry in tokenizer()}).tokenizer.save(
            str(path)
        )
        settings = {"eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}"}
        (path.parent / "tokenizer_config.json").write_text(json.dumps(settings))
        return
    entries = {
        f"blk.{i}.ffn_up.weight": Importance(torch.rand(count, 32), torch.full((count,), 7.0))
        for i, count in enumerate((1, 4))
    }
    matrix = ImportanceMatrix(entries, ("some text",), 3, 16, None)
    write_imatrix(matrix, path, default_format(path))


def tokenizer() -> list[KeyValue]:
    """Byte-level BPE with a few merges, and an end."""
    text, array = ValueType.STRING, ValueType.ARRAY
    letters = sorted(ByteLevel.alphabet())
    merges = ["t h", "th e", "i n", "a n", "an d"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>"]
    kinds = [TokenKind.NORMAL] * (len(tokens) - 1) + [TokenKind.CONTROL]
    return [
        KeyValue("tokenizer.ggml.model", "gpt2", text),
        KeyValue("tokenizer.ggml.pre", "gpt-2", text),
        KeyValue("tokenizer.ggml.tokens", tokens, array, text),
        KeyValue("tokenizer.ggml.token_type", [int(k) for k in kinds], array, ValueType.INT32),
        KeyValue("tokenizer.ggml.merges", merges, array, text),
        KeyValue("tokenizer.ggml.eos_token_id", len(tokens) - 1, ValueType.UINT32),
    ]


def write_gguf(path: Path) -> None:
    """A llama of one block with a tensor in each of several types, and a tokenizer."""
    u32, f32, text = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING
    entries = [
        KeyValue("general.architecture", "llama", text),
        KeyValue("llama.block_count", 1, u32),
        KeyValue("llama.context_length", 64, u32),
        KeyValue("llama.embedding_length", 64, u32),
        KeyValue("llama.feed_forward_length", 256, u32),
        KeyValue("llama.attention.head_count", 2, u32),
        KeyValue("llama.attention.layer_norm_rms_epsilon", 1e-5, f32),
        *tokenizer(),
    ]
    shapes = {
        "token_embd.weight": ((262, 64), "Q8_0"),
        "blk.0.attn_norm.weight": ((64,), "F32"),
        "blk.0.attn_q.weight": ((64, 64), "Q4_0"),
        "blk.0.attn_k.weight": ((64, 64), "Q4_1"),
        "blk.0.attn_v.weight": ((64, 64), "Q5_0"),
        "blk.0.attn_output.weight": ((64, 64), "F16"),
        "blk.0.ffn_norm.weight": ((64,), "F32"),
        "blk.0.ffn_gate.weight": ((256, 64), "IQ4_NL"),
        "blk.0.ffn_up.weight": ((256, 64), "BF16"),
        "blk.0.ffn_down.weight": ((64, 256), "Q6_K"),
        "output_norm.weight": ((64,), "F32"),
    }
    infos = [TensorInfo(n, shape, TENSOR_TYPES[type_]) for n, (shape, type_) in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    with GgufWriter(path, GgufLayout.of(entries, infos)) as writer:
        for info in infos:
            values = torch.randn(info.rows, info.shape[-1], generator=generator)
            writer.write(info, quantize(info.type.name, values))


def fuzz(root: Path, count: int, seed: int = 1) -> dict[str, int]:
    command = [sys.executable, str(WORKER), str(root), str(count), str(seed)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(counts, dict)
    assert sum(counts.values()) == count
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_ten_thousand_broken_files_of_a_reader_do_no_harm(
    reader: str, sound_model: Callable[[str], Path]
) -> None:
    counts = fuzz(sound_model(reader), 10_000)
    assert counts["refused"] > 2000  # most mutants are broken; harmless ones are read
    assert counts["read"] > 100


@pytest.mark.parametrize("reader", ["bin", "gguf", "compressed-tensors"])
def test_a_few_broken_files_of_a_reader_do_no_harm(
    reader: str, sound_model: Callable[[str], Path]
) -> None:
    counts = fuzz(sound_model(reader), 200, seed=2)
    assert counts["refused"] > 50
