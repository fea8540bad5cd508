"""Every cell of `qtool convert --list` tells the truth: a model is converted along each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.cli import main
from qtool.convert import matrix
from qtool.convert.fidelity import TARGETS
from qtool.convert.formats import WeightReader, open_weights
from qtool.convert.matrix import SOURCE_KINDS, Cell, SourceKind, cell
from qtool.convert.run import convert_model
from qtool.errors import QtoolError
from qtool.quantize.pipeline import quantize_model
from qtool.recipe import Rtn, load_recipe
from qtool.source import resolve

Make = Callable[..., Path]
SMALL = {"num_hidden_layers": 1, "intermediate_size": 256, "tie_word_embeddings": True}
CELLS = [(source, target) for source in SOURCE_KINDS for target in TARGETS]
# Some cells of each level and of each source; all the others are slow.
QUICK = {
    ("compressed-tensors", "int4", "hf"),
    ("compressed-tensors", "int8, W8A8", "gguf"),
    ("compressed-tensors", "FP8, MXFP8", "marlin"),
    ("compressed-tensors", "NVFP4", "gptq"),
    ("compressed-tensors", "MXFP4", "gguf"),
    ("gptq", "act-order", "awq"),
    ("gptq", "int4 asymmetric", "gptq"),
    ("awq", "int4", "gguf"),
    ("bitsandbytes", "int8", "compressed-tensors"),
    ("bitsandbytes", "NF4, FP4", "hf"),
    ("codebook", "a table a row", "hf"),
    ("codebook", "a table a row", "gguf"),
    ("fp8", "FP8 in blocks", "gguf"),
    ("gguf", "Q8_0", "marlin"),
    ("gguf", "all other types", "compressed-tensors"),
    ("dense", "16 or 32 bit", "awq"),
    ("dense", "16 or 32 bit", "gguf"),
}
FOREIGN_KINDS = {
    ("compressed-tensors", "FP8, MXFP8"): "fp8-channel",
    ("compressed-tensors", "MXFP4"): "mxfp4",
    ("compressed-tensors", "NVFP4"): "nvfp4",
    ("fp8", "FP8 in blocks"): "fine-grained-fp8",
    ("bitsandbytes", "NF4, FP4"): "nf4",
    ("bitsandbytes", "int8"): "llm-int8",
}


def opened(path: Path) -> WeightReader:
    return open_weights(resolve(str(path)))


@pytest.fixture(scope="session")
def example(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Make,
    packed_checkpoint: Make,
    foreign_checkpoint: Make,
) -> Callable[[SourceKind], Path]:
    """A tiny model of a row's kind, made once a session."""
    root = tmp_path_factory.mktemp("rows")

    def make(source: SourceKind) -> Path:
        kind = (source.format, source.kinds)
        if source.format == "dense":
            return tiny_checkpoint("llama", dtype="bfloat16", **SMALL)
        if kind in FOREIGN_KINDS:
            return foreign_checkpoint(FOREIGN_KINDS[kind], **SMALL)
        if source.format == "codebook":
            return _codebook(root, tiny_checkpoint("llama", dtype="bfloat16", **SMALL))
        if source.format == "gguf":
            # Scales of blocks are halves of any kind where the weights are floats of any kind.
            dtype = "bfloat16" if source.example.is_plain else "float32"
            return _gguf(source, root, tiny_checkpoint("llama", dtype=dtype, **SMALL))
        scheme = source.example.kind.split()[0]
        dtype = str(source.dtype).removeprefix("torch.")
        folder = packed_checkpoint(source.format, scheme, dtype=dtype, **SMALL)
        return _act_order(folder, root) if source.kinds == "act-order" else folder

    return make


def _codebook(root: Path, original: Path) -> Path:
    out = root / "codebook"
    if not out.exists():
        rounded = replace(load_recipe("codebook"), method=Rtn())
        quantize_model(str(original), rounded, out=out)
    return out


def _gguf(source: SourceKind, root: Path, original: Path) -> Path:
    kind = source.example.kind
    type_ = matrix.FLOAT_TYPES.get(kind) or matrix.FILE_TYPES.get(kind, kind)
    path = root / f"{type_}.gguf"
    return path if path.exists() else convert_model(str(original), to="gguf", type=type_, out=path)


def _act_order(folder: Path, root: Path) -> Path:
    out = root / "act-order"
    if not out.exists():
        out.mkdir()
        for file in folder.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            order = torch.randperm(
                tensors[name].numel(), generator=torch.Generator().manual_seed(1)
            )
            tensors[name] = tensors[name][order].contiguous()
        save_file(tensors, out / "model.safetensors")
    return out


def converted(path: Path, target: str, found: Cell, out: Path) -> WeightReader:
    options = dict(found.options)
    assert options.keys() <= {"type", "requantize"}
    name = out / ("model.gguf" if target == "gguf" else "model")
    return opened(convert_model(str(path), to=target, out=name, **options))  # type: ignore[arg-type]


def relative(found: torch.Tensor, meant: torch.Tensor) -> float:
    return float((found - meant).norm() / meant.norm())


def in_blocks(reader: WeightReader) -> list[str]:
    """Linears of the blocks, packed or not."""
    names = {*reader.modules(), *(n.removesuffix(".weight") for n in reader.tensor_names())}
    return sorted(name for name in names if name.endswith("_proj"))


def check(source: SourceKind, target: str, path: Path, out: Path) -> None:
    found = cell(source, target)
    if found.options.get("requantize"):
        with pytest.raises(QtoolError, match="can be carried over to"):
            convert_model(str(path), to=target, out=out / "refused")
    if found.level == "no":
        with pytest.raises(QtoolError, match="holds quantized weights"):
            convert_model(str(path), to=target, out=out / "model")
        return
    before, after = opened(path), converted(path, target, found, out)
    assert len(in_blocks(before)) == 7
    assert in_blocks(before) == in_blocks(after)
    errors = []
    for module in in_blocks(before):
        meant, got = before.weight(module).dequantize(), after.weight(module).dequantize()
        errors.append(relative(got, meant))
    if target not in ("hf", "gguf"):
        assert sorted(after.modules()) == in_blocks(after)
    bounds = {
        "lossless": (0, 0),
        "near-lossless": (1e-9, 2**-8),
        "requantizes": (1e-4, 0.35),
    }
    least, most = bounds[found.level]
    assert least <= max(errors) <= most, (found, errors)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(
            source,
            target,
            id=f"{source.format}-{source.kinds}-{target}",
            marks=[] if (source.format, source.kinds, target) in QUICK else [pytest.mark.slow],
        )
        for source, target in CELLS
    ],
)
def test_a_cell_tells_what_the_command_does(
    source: SourceKind, target: str, example: Callable[[SourceKind], Path], tmp_path: Path
) -> None:
    check(source, target, example(source), tmp_path)


@pytest.mark.slow
def test_rows_have_examples_of_their_own_kind(example: Callable[[SourceKind], Path]) -> None:
    for source in SOURCE_KINDS:
        if source.format == "gguf":
            continue  # held to it by the type that the example is written in
        reader = opened(example(source))
        assert reader.format == source.format
        module = "model.layers.0.mlp.up_proj"
        held = reader.describe(module if module in reader.modules() else f"{module}.weight")
        assert (held.kind, held.scales) == (source.example.kind, source.example.scales)


def test_the_table_fits_its_width_and_names_every_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["convert", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert all(level in text for level in ("lossless", "near-lossless", "requantizes", "no "))
    main(["convert", "--list", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["targets"] == list(matrix.COLUMNS)
    assert len(facts["sources"]) == len(SOURCE_KINDS)
    awq = next(row for row in facts["sources"] if row["format"] == "awq")
    assert awq["targets"]["gguf"]["level"] == "near-lossless"
    assert awq["targets"]["gptq"]["options"] == {"requantize": True}
    assert "readers differ on asymmetric" in awq["targets"]["gptq"]["why"]
