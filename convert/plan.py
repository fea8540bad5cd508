"""What a conversion will do, settled from headers before any weight is read.

A linear goes into a packed format with its codes or not at all, as fidelity.py has it: integer
codes, scales and zeros are carried over as they are, in more bits where a format has no such width
(int3 as int4: the same weights). What a format cannot hold (a shape Marlin has no tiles for, an
asymmetric layer in GPTQ, GGUF's K-quants anywhere but in GGUF) becomes a dense tensor and is named
with its reason, or, where `--requantize` asks for it, is rounded again and warned of. Nothing here
quantizes for the first time; that is `qtool quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from qtool.arch import ARCHITECTURES
from qtool.convert.fidelity import DENSE_TARGET, GGUF_TARGET, TARGETS, carry
from qtool.convert.formats import FORMATS, Held, WeightReader
from qtool.convert.requantize import choose_schemes
from qtool.errors import QtoolError, UnknownName, UsageError
from qtool.scheme import QuantScheme

# --type of a dense checkpoint, under every name in use.
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f16": torch.float16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "f32": torch.float32,
    "fp32": torch.float32,
    "float32": torch.float32,
}
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions")

Action = Literal["repack", "requantize", "dequantize", "cast", "copy"]
PACKING = ("repack", "requantize")


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of one linear or tensor.

    name    a module for "repack", "requantize" and "dequantize", a tensor's full name else
    held    what the source has
    writes  what the output will have: a scheme or a dtype
    reason  why a packed linear is not carried over with its codes, or None
    nbytes  what it will take in the output, about
    """

    name: str
    held: Held
    action: Action
    writes: str
    nbytes: int
    scheme: QuantScheme | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """A checkpoint to be written: every step, and the quantization_config that goes with them."""

    target: str
    dtype: torch.dtype
    steps: tuple[Step, ...]
    quantization_config: dict[str, Any] | None
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for step in self.steps)

    @property
    def left_dense(self) -> dict[str, str]:
        """Packed linears of the source that the output holds dense, with the reason."""
        return {
            step.name: step.reason
            for step in self.steps
            if step.action == "dequantize"
            and step.reason is not None
            and not _is_embedding(step.name)
        }


def check_target(target: str) -> None:
    if target not in TARGETS:
        raise UnknownName("conversion target", target, TARGETS)


def plan_conversion(
    reader: WeightReader, *, target: str, type: str | None, requantize: bool = False
) -> ConversionPlan:
    """The plan for a checkpoint target ("hf" or a name in FORMATS).

    requantize  round again what cannot keep its codes, where that takes less than a dense tensor
    """
    check_target(target)
    if target == GGUF_TARGET:
        raise ValueError("a GGUF file is planned by convert/gguf_plan.py")
    check_requantize(target, requantize)
    dtype = _dtype(reader.config, target, type)
    steps = [_packed_step(reader, module, target, dtype) for module in reader.modules()]
    if target != DENSE_TARGET and FORMATS[target].single_scheme:
        steps = _of_one_width(steps)
    if requantize:
        steps = _requantized(reader, steps, target)
    steps += [_tensor_step(reader, name, target, dtype) for name in _kept_tensors(reader)]
    if target == DENSE_TARGET:
        return ConversionPlan(target, dtype, tuple(steps), None)
    _require_something_packed(reader, target, steps)
    packed = {step.name: step.scheme for step in steps if step.scheme is not None}
    dense = [name for step in steps if (name := _dense_linear(step)) is not None]
    config = FORMATS[target].quantization_config(packed, dense)
    return ConversionPlan(target, dtype, tuple(steps), config, _warnings(steps))


def check_requantize(target: str, requantize: bool) -> None:
    if requantize and target in (DENSE_TARGET, GGUF_TARGET):
        raise UsageError(
            f"--requantize does not go with --to {target}",
            "it is for formats of integer codes; a GGUF --type such as Q4_K_M rounds by itself",
        )


def _dtype(config: Mapping[str, Any], target: str, type: str | None) -> torch.dtype:
    """The dtype of dense tensors and, in compressed-tensors, of scales."""
    if type is None:
        declared = config.get("dtype") or config.get("torch_dtype")
        return DTYPES.get(str(declared), torch.bfloat16)
    if target != DENSE_TARGET:
        raise UsageError(
            f"--type {type} does not go with --to {target}, whose layers keep the width they have",
            "--type chooses a GGUF type (--to gguf) or the dtype of --to hf",
        )
    if type.lower() not in DTYPES:
        raise UnknownName("type for --to hf", type, ("bf16", "fp16", "f32"))
    return DTYPES[type.lower()]


def _packed_step(reader: WeightReader, module: str, target: str, dtype: torch.dtype) -> Step:
    held = reader.describe(module)
    out_features, in_features = held.shape
    dense_bytes = out_features * in_features * dtype.itemsize
    reason = None
    if target != DENSE_TARGET:
        found = carry(held, target, dtype)
        scheme, reason = found.scheme, found.why
        if not _may_be_packed(reader, module, target):
            reason = f"{target} packs the linears inside the blocks only"
        elif scheme is not None:
            return Step(module, held, "repack", str(scheme), _packed_bytes(held, scheme), scheme)
    return Step(module, held, "dequantize", _name(dtype), dense_bytes, None, reason)


def _packed_bytes(held: Held, scheme: QuantScheme) -> int:
    out_features, in_features = held.shape
    return int(scheme.bits_per_weight(in_features) * out_features * in_features / 8)


def _of_one_width(steps: list[Step]) -> list[Step]:
    """For formats of one scheme: codes of several widths all take the widest, which holds them."""
    widest = max((step.scheme.bits for step in steps if step.scheme is not None), default=0)
    return [
        step
        if step.scheme is None
        else _packed_as(step, replace(step.scheme, bits=widest), step.action)
        for step in steps
    ]


def _packed_as(step: Step, scheme: QuantScheme, action: Action) -> Step:
    nbytes = _packed_bytes(step.held, scheme)
    return replace(step, action=action, writes=str(scheme), nbytes=nbytes, scheme=scheme)


def _may_be_packed(reader: WeightReader, module: str, target: str) -> bool:
    """GGUF packs embeddings and the head as well, and a head that is packed in GPTQ or AWQ comes
    out of some loaders at random.
    """
    blocks_only = reader.format == GGUF_TARGET or target in ("gptq", "awq")
    return _is_in_block(module) or not blocks_only


def _requantized(reader: WeightReader, steps: list[Step], target: str) -> list[Step]:
    """The steps again, with linears that would become dense rounded a second time instead."""
    pending = {
        step.name: step.held
        for step in steps
        if step.action == "dequantize" and _may_be_packed(reader, step.name, target)
    }
    kept = [step.scheme for step in steps if step.scheme is not None]
    schemes = choose_schemes(pending, kept, FORMATS[target])
    return [
        _packed_as(step, schemes[step.name], "requantize") if step.name in schemes else step
        for step in steps
    ]


def _warnings(steps: list[Step]) -> tuple[str, ...]:
    again = [step for step in steps if step.action == "requantize"]
    if not again:
        return ()
    kinds = ", ".join(sorted({step.held.kind for step in again}))
    schemes = ", ".join(sorted({step.writes for step in again}))
    return (
        f"{len(again)} linears are quantized already ({kinds}) and are rounded a second time, to "
        f"{schemes}, without calibration: `qtool quantize` on the original model loses less",
    )


def _is_in_block(module: str) -> bool:
    """Blocks are numbered, and nothing else is."""
    return any(part.isdigit() for part in module.split("."))


def _kept_tensors(reader: WeightReader) -> list[str]:
    """Plain tensors to write: all but a head that is tied, which loaders must not find stored."""
    names = reader.tensor_names()
    if not reader.config.get("tie_word_embeddings"):
        return names
    family = ARCHITECTURES.get(str(reader.config.get("model_type")))
    head = f"{family.hf_name('head') if family else 'lm_head'}.weight"
    return [name for name in names if name != head]


def _tensor_step(reader: WeightReader, name: str, target: str, dtype: torch.dtype) -> Step:
    """Dense tensors keep their type, but where --to hf asks for one."""
    held = reader.describe(name)
    source = DTYPES.get(held.kind)
    count = 1
    for size in held.shape:
        count *= size
    if target == DENSE_TARGET and source is not None and source != dtype:
        return Step(name, held, "cast", _name(dtype), count * dtype.itemsize)
    itemsize = (source or torch.float32).itemsize
    return Step(name, held, "copy", held.kind, count * itemsize)


def _dense_linear(step: Step) -> str | None:
    """The module of a step that leaves a linear dense, for the loader's list of exceptions."""
    if step.action in PACKING or len(step.held.shape) != 2:
        return None
    module = step.name if step.action == "dequantize" else step.name.removesuffix(".weight")
    is_weight = step.action == "dequantize" or step.name.endswith(".weight")
    return module if is_weight and not _is_embedding(module) else None


def _is_embedding(module: str) -> bool:
    return module.split(".")[-1] in EMBEDDINGS


def _require_something_packed(reader: WeightReader, target: str, steps: list[Step]) -> None:
    if any(step.action in PACKING for step in steps):
        return
    name = reader.source.name
    if not reader.modules():
        raise QtoolError(
            f"{name} is not quantized, and {target} holds quantized weights",
            f"quantize it first: qtool quantize {name} --recipe int4, "
            "then convert what that writes",
        )
    refused = [step for step in steps if step.reason is not None]
    step = next((s for s in refused if _is_in_block(s.name)), refused[0])
    raise QtoolError(
        f"no linear of {name} can be carried over to {target}: {step.name}: {step.reason}",
        "add --requantize to round its weights a second time, or quantize the original model",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
