"""The key-value part of an exported file, in the order llama.cpp's two tools leave it.

The converter writes: general.*, the architecture's settings, general.file_type, what the family
adds, general.quantization_version, tokenizer.*. llama-quantize then takes quantization_version and
file_type out and appends them; so does this for quantized types.
"""

from __future__ import annotations

from qtool.arch import Architecture
from qtool.convert.formats import WeightReader
from qtool.convert.gguf.config_keys import settings_entries
from qtool.convert.gguf.container import KeyValue
from qtool.convert.gguf.imatrix import ImportanceMatrix
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.mix_rules import DEFAULT_TYPES
from qtool.convert.gguf.types import (
    ALIGNMENT_KEY,
    FILE_TYPES,
    QUANTIZATION_VERSION,
    TENSOR_TYPES,
    ValueType,
)
from qtool.convert.gguf.vocab_write import tokenizer_metadata

_FILE_TYPE = "general.file_type"
_VERSION = "general.quantization_version"
# llama-quantize passes texts on in a field of this size
_MAX_OVERRIDE_BYTES = 127


def export_entries(
    reader: WeightReader,
    architecture: Architecture,
    file_type: str,
    num_weights: int,
    pre: str | None,
    importance: ImportanceMatrix | None = None,
) -> list[KeyValue]:
    """All metadata of the file to be written."""
    kind = KeyValue(_FILE_TYPE, FILE_TYPES[file_type], ValueType.UINT32)
    version = KeyValue(_VERSION, QUANTIZATION_VERSION, ValueType.UINT32)
    origin = [] if importance is None else _importance_entries(importance)
    if isinstance(reader, GgufWeights):
        replaced = {entry.key for entry in origin}
        kept = [entry for entry in _kept(reader) if entry.key not in replaced]
        return [*kept, version, kind, *origin]
    head = [
        KeyValue("general.architecture", architecture.gguf_name, ValueType.STRING),
        KeyValue("general.type", "model", ValueType.STRING),
        KeyValue("general.name", reader.source.short_name, ValueType.STRING),
        KeyValue("general.size_label", size_label(num_weights), ValueType.STRING),
    ]
    settings, extra = settings_entries(reader.config)
    tokenizer = tokenizer_metadata(reader.source.path, reader.config, pre)
    if TENSOR_TYPES[DEFAULT_TYPES[file_type]].is_quantized:
        return [*head, *settings, *extra, *tokenizer, version, kind, *origin]
    return [*head, *settings, kind, *extra, version, *tokenizer]


def _importance_entries(importance: ImportanceMatrix) -> list[KeyValue]:
    """Which importance matrix a file was made with, as llama-quantize notes it."""
    entries = []
    texts = {"file": importance.file, "dataset": next(iter(importance.datasets), None)}
    for key, text in texts.items():
        if text is not None:
            cut = text.encode("utf-8", "surrogateescape")[:_MAX_OVERRIDE_BYTES]
            value = cut.decode("utf-8", "surrogateescape")
            entries.append(KeyValue(f"quantize.imatrix.{key}", value, ValueType.STRING))
    count = len(importance.entries)
    entries.append(KeyValue("quantize.imatrix.entries_count", count, ValueType.UINT32))
    if importance.chunk_count > 0:
        chunks = importance.chunk_count
        entries.append(KeyValue("quantize.imatrix.chunks_count", chunks, ValueType.UINT32))
    return entries


def _kept(reader: GgufWeights) -> list[KeyValue]:
    """A GGUF source's own entries, but for those that describe how it was stored."""
    return [
        entry
        for entry in reader.file.entries
        if entry.key not in (_FILE_TYPE, _VERSION, ALIGNMENT_KEY)
        and not entry.key.startswith("split.")
    ]


def size_label(num_weights: int) -> str:
    """A model's size in two digits, as in file names: 7343360 -> "7.3M", 494032768 -> "494M"."""
    steps = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    limit, suffix = next((step for step in steps if num_weights > step[0]), steps[-1])
    scaled = num_weights / limit
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{suffix}"
