"""A Hugging Face folder as a `WeightReader`: plain, or with linears packed by any of SOURCES.

Which linears are packed is told by tensor names ("x.qweight"), how they are packed by the
quantization_config; one file may mix packed and dense linears. Everything is checked against the
headers when the folder is opened, before any work: shapes and dtypes of every packed tensor against
the config, so that a file that lies is refused with its name and key and not found out by a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.convert.formats import ACT_ORDER, PLAIN_KINDS, Held
from qtool.convert.layer import (
    FloatSpec,
    LayerSpec,
    Layout,
    Packed,
    dequantize_act_order,
    is_act_order,
)
from qtool.convert.parts import Cut, cuts_of, part_shape
from qtool.convert.sources import SOURCES, UNMISTAKABLE
from qtool.errors import FormatError, UnsupportedModel
from qtool.json_files import read_json
from qtool.scheme import FloatScheme, QuantScheme
from qtool.source import Source
from qtool.weight_parts import Part, take
from qtool.weights import DenseWeight, QuantizedWeight, Weight

DENSE = "dense"
# Files that GPTQModel and AutoGPTQ write beside config.json, some of them only there.
GPTQ_CONFIG_NAME = "quantize_config.json"
# Small tensors are read whole while the headers are checked: a shape, or a short JSON text.
SMALL_BYTES = 1 << 16
# A suffix may have dots of its own, "weight.quant_state.bitsandbytes__nf4".
MAX_SUFFIX_PARTS = 3
# Where the scales of integer codes are.
SCALE_SUFFIXES = ("weight_scale", "scales", "s", "SCB")


class PackedLinear(NamedTuple):
    """One packed linear, checked against its headers."""

    layout: Layout
    spec: LayerSpec | FloatSpec
    shape: tuple[int, int]
    scheme: QuantScheme | FloatScheme
    scales: str | None


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """A model folder, opened lazily. `packed` says how each packed linear is held."""

    source: Source
    format: str
    config: dict[str, Any]
    checkpoint: Checkpoint
    packed: Mapping[str, PackedLinear]

    @classmethod
    def open(cls, source: Source) -> CheckpointWeights:
        checkpoint = Checkpoint.open(source.path)
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        quantization, where = _quantization_config(checkpoint)
        name = DENSE if quantization is None else _format_name(quantization, where)
        modules = _packed_modules(checkpoint, name)
        packed = {}
        if quantization is not None:
            for module, found in SOURCES[name].read(quantization, list(modules), where).items():
                spec = dataclasses.replace(found.spec, file=modules[module])
                packed[module] = _checked(checkpoint, Packed(found.layout, spec))
            _require_no_lost_scales(checkpoint, packed)
            if not packed:
                raise _nothing_packed(checkpoint, name, where)
        return cls(source, name, config, checkpoint, packed)

    def modules(self) -> list[str]:
        return list(self.packed)

    def tensor_names(self) -> list[str]:
        if self.format == DENSE:
            return list(self.checkpoint.tensors)
        ignored = SOURCES[self.format].ignored
        parts = {info.name for module in self.packed for info in self.parts(module)}
        return [
            name
            for name in self.checkpoint.tensors
            if name not in parts and name.rpartition(".")[2] not in ignored
        ]

    def parts(self, module: str) -> list[TensorInfo]:
        """The tensors that hold a packed linear."""
        names = (f"{module}.{suffix}" for suffix in self.packed[module].layout.suffixes)
        tensors = self.checkpoint.tensors
        return [tensors[name] for name in names if name in tensors]

    def describe(self, name: str) -> Held:
        """Zero points and group indices are read, being small: they decide what a layer is."""
        found = self.packed.get(name)
        if found is None:
            info = self.checkpoint.tensors.get(name)
            if info is None:
                raise self._missing(name)
            return Held(info.shape, _name(info.dtype))
        if isinstance(found.spec, FloatSpec) or isinstance(found.scheme, FloatScheme):
            return Held(found.shape, str(found.scheme))
        if self._act_order(name, found.layout, found.spec) is not None:
            return Held(found.shape, f"{found.scheme} {ACT_ORDER}")
        scheme, layout = found.scheme, found.layout
        if layout.zeros_of is not None:
            tensors = self._tensors(layout, name, skip=layout.suffixes[:1])
            zeros = layout.zeros_of(tensors, found.spec)
            scheme = dataclasses.replace(scheme, symmetric=zeros is None)
        return Held(found.shape, str(scheme), scheme, found.scales)

    def weight(self, module: str) -> Weight:
        found = self.packed.get(module)
        if found is None:
            return DenseWeight(self.tensor(f"{module}.weight"))
        layout, spec = found.layout, found.spec
        if isinstance(spec, LayerSpec):
            g_idx = self._act_order(module, layout, spec)
            if g_idx is not None:
                tensors = self._tensors(layout, module, skip=(str(layout.group_index),))
                in_order = layout.unpack(tensors, spec)
                assert isinstance(in_order, QuantizedWeight), type(in_order)
                return DenseWeight(dequantize_act_order(in_order, g_idx, spec))
        return layout.unpack(self._tensors(layout, module), spec)

    def part(self, module: str, part: Part) -> Weight:
        """As `weight`, of these rows and columns; little else is read where the layout allows."""
        found = self.packed.get(module)
        checkpoint = self.checkpoint
        if found is None and (part.rows is None or len(part.rows) == 1):
            rows = None if part.rows is None else part.rows[0]
            return DenseWeight(checkpoint.part(f"{module}.weight", (rows, part.columns)))
        layout_cuts = None if found is None else cuts_of(found, part)
        if found is None or layout_cuts is None or not self._fits(module, found, layout_cuts):
            return take(self.weight(module), part)
        tensors = {
            suffix: checkpoint.part(f"{module}.{suffix}", cut.runs)
            for suffix, cut in layout_cuts.items()
            if f"{module}.{suffix}" in checkpoint
        }
        rest = [suffix for suffix in found.layout.suffixes if suffix not in layout_cuts]
        tensors |= self._tensors(found.layout, module, skip=tuple(layout_cuts)) if rest else {}
        if found.layout.states_shape in tensors:
            tensors[str(found.layout.states_shape)] = torch.tensor(part_shape(found.shape, part))
        if part.columns is not None and found.layout.group_index is not None:
            tensors.pop(found.layout.group_index, None)  # groups in order say nothing
        return found.layout.unpack(tensors, found.spec)

    def _fits(self, module: str, found: PackedLinear, cuts: Mapping[str, Cut]) -> bool:
        """Whether the file's tensors have the axes that the layout says, and groups in order."""
        if isinstance(found.spec, LayerSpec):
            if self._act_order(module, found.layout, found.spec) is not None:
                return False
        tensors = self.checkpoint.tensors
        return all(
            tensors[name].shape == cut.shape
            for suffix, cut in cuts.items()
            if (name := f"{module}.{suffix}") in tensors
        )

    def tensor(self, name: str) -> Tensor:
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and module in self.packed:
            return self.weight(module).dequantize()
        if name not in self.checkpoint:
            raise self._missing(name)
        return self.checkpoint.tensor(name)

    def has(self, name: str) -> bool:
        module, _, suffix = name.rpartition(".")
        return name in self.checkpoint or (suffix == "weight" and module in self.packed)

    def _tensors(
        self, layout: Layout, module: str, skip: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        names = {s: f"{module}.{s}" for s in layout.suffixes if s not in skip}
        return {s: self.checkpoint.tensor(n) for s, n in names.items() if n in self.checkpoint}

    def _act_order(self, module: str, layout: Layout, spec: LayerSpec) -> Tensor | None:
        """The group of each input where groups are out of order, else None."""
        name = f"{module}.{layout.group_index}"
        if name not in self.checkpoint:
            return None
        g_idx = self.checkpoint.tensor(name)
        return g_idx if is_act_order(g_idx, spec.scheme) else None

    def _missing(self, name: str) -> FormatError:
        return FormatError(f"{self.source.name} has no tensor {name!r}")


def _quantization_config(checkpoint: Checkpoint) -> tuple[dict[str, Any] | None, str]:
    """The quantization config and the name of the file that it was found in."""
    found = checkpoint.config.get("quantization_config")
    where = "config.json"
    if found is None and (checkpoint.folder / GPTQ_CONFIG_NAME).is_file():
        found = {"quant_method": "gptq", **read_json(checkpoint.folder / GPTQ_CONFIG_NAME)}
        where = GPTQ_CONFIG_NAME
    if found is not None and not isinstance(found, dict):
        raise FormatError(f"{where}: quantization_config is no object")
    return found, where


def _format_name(quantization: Mapping[str, Any], where: str) -> str:
    method = quantization.get("quant_method")
    if method is None and ("load_in_4bit" in quantization or "load_in_8bit" in quantization):
        method = "bitsandbytes"  # its first files did not say
    for name, source in SOURCES.items():
        if method == source.quant_method:
            return name
    known = ", ".join(source.quant_method for source in SOURCES.values())
    raise UnsupportedModel(
        f"{where}: quantization method {method!r} is not read",
        f"read: {known}, GGUF files, and models in 16 or 32 bit",
    )


def _nothing_packed(checkpoint: Checkpoint, name: str, where: str) -> FormatError:
    """Read as they are, the linears would be another model's."""
    return FormatError(
        f"{where} says that linears are packed by {name}, and {checkpoint.folder.name} holds none "
        "that is",
        "fetch the packed weights; or, if these are the model's in 16 bits, take "
        f"quantization_config out of {where}",
    )


def _packed_modules(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """Packed module -> its file. Packed tensors of another format than the config's are refused."""
    # GPTQ and AWQ share the name "qweight"; only the config tells them apart.
    own = () if name == DENSE else SOURCES[name].markers
    modules: dict[str, str] = {}
    for tensor, info in checkpoint.tensors.items():
        for module, suffix in _splits(tensor):
            if suffix in own:
                modules[module] = info.file.name
            elif suffix in UNMISTAKABLE:
                raise FormatError(
                    f"{info.file.name}: {tensor} is packed, and the config says the model is "
                    f"{name}",
                    "config.json has lost its quantization_config, or is another model's",
                )
    return modules


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """Every way of cutting a name in module and suffix."""
    parts = name.split(".")
    for count in range(1, min(MAX_SUFFIX_PARTS, len(parts) - 1) + 1):
        yield ".".join(parts[:-count]), ".".join(parts[-count:])


def _checked(checkpoint: Checkpoint, packed: Packed) -> PackedLinear:
    """Shapes and types as the headers have them, against the config."""
    layout, spec = packed
    tensors = {}
    for suffix in layout.suffixes:
        info = checkpoint.tensors.get(f"{spec.module}.{suffix}")
        if info is None:
            continue
        if suffix in layout.small and info.nbytes <= SMALL_BYTES:
            tensors[suffix] = checkpoint.tensor(info.name)
        else:
            tensors[suffix] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    shape = layout.shape_of(tensors, spec)
    scheme = spec.scheme if layout.scheme_of is None else layout.scheme_of(tensors, spec)
    scales = next((tensors[name].dtype for name in SCALE_SUFFIXES if name in tensors), None)
    return PackedLinear(layout, spec, shape, scheme, None if scales is None else _name(scales))


def _require_no_lost_scales(checkpoint: Checkpoint, packed: Mapping[str, PackedLinear]) -> None:
    """A weight of 8-bit codes with nothing that scales it would be read as if it were values."""
    for name, info in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        kind = _name(info.dtype)
        if suffix == "weight" and module not in packed and kind not in PLAIN_KINDS:
            raise FormatError(f"{info.file.name}: {name} is {kind} and has no scales")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
