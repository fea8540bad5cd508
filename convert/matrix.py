"""What can become what: every kind of source against every target, as fidelity.py decides it.

A row has an example of its kind, a linear as such files usually have it, and its cells are what
`carry` says of the example; so the table cannot say other than the command does. A cell is the best
that the command does, and names the option that this takes where it is not the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qtool.convert.fidelity import DENSE_TARGET, GGUF_TARGET, TARGETS, Level, carry
from qtool.convert.formats import ACT_ORDER, Held
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.scheme import QuantScheme

SHAPE = (256, 256)  # one that every format has room for
COLUMNS = tuple(reversed(TARGETS))


@dataclass(frozen=True, slots=True)
class SourceKind:
    """A row.

    format   as `open_weights` calls it
    kinds    what the files hold, for readers
    example  one linear of such a file
    dtype    of its dense tensors
    """

    format: str
    kinds: str
    example: Held
    dtype: torch.dtype = torch.bfloat16


class Cell(NamedTuple):
    """What the command does with a row and a target, and the options that it takes for that."""

    level: Level
    options: Mapping[str, str | bool]
    why: str | None


def _integers(scheme: str, scales: str) -> Held:
    parsed = QuantScheme.parse(scheme)
    return Held(SHAPE, scheme, parsed, scales)


def _blocks(type: str) -> Held:
    return Held(SHAPE, type)


HALF = torch.float16
SOURCE_KINDS: tuple[SourceKind, ...] = (
    SourceKind("dense", "16 or 32 bit", Held(SHAPE, "bfloat16")),
    SourceKind("compressed-tensors", "int4", _integers("int4-g128-sym", "bfloat16")),
    SourceKind("compressed-tensors", "int4 asymmetric", _integers("int4-g128-asym", "bfloat16")),
    SourceKind("compressed-tensors", "int8, W8A8", _integers("int8-row-sym", "bfloat16")),
    SourceKind("compressed-tensors", "int8 asymmetric", _integers("int8-row-asym", "bfloat16")),
    SourceKind("compressed-tensors", "int2, int3", _integers("int3-g128-sym", "bfloat16")),
    SourceKind("compressed-tensors", "int5, int6, int7", _integers("int6-g128-sym", "bfloat16")),
    SourceKind("compressed-tensors", "FP8, MXFP8", Held(SHAPE, "fp8-row")),
    SourceKind("compressed-tensors", "MXFP4", Held(SHAPE, "mxfp4-g32")),
    SourceKind("compressed-tensors", "NVFP4", Held(SHAPE, "nvfp4-g16")),
    SourceKind("gptq", "int4", _integers("int4-g128-sym", "float16"), HALF),
    SourceKind("gptq", "int4 asymmetric", _integers("int4-g128-asym", "float16"), HALF),
    SourceKind("gptq", "int8", _integers("int8-g128-sym", "float16"), HALF),
    SourceKind("gptq", "int2, int3", _integers("int3-g128-sym", "float16"), HALF),
    SourceKind("gptq", ACT_ORDER, Held(SHAPE, f"int4-g128-sym {ACT_ORDER}"), HALF),
    SourceKind("awq", "int4", _integers("int4-g128-asym", "float16"), HALF),
    SourceKind("awq", "int4, zeros at 8", _integers("int4-g128-sym", "float16"), HALF),
    SourceKind("marlin", "int4", _integers("int4-g128-sym", "float16"), HALF),
    SourceKind("marlin", "int4 asymmetric", _integers("int4-g128-asym", "float16"), HALF),
    SourceKind("marlin", "int8", _integers("int8-g128-sym", "float16"), HALF),
    SourceKind("fp8", "FP8 in blocks", Held(SHAPE, "fp8-128x128")),
    SourceKind("bitsandbytes", "NF4, FP4", Held(SHAPE, "nf4-g64")),
    SourceKind("bitsandbytes", "int8", _integers("int8-row-sym", "float32")),
    SourceKind("codebook", "a table a row", Held(SHAPE, "codebook4-row")),
    SourceKind(GGUF_TARGET, "F32, F16, BF16", Held(SHAPE, "bfloat16")),
    SourceKind(GGUF_TARGET, "Q4_0", _blocks("Q4_0")),
    SourceKind(GGUF_TARGET, "Q8_0", _blocks("Q8_0")),
    SourceKind(GGUF_TARGET, "all other types", _blocks("Q4_K")),
)
# The GGUF type that holds a float type as it is.
FLOAT_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# The file type whose linears have a block type, where it is not of the same name.
FILE_TYPES = {"Q4_K": "Q4_K_S"}


def cell(source: SourceKind, target: str) -> Cell:
    """The best that the command does with a source."""
    held = source.example
    found = carry(held, target, source.dtype)
    if target == DENSE_TARGET and found.level != "lossless":
        return Cell("lossless", {"type": "f32"}, found.why)
    if target == GGUF_TARGET and held.is_plain:
        return Cell("lossless", {"type": FLOAT_TYPES[held.kind]}, found.why)
    if target == GGUF_TARGET and held.kind in TENSOR_TYPES:
        return Cell(found.level, {"type": FILE_TYPES.get(held.kind, held.kind)}, found.why)
    if target != GGUF_TARGET and found.level == "requantizes":
        return Cell(found.level, {"requantize": True}, found.why)
    return Cell(found.level, {}, found.why)


def as_facts() -> dict[str, Any]:
    """The whole table for a machine."""
    return {
        "targets": list(COLUMNS),
        "sources": [
            {
                "format": source.format,
                "kinds": source.kinds,
                "example": source.example.kind,
                "targets": {target: cell(source, target)._asdict() for target in COLUMNS},
            }
            for source in SOURCE_KINDS
        ],
    }


# The footnote of an option.
MARKS = {"type": "*", "requantize": "+"}
LEGEND = """\
lossless       the target's weights equal the source's (int3 codes may become int4 codes)
near-lossless  the same codes, with scales or minima rounded to a narrower float (2**-8 at most)
requantizes    the codes do not fit: rounded a second time
no             the source is not quantized: `qtool quantize` writes these formats

gptq is read in versions 1 and 2 and written in version 1

*  with --type: f32 for hf, where bf16 and fp16 are near-lossless; for gguf BF16, F16, F32 or the
   type that the source has, where Q4_K_M is the default
+  with --requantize; without it such linears stay in 16 bit, or the model is refused"""


def as_text() -> str:
    """The table in 100 columns, and what its words mean."""
    width = 2 + max(len(source.kinds) for source in SOURCE_KINDS)
    texts = {
        target: {source: _cell_text(cell(source, target)) for source in SOURCE_KINDS}
        for target in COLUMNS
    }
    heads = {"compressed-tensors": "comp.-tensors"}
    widths = {
        target: max(len(heads.get(target, target)), *map(len, texts[target].values()))
        for target in COLUMNS
    }
    head = " ".join(heads.get(target, target).ljust(widths[target]) for target in COLUMNS)
    lines = [f"{'from':<{width}} {head}".rstrip()]
    last = ""
    for source in SOURCE_KINDS:
        if source.format != last:
            last = source.format
            lines.append("Hugging Face (.safetensors, .bin)" if last == "dense" else last)
        cells = " ".join(texts[target][source].ljust(widths[target]) for target in COLUMNS)
        lines.append(f"{'  ' + source.kinds:<{width}} {cells}".rstrip())
    return "\n".join([*lines, "", LEGEND])


def _cell_text(found: Cell) -> str:
    return found.level + "".join(MARKS[option] for option in found.options)
