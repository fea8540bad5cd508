"""Quantized checkpoints of every packed format, made by plain rounding of a tiny real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool import grid
from qtool.checkpoint import Checkpoint, ShardWriter, write_json
from qtool.convert.formats import FORMATS
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

SchemeOf = Callable[[str], QuantScheme | None]
PackedCheckpoint = Callable[..., Path]


def rounded(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round to nearest.  weight [out, in]."""
    fitted = grid.fit(weight.float(), scheme)
    zeros = None if fitted.zeros is None else fitted.zeros.to(torch.uint8)
    codes = grid.codes(weight.float(), fitted, scheme)
    return QuantizedWeight(codes, fitted.scales, zeros, scheme)


RandomWeight = Callable[..., QuantizedWeight]


@pytest.fixture(scope="session")
def random_weight() -> RandomWeight:
    """`random_weight(scheme, out, in, seed=0)`: any codes, signed scales that fp16 and bfloat16
    hold exactly, any zeros.
    """

    def make(
        scheme: QuantScheme, out_features: int, in_features: int, seed: int = 0
    ) -> QuantizedWeight:
        generator = torch.Generator().manual_seed(seed)
        groups = scheme.num_groups(in_features)

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(0, scheme.num_codes, shape, generator=generator).to(torch.uint8)

        scales = grid.round_scales(torch.randn(out_features, groups, generator=generator) * 0.02)
        zeros = None if scheme.symmetric else integers(out_features, groups)
        return QuantizedWeight(integers(out_features, in_features), scales, zeros, scheme)

    return make


def _write_packed(source: Path, folder: Path, format_name: str, scheme_of: SchemeOf) -> Path:
    """Pack the linears of `source` for which `scheme_of(module)` names a scheme."""
    checkpoint = Checkpoint.open(source)
    layout = FORMATS[format_name]
    dtype = getattr(torch, checkpoint.config["dtype"])
    quantized: dict[str, QuantScheme] = {}
    dense: list[str] = []
    folder.mkdir()
    shards = ShardWriter(folder)
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        is_linear = len(info.shape) == 2 and "embed" not in name
        scheme = scheme_of(module) if is_linear else None
        if scheme is None:
            shards.add(name, checkpoint.tensor(name))
            dense += [module] if is_linear else []
            continue
        quantized[module] = scheme
        packed = layout.pack(rounded(checkpoint.tensor(name), scheme), dtype)
        shards.add_all((f"{module}.{suffix}", tensor) for suffix, tensor in packed.items())
    shards.finish()
    config = checkpoint.config | {
        "quantization_config": layout.quantization_config(quantized, dense)
    }
    write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


def in_blocks(scheme: str) -> SchemeOf:
    """The scheme for every linear inside the blocks, none for the head."""
    parsed = QuantScheme.parse(scheme)
    return lambda module: parsed if ".layers." in module else None


@pytest.fixture(scope="session")
def write_packed() -> Callable[[Path, Path, str, SchemeOf], Path]:
    """`write_packed(source, folder, format, scheme_of)`, for mixed schemes."""
    return _write_packed


@pytest.fixture(scope="session")
def packed_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]
) -> PackedCheckpoint:
    """`packed_checkpoint("gptq", "int4-g128-sym", family="qwen2")` -> a folder, made once."""
    root = tmp_path_factory.mktemp("packed")

    def make(
        format_name: str,
        scheme: str,
        family: str = "llama",
        dtype: str = "bfloat16",
        **overrides: object,
    ) -> Path:
        key = json.dumps([format_name, scheme, family, dtype, overrides], sort_keys=True)
        folder = root / f"{format_name}-{scheme}-{abs(hash(key)):x}"
        if not folder.exists():
            source = tiny_checkpoint(family, dtype=dtype, **overrides)
            _write_packed(source, folder, format_name, in_blocks(scheme))
        return folder

    return make
