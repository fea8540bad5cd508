"""A GGUF file seen as a Hugging Face model: its names, its order of rows, its config.json.

`GgufWeights` is the WeightReader of convert/formats.py. Tensors are views of the mapped file until
they are asked for; the permutation of q and k is undone on whatever the rows are (values, codes,
block bytes), and a stack of experts is read a matrix at a time. Q4_0 comes out as what it is,
symmetric int4 in groups of 32; other block types stay blocks, which dequantize themselves. Matrices
that GGUF turns around (Conv1D, the halves of kv_b) are values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.convert.formats import Held
from qtool.convert.gguf.blocks.codecs import find_codec
from qtool.convert.gguf.blocks.legacy import BLOCK, unpack_q4_0
from qtool.convert.gguf.config_keys import find_gguf_architecture, read_settings
from qtool.convert.gguf.container import GgufFile, TensorEntry, Value
from qtool.convert.gguf.families import FAMILIES
from qtool.convert.gguf.names import NameMap, inverse_order
from qtool.convert.gguf.parts import open_parts
from qtool.convert.gguf.reading import Settings
from qtool.convert.gguf.ropes import DERIVED_TENSORS
from qtool.convert.gguf.sizes import STACKED, Sizes
from qtool.convert.gguf.vocab import end_of_generation_ids
from qtool.errors import FormatError
from qtool.scheme import QuantScheme
from qtool.source import Source
from qtool.weight_parts import Part, row_numbers, take
from qtool.weights import BlockWeight, DenseWeight, Weight

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a Hugging Face tensor is: a tensor of the file, or a matrix of a stack.

    others  the file's tensors that follow it in the same Hugging Face tensor: kv_b's values
    """

    entry: TensorEntry
    expert: int | None = None
    others: tuple[TensorEntry, ...] = ()

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.entry, *self.others)

    @property
    def is_quantized(self) -> bool:
        return any(entry.type.is_quantized for entry in self.entries)


class GgufWeights:
    """A model read from a .gguf file under Hugging Face names."""

    format = "gguf"

    def __init__(self, source: Source) -> None:
        self.source = source
        self.file = open_parts(source.path)
        self.metadata: dict[str, Value] = self.file.metadata
        self.config: dict[str, Any] = read_config(self.file)
        self._architecture = find_gguf_architecture(self.file)
        self._names = NameMap.of(self._architecture, Sizes.of(self.config))
        self._parts = self._placed()
        self._check()

    def _placed(self) -> dict[str, _Part]:
        parts: dict[str, _Part] = {}
        values: dict[str, TensorEntry] = {}
        for name, entry in self.file.tensors.items():
            if name in DERIVED_TENSORS:
                continue
            tensors = self._names.all_hf(name)
            if name.endswith("attn_v_b.weight"):
                values[tensors[0]] = entry
                continue
            place = self._names.place(tensors[0])
            stacked = place is not None and place.role in STACKED
            for number, tensor in enumerate(tensors):
                parts[tensor] = _Part(entry, number if stacked else None)
        for tensor, entry in values.items():
            if tensor in parts:
                parts[tensor] = _Part(parts[tensor].entry, others=(entry,))
        return parts

    def _check(self) -> None:
        """Shapes and completeness: what the decoder would otherwise trip over, or index beyond."""
        for name in self._names.required():
            if name not in self._parts:
                raise FormatError(f"{self.source.path} has no tensor {self._names.to_gguf(name)}")
        for name, part in self._parts.items():
            for entry, expected in zip(part.entries, self._shapes(name, part), strict=False):
                if part.expert in (None, 0):  # of a stack, once is enough
                    self._check_entry(entry, expected)
            if len(self._shapes(name, part)) != len(part.entries):
                raise FormatError(
                    f"{self.source.path} has {part.entry.name} without the other half of kv_b"
                )

    def _check_entry(self, entry: TensorEntry, expected: tuple[int, ...]) -> None:
        if entry.shape != expected:
            raise FormatError(
                f"{self.source.path}: tensor {entry.name} has shape {list(entry.shape)}, "
                f"its metadata says {list(expected)}"
            )
        if not entry.type.is_quantized and entry.type.name not in FLOAT_DTYPES:
            raise FormatError(
                f"{self.source.path}: tensor {entry.name} has type {entry.type.name}, "
                "which is no weight's"
            )
        if entry.type.is_quantized:
            find_codec(entry.type)

    def _shapes(self, name: str, part: _Part) -> list[tuple[int, ...]]:
        """The shapes that the settings give the file's tensors of a Hugging Face tensor."""
        place, shape = self._names.place(name), self._names.shape(name)
        assert place is not None, name
        if place.role == "kv_b":
            sizes, heads = self._names.config.by_name, self._names.config.num_heads
            latent = sizes["latent"]
            return [(heads, latent, sizes["nope"]), (heads, sizes["value"], latent)]
        if place.role == "shared_router":
            return [shape[1:]]
        return [shape if part.expert is None else (self._names.config.num_experts, *shape)]

    def release(self) -> None:
        """Of what has been read, keep nothing in memory."""
        self.file.release()

    def modules(self) -> list[str]:
        return [
            name.removesuffix(".weight")
            for name, part in self._parts.items()
            if part.is_quantized and not self._is_loose(name)
        ]

    def tensor_names(self) -> list[str]:
        return [
            name
            for name, part in self._parts.items()
            if not part.is_quantized or self._is_loose(name)
        ]

    def _is_loose(self, name: str) -> bool:
        """Whether a tensor is turned around in the file, so that its blocks cannot be kept."""
        place = self._names.place(name)
        assert place is not None, name
        return place.role == "kv_b" or place.role in self._architecture.transposed

    def has(self, name: str) -> bool:
        return name in self._parts

    def describe(self, name: str) -> Held:
        """A module or tensor by name; kinds are "float32" or a GGUF type such as "Q4_K"."""
        if name not in self._parts:
            name = f"{name}.weight"
        part = self._part(name)
        shape = self._names.stored_shape(name)
        if part.is_quantized and self._is_loose(name):
            return Held(shape, "float32")
        type = part.entry.type
        if not part.is_quantized:
            return Held(shape, str(FLOAT_DTYPES[type.name]).removeprefix("torch."))
        scheme = QuantScheme(4, BLOCK) if type.name == "Q4_0" else None
        return Held(shape, type.name, scheme)

    def weight(self, module: str) -> Weight:
        """The weight of a linear or an embedding, rows in Hugging Face's order."""
        weight = self.stored(module)
        if isinstance(weight, BlockWeight) and weight.codec.name == "Q4_0":
            return unpack_q4_0(weight)
        return weight

    def part(self, module: str, part: Part) -> Weight:
        """As `weight`, of these rows and columns; the rest of the file is not touched."""
        weight = self.stored_part(module, part)
        if isinstance(weight, BlockWeight) and weight.codec.name == "Q4_0":
            return unpack_q4_0(weight)
        return weight

    def stored_part(self, module: str, part: Part) -> Weight:
        """As `stored`, likewise."""
        name = f"{module}.weight"
        found = self._part(name)
        order = self._names.row_order(module)
        if self._is_loose(name) or not found.is_quantized or order is None or part.rows is None:
            return take(self.stored(module), part)
        in_file = inverse_order(order)[row_numbers(part.rows)]
        rows = self._blocks(found.entry, found.expert).rows(in_file)
        return take(rows, Part(columns=part.columns))

    def stored(self, module: str) -> Weight:
        """The same with all quantized types as their blocks, for who multiplies by those."""
        name = f"{module}.weight"
        part = self._part(name)
        if self._is_loose(name) or not part.is_quantized:
            values = self.tensor(name)
            transposed = self._names.stored_shape(name) != self._names.shape(name)
            return DenseWeight(values.T.contiguous() if transposed else values)
        order = self._names.row_order(module)
        weight = self._blocks(part.entry, part.expert)
        return weight if order is None else weight.rows(inverse_order(order))

    def _blocks(self, entry: TensorEntry, matrix: int | None = None) -> BlockWeight:
        """One matrix of a quantized tensor, in the file's order; all of it, as rows, for None."""
        data = self.file.data(entry.name)
        if matrix is not None:
            rows = entry.shape[-2]
            data = data[matrix * rows : (matrix + 1) * rows]
        return BlockWeight(data, entry.shape[-1], find_codec(entry.type))

    def tensor(self, name: str) -> Tensor:
        """A tensor by its full name, in the dtype of the file; blocks as float32."""
        part = self._part(name)
        place = self._names.place(name)
        assert place is not None, name
        if place.role == "kv_b":
            keys, values = (self._values(entry) for entry in part.entries)
            return torch.cat((keys.transpose(1, 2), values.to(keys.dtype)), dim=1).flatten(0, 1)
        if name.endswith(".weight") and part.is_quantized and not self._is_loose(name):
            return self.weight(name.removesuffix(".weight")).dequantize()
        values = self._values(part.entry, part.expert)
        if len(self._names.shape(name)) == 2 and place.role in self._architecture.transposed:
            return values.T.contiguous()
        offset = self._names.offset(name)
        if offset:
            return values.float() - offset
        order = self._names.row_order(name.rpartition(".")[0])
        values = values if order is None else values[inverse_order(order)]
        return values.view(self._names.stored_shape(name))

    def _part(self, name: str) -> _Part:
        part = self._parts.get(name)
        if part is None:
            raise FormatError(f"{self.source.path} has no tensor {name!r}")
        return part

    def _values(self, entry: TensorEntry, matrix: int | None = None) -> Tensor:
        """A tensor's values in its own shape, or one matrix of a stack; a copy, since files do not
        align to elements.
        """
        shape = entry.shape if matrix is None else entry.shape[1:]
        if entry.type.is_quantized:
            return self._blocks(entry, matrix).dequantize().view(shape)
        data = self.file.data(entry.name)
        if matrix is not None:
            data = data[matrix * shape[0] : (matrix + 1) * shape[0]]
        return data.clone().view(FLOAT_DTYPES[entry.type.name]).view(shape)


def read_config(file: GgufFile) -> dict[str, Any]:
    """config.json from metadata and tensor infos."""
    metadata = file.metadata
    settings = Settings(metadata, str(file.path))
    architecture = find_gguf_architecture(file)
    prefix = architecture.gguf_name
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError(
            f"{file.path} has no tensor token_embd.weight", "vocabulary-only files hold no model"
        )
    blocks = settings.whole(f"{prefix}.block_count")
    if blocks > len(file.tensors):  # names are made for every block, so it must be plausible
        raise FormatError(
            f"{file.path}: {prefix}.block_count is {blocks}, with {len(file.tensors)} tensors"
        )
    experts = settings.count(f"{prefix}.expert_count", 0)
    dense = settings.count(f"{prefix}.leading_dense_block_count", 0)
    matrices = sum(entry.shape[0] for entry in file.tensors.values() if len(entry.shape) == 3)
    if 3 * experts * max(blocks - dense, 0) > matrices:  # and so is the number of experts
        raise FormatError(
            f"{file.path}: {prefix}.expert_count is {experts}, with {matrices} matrices in stacks"
        )
    ends = end_of_generation_ids(metadata)
    family = FAMILIES[architecture.model_type]
    return {
        "architectures": [family.hf_class],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        **read_settings(file, architecture),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "dtype": _dtype(file),
    }


def _dtype(file: GgufFile) -> str:
    """The dtype to run in: that of the dense matrices, bfloat16 where all are quantized."""
    found = {entry.type.name for entry in file.tensors.values() if len(entry.shape) > 1}
    names = [name for name in ("F16", "BF16", "F32") if name in found]
    if any(entry.type.is_quantized for entry in file.tensors.values()) or not names:
        return "bfloat16"
    return str(FLOAT_DTYPES[names[0]]).removeprefix("torch.")
