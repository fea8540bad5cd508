"""What a model file or folder holds, from its headers: for `qtool inspect`.

Nothing is run and no weight is decoded, so this works on models of any family, of formats that
nothing else here reads, on files of a vocabulary alone, and on single shards. What is said of bits
is counted from the bytes of the tensors, scales and tables included, and never taken from a name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.artifact import MANIFEST_NAME, Manifest
from qtool.checkpoint import Checkpoint, TensorInfo, read_safetensors_header
from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.parts import open_parts
from qtool.convert.gguf.sentencepiece import SentencePieceModel
from qtool.convert.gguf.types import FILE_TYPES, ValueType
from qtool.convert.huggingface import CheckpointWeights
from qtool.errors import FormatError, QtoolError, UnsupportedModel
from qtool.json_files import read_json
from qtool.source import Source

# Settings that say how large a model is, under the names that families give them.
SIZES = {
    "blocks": ("num_hidden_layers", "n_layer", "num_layers", "block_count"),
    "hidden": ("hidden_size", "n_embd", "d_model", "embedding_length"),
    "heads": ("num_attention_heads", "n_head", "attention.head_count"),
    "kv heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head dim": ("head_dim", "attention.key_length"),
    "ffn": ("intermediate_size", "n_inner", "feed_forward_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "expert_count"),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "context_length"),
    "rope theta": ("rope_theta", "rope.freq_base"),
}
# Longer values are shown by their length and beginning.
LONG_ARRAY, SHOWN_ELEMENTS = 8, 3


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor, or a packed linear with all that belongs to it. `nbytes` is what it takes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Stored bits a weight, everything included."""
        return 8 * self.nbytes / max(1, self.num_weights)


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that is said of a model.

    format        "gguf", "dense", "compressed-tensors", ... or the quant_method that is not read
    architecture  its family, or "" where the file does not say
    sizes         "blocks": 28, ...: what of SIZES is there
    file_bytes    of all weight files
    tokenizer     kind, tokens, bos, eos, chat template; empty where there is none
    metadata      the file's own: a GGUF's keys, or config.json's
    origin        what qtool.json says, empty where there is none
    notes         what could not be told, and why
    """

    path: Path
    format: str
    architecture: str
    sizes: Mapping[str, Any]
    file_bytes: int
    tensors: tuple[TensorRow, ...]
    tokenizer: Mapping[str, Any]
    metadata: Mapping[str, Any]
    origin: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def num_weights(self) -> int:
        return sum(tensor.num_weights for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.tensor_bytes / self.num_weights if self.num_weights else None

    def by_kind(self) -> list[tuple[str, list[TensorRow]]]:
        """Tensors of each kind, the kind with the most bytes first."""
        kinds: dict[str, list[TensorRow]] = {}
        for tensor in self.tensors:
            kinds.setdefault(tensor.kind, []).append(tensor)
        return sorted(kinds.items(), key=lambda item: -sum(row.nbytes for row in item[1]))


def inspect_path(path: Path) -> Inspection:
    """Look at a model folder, a GGUF file, or one safetensors file."""
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise FormatError(f"there is nothing at {path}", "name a model folder or a model file")
    if path.suffix == ".safetensors":
        return _one_file(path)
    return _gguf(path)


def _folder(path: Path) -> Inspection:
    notes: list[str] = []
    try:
        reader = CheckpointWeights.open(Source(path.name, path))
        checkpoint, config, form = reader.checkpoint, reader.config, reader.format
        rows = [*_packed_rows(reader), *map(_row, _plain(reader))]
    except (UnsupportedModel, FormatError) as error:
        checkpoint = Checkpoint.open(path)
        config = checkpoint.config
        form = _declared_method(config) or "unknown"
        rows = [_row(info) for info in checkpoint.tensors.values()]
        notes.append(f"its packing cannot be told: {error.message}")
    files = {info.file for info in checkpoint.tensors.values()}
    architectures = config.get("architectures")
    family = str(config.get("model_type") or "")
    if isinstance(architectures, list) and architectures:
        family = f"{architectures[0]} ({family})" if family else str(architectures[0])
    try:
        tokenizer = _folder_tokenizer(path)
    except QtoolError as error:
        tokenizer = {}
        notes.append(f"its tokenizer cannot be told: {error.message}")
    return Inspection(
        path=path,
        format=form,
        architecture=family,
        sizes=_sizes(_flat_config(config)),
        file_bytes=sum(file.stat().st_size for file in files),
        tensors=tuple(rows),
        tokenizer=tokenizer,
        metadata=checkpoint.config,
        origin=_origin(path, notes),
        notes=tuple(notes),
    )


def _packed_rows(reader: CheckpointWeights) -> Iterable[TensorRow]:
    for module in reader.modules():
        held = reader.describe(module)
        nbytes = sum(info.nbytes for info in reader.parts(module))
        yield TensorRow(module, held.shape, held.kind, nbytes)


def _plain(reader: CheckpointWeights) -> Iterable[TensorInfo]:
    return (reader.checkpoint.tensors[name] for name in reader.tensor_names())


def _row(info: TensorInfo) -> TensorRow:
    return TensorRow(info.name, info.shape, str(info.dtype).removeprefix("torch."), info.nbytes)


def _declared_method(config: Mapping[str, Any]) -> str | None:
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return method if isinstance(method, str) else None


def _flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the settings of its text model and of its rope at the top."""
    flat = dict(config)
    for key in ("text_config", "rope_parameters", "rope_scaling"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            flat = {**inner, **flat}
    return flat


def _sizes(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, keys in SIZES.items():
        values = [settings[prefix + key] for key in keys if settings.get(prefix + key) is not None]
        if values and isinstance(values[0], int | float) and not isinstance(values[0], bool):
            found[name] = values[0]
    return found


def _folder_tokenizer(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if (path / "tokenizer.json").is_file():
        content = read_json(path / "tokenizer.json")
        model, added = content.get("model"), content.get("added_tokens")
        if isinstance(model, Mapping):
            facts["kind"] = str(model.get("type"))
            vocabulary = model.get("vocab")
            known = len(vocabulary) if isinstance(vocabulary, Mapping | list) else 0
            names = vocabulary if isinstance(vocabulary, Mapping) else {}
            extra = [
                token
                for token in (added if isinstance(added, list) else [])
                if isinstance(token, Mapping) and token.get("content") not in names
            ]
            facts["tokens"] = known + len(extra)
    elif (path / "tokenizer.model").is_file():
        facts["kind"] = "SentencePiece (tokenizer.model)"
        with suppress(QtoolError):  # kinds that are not read have no more to tell
            facts["tokens"] = len(SentencePieceModel.open(path / "tokenizer.model").pieces)
    if not facts:
        return {}
    settings: dict[str, Any] = {}
    if (path / "tokenizer_config.json").is_file():
        settings = read_json(path / "tokenizer_config.json")
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        facts[name] = token.get("content") if isinstance(token, Mapping) else token
    template = settings.get("chat_template") or (path / "chat_template.jinja").is_file()
    facts["chat template"] = bool(template)
    return facts


def _origin(path: Path, notes: list[str]) -> dict[str, Any]:
    if not (path / MANIFEST_NAME).is_file():
        return {}
    try:
        manifest = Manifest.load(path)
    except FormatError as error:
        notes.append(error.message)
        return {}
    recipe = manifest.recipe or {}
    facts = {
        "source": manifest.source,
        "revision": manifest.source_revision,
        "recipe": recipe.get("name"),
        "qtool": manifest.versions.get("qtool"),
        "warnings": list(manifest.warnings),
    }
    return {key: value for key, value in facts.items() if value}


def _one_file(path: Path) -> Inspection:
    rows = tuple(_row(info) for info in read_safetensors_header(path).values())
    note = "one file without a config.json: packed linears are shown as the tensors they are"
    return Inspection(path, "safetensors", "", {}, path.stat().st_size, rows, {}, {}, {}, (note,))


def _gguf(path: Path) -> Inspection:
    notes: list[str] = []
    try:
        file = open_parts(path)
    except FormatError as error:
        file = GgufFile.open(path)  # a part by itself still has much to tell
        notes.append(error.message)
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    family = architecture if isinstance(architecture, str) else ""
    rows = tuple(
        TensorRow(entry.name, entry.shape, entry.type.name, entry.nbytes)
        for entry in file.tensors.values()
    )
    sizes = _sizes(metadata, f"{family}.")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        sizes.setdefault("vocabulary", len(tokens))
    number = metadata.get("general.file_type")
    file_type = next((name for name, id_ in FILE_TYPES.items() if id_ == number), None)
    if not rows:
        notes.append("it holds no weights")
    elif len(file.paths) > 1:
        notes.append(f"it is in {len(file.paths)} files, all of them counted")
    return Inspection(
        path=path,
        format=f"gguf v{file.version}" + (f", {file_type}" if file_type and rows else ""),
        architecture=family,
        sizes=sizes,
        file_bytes=sum(part.stat().st_size for part in file.paths),
        tensors=rows,
        tokenizer=_gguf_tokenizer(metadata),
        metadata={entry.key: _shortened(entry) for entry in file.entries},
        origin={},
        notes=tuple(notes),
    )


def _gguf_tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind is None:
        return {}
    facts: dict[str, Any] = {"kind": str(kind)}
    if pre := metadata.get("tokenizer.ggml.pre"):
        facts["pre"] = str(pre)
    if isinstance(tokens, list):
        facts["tokens"] = len(tokens)
        for name in ("bos", "eos"):
            number = metadata.get(f"tokenizer.ggml.{name}_token_id")
            known = isinstance(number, int) and 0 <= number < len(tokens)
            facts[name] = tokens[number] if isinstance(number, int) and known else None
    facts["chat template"] = "tokenizer.chat_template" in metadata
    return facts


def _shortened(entry: KeyValue) -> Any:
    """A value as it is, or a long array as its type, length and beginning."""
    if entry.type is not ValueType.ARRAY or not isinstance(entry.value, list):
        return entry.value
    if len(entry.value) <= LONG_ARRAY:
        return entry.value
    element = "?" if entry.element is None else entry.element.name.lower()
    return {
        "array_of": element,
        "length": len(entry.value),
        "begins": entry.value[:SHOWN_ELEMENTS],
    }
