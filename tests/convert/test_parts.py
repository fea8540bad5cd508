"""A part of a packed linear is read as the whole is, and without the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint import Checkpoint
from qtool.convert.formats import WeightReader, open_weights
from qtool.convert.partial import PartialReader, read_part
from qtool.convert.run import convert_model
from qtool.source import resolve
from qtool.weight_parts import Part

DOWN = "model.layers.0.mlp.down_proj"  # [256, 512]
PARTS = (
    Part(rows=(range(64, 192),)),
    Part(columns=range(256, 512)),
    Part(rows=(range(32, 64), range(128, 256))),
    Part(columns=range(64, 192)),  # cuts groups of 128
    Part(rows=(range(8, 40),), columns=range(128, 256)),
)


def opened(folder: Path) -> WeightReader:
    return open_weights(resolve(str(folder)))


def same(reader: WeightReader, module: str = DOWN) -> None:
    whole = reader.weight(module).dequantize()
    for part in PARTS:
        found = read_part(reader, module, part).dequantize()
        rows = part.rows or (range(whole.shape[0]),)
        columns = part.columns or range(whole.shape[1])
        expected = torch.cat([whole[run.start : run.stop] for run in rows])
        assert torch.equal(found, expected[:, columns.start : columns.stop]), part


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        ("compressed-tensors", "int4-g128-sym"),
        ("compressed-tensors", "int4-g32-asym"),
        ("compressed-tensors", "int3-g64-asym"),
        ("compressed-tensors", "int8-row-sym"),
        ("gptq", "int4-g128-sym"),
        ("gptq", "int3-g32-sym"),
        ("awq", "int4-g64-asym"),
        ("marlin", "int4-g128-sym"),
    ],
)
def test_parts_of_packed_folders(format_name: str, scheme: str, packed_checkpoint: Any) -> None:
    same(opened(packed_checkpoint(format_name, scheme)))


@pytest.mark.parametrize(
    "kind", ["int8", "int8-asym", "int4-in-bytes", "fp8-tensor", "fp8-block", "mxfp4", "nvfp4"]
)
def test_parts_of_what_others_write(kind: str, foreign_checkpoint: Any) -> None:
    same(opened(foreign_checkpoint(kind)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_plain_folders(dtype: str, tiny_checkpoint: Any) -> None:
    same(opened(tiny_checkpoint("llama", dtype=dtype)))


@pytest.mark.parametrize("type", ["F16", "Q4_0", "Q8_0"])
def test_parts_of_gguf_files(type: str, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """q's rows are in another order in the file."""
    plain = tiny_checkpoint("llama", num_hidden_layers=1)
    model = convert_model(str(plain), to="gguf", type=type, out=tmp_path / "model.gguf")
    reader = opened(model)
    same(reader)
    whole = reader.weight("model.layers.0.self_attn.q_proj").dequantize()
    part = Part(rows=(range(64, 192),), columns=range(64, 128))
    found = read_part(reader, "model.layers.0.self_attn.q_proj", part).dequantize()
    assert torch.equal(found, whole[64:192, 64:128])


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [("compressed-tensors", "int4-g128-sym"), ("gptq", "int4-g128-sym"), ("awq", "int4-g64-asym")],
)
def test_the_rest_is_not_read(
    format_name: str, scheme: str, packed_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = opened(packed_checkpoint(format_name, scheme))
    assert isinstance(reader, PartialReader)
    read: list[int] = []
    part, tensor = Checkpoint.part, Checkpoint.tensor

    def count(found: torch.Tensor) -> torch.Tensor:
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(Checkpoint, "part", lambda *a: count(part(*a)))
    monkeypatch.setattr(Checkpoint, "tensor", lambda *a: count(tensor(*a)))
    reader.weight(DOWN)
    whole = sum(read)
    read.clear()
    reader.part(DOWN, Part(columns=range(256)))
    # A GPTQ file's group of each input, 2 kB, is looked at twice.
    assert sum(read) < 0.55 * whole
