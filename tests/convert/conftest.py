"""Quantized checkpoints of every packed format, made by plain rounding of a tiny real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import grid
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import FORMATS
from qtool.json_files import write_json
from qtool.scheme import QuantScheme
from qtool.shards import ShardWriter
from qtool.weights import QuantizedWeight

DATA = Path(__file__).parent / "data"

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


def _absmax(blocks: torch.Tensor, largest: float) -> torch.Tensor:
    """The scale that puts the largest magnitude of the last axis on `largest`; axes are kept."""
    return blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest


Parts = dict[str, torch.Tensor]


def _by_library(
    weight: torch.Tensor, layout: str, args: dict[str, Any], scales: torch.Tensor, **more: Any
) -> Parts:
    """Compressed by compressed-tensors itself."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(layout)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    state = {"weight": weight, "weight_scale": scales, **more}
    packed: Parts = compressor.compress(state, scheme)
    return packed


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
FP8_MAX, FP4_MAX = 448.0, 6.0
BLOCK = 128


def _int8(weight: torch.Tensor) -> Parts:
    return _by_library(weight, "int-quantized", INT8, _absmax(weight, 127.5))


def _int8_asymmetric(weight: torch.Tensor) -> Parts:
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scales = (high - low) / 255
    zeros = (-128 - torch.round(low / scales)).clamp(-128, 127).to(torch.int8)
    args = INT8 | {"symmetric": False}
    return _by_library(weight, "int-quantized", args, scales, weight_zero_point=zeros)


def _int4_in_bytes(weight: torch.Tensor) -> Parts:
    scales = _absmax(weight.unflatten(1, (-1, 64)), 7.5).squeeze(-1)
    args = INT8 | {"num_bits": 4, "strategy": "group", "group_size": 64}
    return _by_library(weight, "naive-quantized", args, scales.bfloat16())


def _fp8_channel(weight: torch.Tensor) -> Parts:
    return _by_library(weight, "float-quantized", FP8, _absmax(weight, FP8_MAX).bfloat16())


def _fp8_tensor(weight: torch.Tensor) -> Parts:
    scale = _absmax(weight.flatten(), FP8_MAX)
    packed = _by_library(weight, "float-quantized", FP8 | {"strategy": "tensor"}, scale)
    return packed | {"input_scale": torch.ones(1)}


def _block_scales(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)
    return _absmax(blocks.flatten(2), FP8_MAX).squeeze(-1)


def _fp8_block(weight: torch.Tensor) -> Parts:
    args = FP8 | {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    return _by_library(weight, "float-quantized", args, _block_scales(weight))


def _fine_grained(weight: torch.Tensor) -> Parts:
    scales = _block_scales(weight)
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return {"weight": (weight / whole).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def _power_of_two(scales: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.ceil(torch.log2(scales)))


def _fine_grained_ue8m0(weight: torch.Tensor) -> Parts:
    scales = _power_of_two(_block_scales(weight))
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return {
        "weight": (weight / whole).to(torch.float8_e4m3fn),
        "weight_scale_inv": scales.to(torch.float8_e8m0fnu),
    }


def _mxfp8(weight: torch.Tensor) -> Parts:
    scales = _power_of_two(_absmax(weight.unflatten(1, (-1, 32)), FP8_MAX).squeeze(-1))
    args = FP8 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    return _by_library(weight, "mxfp8-quantized", args, scales)


def _mxfp4(weight: torch.Tensor) -> Parts:
    scales = _power_of_two(_absmax(weight.unflatten(1, (-1, 32)), FP4_MAX).squeeze(-1))
    args = FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    return _by_library(weight, "mxfp4-pack-quantized", args, scales)


def _nvfp4(weight: torch.Tensor) -> Parts:
    overall = FP8_MAX * FP4_MAX / weight.abs().max().view(1)
    scales = _absmax(weight.unflatten(1, (-1, 16)), FP4_MAX).squeeze(-1) * overall
    scales = scales.to(torch.float8_e4m3fn).float()
    args = FP4 | {"strategy": "tensor_group", "group_size": 16}
    more = {"weight_global_scale": overall}
    return _by_library(weight, "nvfp4-pack-quantized", args, scales, **more)


def _nf4(weight: torch.Tensor) -> Parts:
    """As bitsandbytes packs it; the table is that of its own tensors in data/."""
    golden = load_file(DATA / "bitsandbytes.safetensors")
    table = golden["nf4.weight.quant_map"]
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1).to(torch.uint8)
    pairs = codes.view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*weight.shape]}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": absmax,
        "weight.quant_map": table.clone(),
        "weight.quant_state.bitsandbytes__nf4": text,
    }


def _nf4_nested(weight: torch.Tensor) -> Parts:
    parts = _nf4(weight)
    table = load_file(DATA / "bitsandbytes.safetensors")["nf4_nested.weight.nested_quant_map"]
    absmax = parts["weight.absmax"]
    offset = float(absmax.mean())
    blocks = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    outer = blocks.abs().amax(1)
    codes = (blocks / outer[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1).to(torch.uint8)
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts | {
        "weight.absmax": codes.flatten()[: absmax.numel()].clone(),
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": text,
    }


def _llm_int8(weight: torch.Tensor) -> Parts:
    scales = weight.abs().amax(1)
    codes = torch.round(weight * 127 / scales[:, None]).to(torch.int8)
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _group(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}}  # fmt: skip


# Files that others write: how a linear is packed, and the quantization_config that goes with it.
FOREIGN: dict[str, tuple[Callable[[torch.Tensor], Parts], dict[str, Any]]] = {
    "int8": (_int8, _group("int-quantized", INT8)),
    "int8-asym": (_int8_asymmetric, _group("int-quantized", INT8 | {"symmetric": False})),
    "int4-in-bytes": (
        _int4_in_bytes,
        _group("naive-quantized", INT8 | {"num_bits": 4, "strategy": "group", "group_size": 64}),
    ),
    "fp8-channel": (_fp8_channel, _group("float-quantized", FP8)),
    "fp8-tensor": (_fp8_tensor, _group("float-quantized", FP8 | {"strategy": "tensor"})),
    "fp8-block": (
        _fp8_block,
        _group(
            "float-quantized", FP8 | {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        ),
    ),
    "mxfp8": (_mxfp8, _group("mxfp8-quantized", FP8 | {"strategy": "group", "group_size": 32})),
    "mxfp4": (_mxfp4, _group("mxfp4-pack-quantized", FP4 | {"strategy": "group",
                                                            "group_size": 32})),
    "nvfp4": (_nvfp4, _group("nvfp4-pack-quantized", FP4 | {"strategy": "tensor_group",
                                                            "group_size": 16})),
    "fine-grained-fp8": (_fine_grained, {"quant_method": "fp8", "activation_scheme": "dynamic",
                                         "weight_block_size": [BLOCK, BLOCK]}),
    "fine-grained-ue8m0": (_fine_grained_ue8m0, {"quant_method": "fp8", "scale_fmt": "ue8m0",
                                                 "weight_block_size": [BLOCK, BLOCK]}),
    "nf4": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
                   "bnb_4bit_quant_type": "nf4"}),
    "nf4-nested": (_nf4_nested, {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                 "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "llm-int8": (_llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}  # fmt: skip


def _write_foreign(source: Path, folder: Path, kind: str) -> Path:
    checkpoint = Checkpoint.open(source)
    pack, config = FOREIGN[kind]
    tensors: Parts = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.tensor(name)
        if ".layers." in name and tensor.ndim == 2:
            for suffix, part in pack(tensor.float()).items():
                tensors[f"{name.removesuffix('.weight')}.{suffix}"] = part.contiguous()
        else:
            tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", checkpoint.config | {"quantization_config": config})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def foreign_parts() -> Callable[[str, torch.Tensor], tuple[Parts, dict[str, Any]]]:
    """`foreign_parts("nvfp4", weight)` -> a linear's tensors and a quantization_config."""
    return lambda kind, weight: (FOREIGN[kind][0](weight), FOREIGN[kind][1])


@pytest.fixture(scope="session")
def foreign_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]
) -> Callable[..., Path]:
    """`foreign_checkpoint("nf4")` -> a tiny llama as another tool would have written it."""
    root = tmp_path_factory.mktemp("foreign")

    def make(kind: str, family: str = "llama", **overrides: object) -> Path:
        key = json.dumps([kind, family, overrides], sort_keys=True)
        folder = root / f"{kind}-{abs(hash(key)):x}"
        if not folder.exists():
            source = tiny_checkpoint(family, dtype="bfloat16", **overrides)
            _write_foreign(source, folder, kind)
        return folder

    return make
