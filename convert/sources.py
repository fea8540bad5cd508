"""Every kind of packed model folder that can be read: more than FORMATS, which is what is written.

What config.json calls the format chooses the row; tensor names tell which linears are packed, and
the row's `read` how each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.convert import awq, bitsandbytes, codebook, compressed_tensors, float8, gptq, marlin
from qtool.convert.layer import Packed

# Tensors that only packed models have; others, such as Marlin's "B", could be anybody's.
UNMISTAKABLE = (
    "qweight",
    "weight_packed",
    codebook.MARKER,
    *float8.SCALES,
    *bitsandbytes.MARKERS,
)


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """One value of quant_method.

    quant_method  as config.json has it
    markers       suffixes of tensors that only packed linears have, one of which all of them have
    read          (quantization_config, packed modules, the file's name) -> module: how it is packed
    ignored       suffixes of tensors that belong to no weight and are carried nowhere
    """

    quant_method: str
    markers: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Sequence[str], str], dict[str, Packed]]
    ignored: tuple[str, ...] = ()


SOURCES: dict[str, SourceFormat] = {
    "compressed-tensors": SourceFormat(
        "compressed-tensors",
        compressed_tensors.MARKERS,
        compressed_tensors.read,
        compressed_tensors.ACTIVATION_SUFFIXES,
    ),
    "gptq": SourceFormat("gptq", ("qweight",), gptq.read),
    "awq": SourceFormat("awq", ("qweight",), awq.read),
    "marlin": SourceFormat(marlin.QUANT_METHOD, ("B",), marlin.read),
    "fp8": SourceFormat("fp8", float8.SCALES, float8.read, compressed_tensors.ACTIVATION_SUFFIXES),
    "bitsandbytes": SourceFormat("bitsandbytes", bitsandbytes.MARKERS, bitsandbytes.read),
    "codebook": SourceFormat(codebook.QUANT_METHOD, (codebook.MARKER,), codebook.read),
}
