"""A layer's experts in MXFP4, all in one tensor: gpt-oss as it is published, `quant_method: mxfp4`.

    <name>_blocks  uint8 [experts, out, in / 32, 16]  input 32 b + 2 i of block b in the low four
                                                      bits of byte i, 32 b + 2 i + 1 in the high
    <name>_scales  uint8 [experts, out, in / 32]      2**(byte - 127)

    W[e, k, o] = E2M1[code] * scale        <name> [experts, in, out], as x @ W[e] takes it

Codes and scales are those of float4.py; the parameter lies the other way round. Columns of gate and
up take turns in `gate_up_proj`, which does not matter here.

Source: transformers integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint import TensorInfo
from qtool.convert import float4
from qtool.convert.layer import FloatSpec
from qtool.errors import FormatError
from qtool.scheme import FloatScheme

QUANT_METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
_GROUP, _GROUP_BYTES = 32, 16


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that experts are packed this way."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def packed_experts(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int, int]]:
    """Parameter -> its shape [experts, in, out], from headers; FormatError where they disagree."""
    found = {}
    for name, blocks in tensors.items():
        if not name.endswith(BLOCKS):
            continue
        parameter = name.removesuffix(BLOCKS)
        scales = tensors.get(parameter + SCALES)
        whole = (
            len(blocks.shape) == 4
            and blocks.shape[3] == _GROUP_BYTES
            and blocks.dtype == torch.uint8
            and scales is not None
            and scales.shape == blocks.shape[:3]
            and scales.dtype == torch.uint8
        )
        if not whole:
            raise FormatError(
                f"{blocks.file.name}: {name} is {blocks.dtype} of shape {list(blocks.shape)}; "
                f"MXFP4 experts are uint8 [experts, out, in / {_GROUP}, {_GROUP_BYTES}] with "
                "scales of the first three axes"
            )
        experts, out_features, groups, _ = blocks.shape
        found[parameter] = experts, groups * _GROUP, out_features
    return found


def unpack_experts(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[experts, in, out] of `dtype`.

    blocks  uint8 [experts, out, in / 32, 16]
    scales  uint8 [experts, out, in / 32]
    """
    experts, out_features, groups, _ = blocks.shape
    spec = FloatSpec("experts", FloatScheme(float4.MXFP4, (1, _GROUP)))
    values = torch.empty(experts, groups * _GROUP, out_features, dtype=dtype)
    for expert in range(experts):
        parts = {
            "weight_packed": blocks[expert].reshape(out_features, -1),
            "weight_scale": scales[expert],
        }
        values[expert] = float4.unpack_layer(parts, spec).dequantize(dtype).t()
    return values
