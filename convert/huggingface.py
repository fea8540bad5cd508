"""A Hugging Face folder as a `WeightReader`: plain, or with linears packed by any of FORMATS.

Which linears are packed is told by tensor names ("x.qweight"), how they are packed by the
quantization_config; one file may mix packed and dense linears. Everything is checked against the
headers when the folder is opened, before any work: shapes and dtypes of every packed tensor against
the config, so that a file that lies is refused with its name and key and not found out by a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint, Source, read_json
from qtool.convert import marlin
from qtool.convert.formats import FORMATS, Format, Held
from qtool.convert.layer import LayerSpec, dequantize_act_order, is_act_order
from qtool.errors import FormatError, UnsupportedModel
from qtool.weights import DenseWeight, QuantizedWeight, Weight

DENSE = "dense"
# What config.json calls a format -> its name in FORMATS.
QUANT_METHODS = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "awq": "awq",
    marlin.QUANT_METHOD: "marlin",
}
# Files that GPTQModel and AutoGPTQ write beside config.json, some of them only there.
GPTQ_CONFIG_NAME = "quantize_config.json"
# Names that no plain checkpoint has.
UNMISTAKABLE_SUFFIXES = ("qweight", "weight_packed")
# Read whole while the headers are checked: two numbers that the shapes do not tell.
SMALL_SUFFIXES = ("weight_shape",)


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """A model folder, opened lazily. `packed` says how each packed linear is held."""

    source: Source
    format: str
    config: dict[str, Any]
    checkpoint: Checkpoint
    packed: Mapping[str, LayerSpec]
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def open(cls, source: Source) -> CheckpointWeights:
        checkpoint = Checkpoint.open(source.path)
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        quantization, where = _quantization_config(checkpoint)
        name = DENSE if quantization is None else _format_name(quantization, where)
        modules = _packed_modules(checkpoint, name)
        if quantization is None:
            return cls(source, DENSE, config, checkpoint, {}, {})
        layout = FORMATS[name]
        specs = {}
        shapes = {}
        for module, spec in layout.read_specs(quantization, list(modules), where).items():
            specs[module] = dataclasses.replace(spec, file=modules[module])
            shapes[module] = layout.shape_of(_headers(checkpoint, layout, module), specs[module])
        return cls(source, name, config, checkpoint, specs, shapes)

    def modules(self) -> list[str]:
        return list(self.packed)

    def tensor_names(self) -> list[str]:
        if self.format == DENSE:
            return list(self.checkpoint.tensors)
        suffixes = FORMATS[self.format].suffixes
        return [name for name in self.checkpoint.tensors if not self._is_part(name, suffixes)]

    def _is_part(self, name: str, suffixes: tuple[str, ...]) -> bool:
        module, _, suffix = name.rpartition(".")
        return suffix in suffixes and module in self.packed

    def describe(self, name: str) -> Held:
        """Zero points and group indices are read, being small: they decide what a layer is."""
        spec = self.packed.get(name)
        if spec is None:
            info = self.checkpoint.tensors.get(name)
            if info is None:
                raise self._missing(name)
            return Held(info.shape, str(info.dtype).removeprefix("torch."))
        layout = FORMATS[self.format]
        g_idx = self._group_index(layout, name)
        if g_idx is not None and is_act_order(g_idx, spec.scheme):
            return Held(self.shapes[name], f"{spec.scheme} act-order")
        scheme = spec.scheme
        if layout.zeros_of is not None:
            zeros = layout.zeros_of(self._tensors(layout, name, skip=layout.suffixes[:1]), spec)
            scheme = dataclasses.replace(scheme, symmetric=zeros is None)
        return Held(self.shapes[name], str(scheme), scheme)

    def weight(self, module: str) -> Weight:
        spec = self.packed.get(module)
        if spec is None:
            return DenseWeight(self.tensor(f"{module}.weight"))
        layout = FORMATS[self.format]
        g_idx = self._group_index(layout, module)
        if g_idx is not None and is_act_order(g_idx, spec.scheme):
            in_order = self._unpack(layout, module, spec, skip=(str(layout.group_index),))
            return DenseWeight(dequantize_act_order(in_order, g_idx, spec))
        return self._unpack(layout, module, spec)

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

    def _unpack(
        self, layout: Format, module: str, spec: LayerSpec, skip: tuple[str, ...] = ()
    ) -> QuantizedWeight:
        return layout.unpack(self._tensors(layout, module, skip), spec)

    def _tensors(
        self, layout: Format, module: str, skip: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        names = {s: f"{module}.{s}" for s in layout.suffixes if s not in skip}
        return {s: self.checkpoint.tensor(n) for s, n in names.items() if n in self.checkpoint}

    def _group_index(self, layout: Format, module: str) -> Tensor | None:
        name = f"{module}.{layout.group_index}"
        return self.checkpoint.tensor(name) if name in self.checkpoint else None

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
    name = QUANT_METHODS.get(method) if isinstance(method, str) else None
    if name is None:
        raise UnsupportedModel(
            f"{where}: quantization method {method!r} is not read",
            f"read: {', '.join(QUANT_METHODS)}, GGUF files, and models in 16 or 32 bit",
        )
    return name


def _packed_modules(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """Packed module -> its file. Packed tensors of another format than the config's are refused."""
    # GPTQ and AWQ share the name "qweight"; only the config tells them apart.
    own = None if name == DENSE else FORMATS[name].suffixes[0]
    modules: dict[str, str] = {}
    for tensor, info in checkpoint.tensors.items():
        module, _, suffix = tensor.rpartition(".")
        if suffix != own and suffix in UNMISTAKABLE_SUFFIXES:
            raise FormatError(
                f"{info.file.name}: {tensor} is packed, and the config says the model is {name}",
                "config.json has lost its quantization_config, or is another model's",
            )
        if suffix == own:
            modules[module] = info.file.name
    return modules


def _headers(checkpoint: Checkpoint, layout: Format, module: str) -> dict[str, Tensor]:
    """The tensors of one packed linear as their headers describe them, on the meta device."""
    tensors = {}
    for suffix in layout.suffixes:
        info = checkpoint.tensors.get(f"{module}.{suffix}")
        if info is None:
            continue
        if suffix in SMALL_SUFFIXES and info.nbytes <= 64:
            tensors[suffix] = checkpoint.tensor(info.name)
        else:
            tensors[suffix] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    return tensors
