"""A GGUF file seen as a Hugging Face model: its names, its order of rows, its config.json.

`GgufWeights` is the WeightReader of convert/formats.py. Tensors are views of the mapped file until
they are asked for; the permutation of q and k is undone on whatever the rows are (values, codes,
block bytes). Q4_0 comes out as what it is, symmetric int4 in groups of 32; other block types stay
blocks, which dequantize themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtool.arch import DecoderConfig, Rope
from qtool.checkpoint import Source
from qtool.convert.formats import Held
from qtool.convert.gguf.blocks.codecs import find_codec
from qtool.convert.gguf.blocks.legacy import BLOCK, unpack_q4_0
from qtool.convert.gguf.container import GgufFile, TensorEntry, Value
from qtool.convert.gguf.names import (
    ROPE_FREQUENCIES,
    NameMap,
    Settings,
    find_gguf_architecture,
    inverse_order,
    rope_from_divisors,
)
from qtool.convert.gguf.vocab import end_of_generation_ids
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight, Weight

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class GgufWeights:
    """A model read from a .gguf file under Hugging Face names."""

    format = "gguf"

    def __init__(self, source: Source) -> None:
        self.source = source
        self.file = GgufFile.open(source.path)
        self.metadata: dict[str, Value] = self.file.metadata
        self.config: dict[str, Any] = read_config(self.file)
        architecture = find_gguf_architecture(self.metadata.get("general.architecture"))
        self._names = NameMap.of(architecture, DecoderConfig.from_hf(self.config))
        self._entries: dict[str, TensorEntry] = {}
        for name, entry in self.file.tensors.items():
            if name != ROPE_FREQUENCIES:
                self._entries[self._names.to_hf(name)] = entry
        self._check()

    def _check(self) -> None:
        """Shapes and completeness: what the decoder would otherwise trip over, or index beyond."""
        for name in self._names.required():
            if name not in self._entries:
                raise FormatError(f"{self.source.path} has no tensor {self._names.to_gguf(name)}")
        for name, entry in self._entries.items():
            expected = self._names.shape(name)
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

    def modules(self) -> list[str]:
        return [
            name.removesuffix(".weight")
            for name, entry in self._entries.items()
            if entry.type.is_quantized
        ]

    def tensor_names(self) -> list[str]:
        return [name for name, entry in self._entries.items() if not entry.type.is_quantized]

    def has(self, name: str) -> bool:
        return name in self._entries

    def describe(self, name: str) -> Held:
        """A module or tensor by name; kinds are "float32" or a GGUF type such as "Q4_K"."""
        entry = self._entries.get(name) or self._entry(f"{name}.weight")
        if not entry.type.is_quantized:
            return Held(entry.shape, str(FLOAT_DTYPES[entry.type.name]).removeprefix("torch."))
        scheme = QuantScheme(4, BLOCK) if entry.type.name == "Q4_0" else None
        return Held(entry.shape, entry.type.name, scheme)

    def weight(self, module: str) -> Weight:
        """The weight of a linear or an embedding, rows in Hugging Face's order."""
        entry = self._entry(f"{module}.weight")
        order = self._names.row_order(module)
        rows = None if order is None else inverse_order(order)
        if not entry.type.is_quantized:
            values = self._values(entry)
            return DenseWeight(values if rows is None else values[rows])
        blocks = BlockWeight(self.file.data(entry.name), entry.shape[-1], find_codec(entry.type))
        weight: QuantizedWeight | BlockWeight = blocks
        if entry.type.name == "Q4_0":
            weight = unpack_q4_0(blocks)
        return weight if rows is None else weight.rows(rows)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its full name, in the dtype of the file; blocks as float32."""
        module, _, suffix = name.rpartition(".")
        entry = self._entry(name)
        if suffix == "weight" and len(entry.shape) == 2:
            weight = self.weight(module)
            return weight.values if isinstance(weight, DenseWeight) else weight.dequantize()
        values = self._values(entry)
        order = self._names.row_order(module)
        return values if order is None else values[inverse_order(order)]

    def _entry(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise FormatError(f"{self.source.path} has no tensor {name!r}")
        return entry

    def _values(self, entry: TensorEntry) -> Tensor:
        """A tensor's values in its own shape; a copy, since files do not align to elements."""
        data = self.file.data(entry.name).clone()
        return data.view(FLOAT_DTYPES[entry.type.name]).view(entry.shape)


def read_config(file: GgufFile) -> dict[str, Any]:
    """config.json from metadata and tensor infos."""
    metadata = file.metadata
    settings = Settings(metadata, str(file.path))
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise FormatError(
            f"{file.path} is one of {parts} parts",
            "join them first with llama.cpp's `gguf-split --merge`",
        )
    architecture = find_gguf_architecture(metadata.get("general.architecture"))
    prefix = architecture.gguf_name
    hidden = settings.whole(f"{prefix}.embedding_length")
    heads = settings.whole(f"{prefix}.attention.head_count")
    head_dim = settings.whole(f"{prefix}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = settings.whole(f"{prefix}.{key}", head_dim)
        if found != head_dim:
            raise UnsupportedModel(
                f"{file.path}: {prefix}.{key} is {found}, not the head dimension {head_dim}"
            )
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
    ends = end_of_generation_ids(metadata)
    config: dict[str, Any] = {
        "architectures": [_HF_CLASSES[architecture.model_type]],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": settings.whole(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.whole(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": settings.whole(f"{prefix}.context_length"),
        "rms_norm_eps": settings.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(file, settings, prefix, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "dtype": _dtype(file),
    }
    if architecture.model_type == "qwen2":
        config["use_sliding_window"] = False
    return config


def _rope_parameters(
    file: GgufFile, settings: Settings, prefix: str, head_dim: int
) -> dict[str, Any]:
    theta = settings.number(f"{prefix}.rope.freq_base", 10000.0)
    scaling = settings.get(f"{prefix}.rope.scaling.type", str, "none")
    if scaling == "linear":
        factor = settings.number(f"{prefix}.rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling != "none":
        raise UnsupportedModel(f"{file.path}: rope scaling {scaling!r} is not supported")
    entry = file.tensors.get(ROPE_FREQUENCIES)
    if entry is None:
        return {"rope_type": "default", "rope_theta": theta}
    if entry.type.name != "F32" or entry.shape != (head_dim // 2,):
        raise FormatError(
            f"{file.path}: {ROPE_FREQUENCIES} is {entry.type.name} {list(entry.shape)}, "
            f"not F32 [{head_dim // 2}]"
        )
    rope: Rope = rope_from_divisors(
        file.data(ROPE_FREQUENCIES).clone().view(torch.float32).view(-1), theta
    )
    if rope.kind == "default":
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }


def _dtype(file: GgufFile) -> str:
    """The dtype to run in: that of the dense matrices, bfloat16 where all are quantized."""
    found = {entry.type.name for entry in file.tensors.values() if len(entry.shape) > 1}
    names = [name for name in ("F16", "BF16", "F32") if name in found]
    if any(entry.type.is_quantized for entry in file.tensors.values()) or not names:
        return "bfloat16"
    return str(FLOAT_DTYPES[names[0]]).removeprefix("torch.")
