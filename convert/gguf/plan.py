"""An export to GGUF decided from headers: every tensor's type, and how its bytes come about.

    copy        already held as it will be
    cast        another floating type
    repack      codes kept, of integers and of 4-bit floats (repack.py)
    quantize    rounded for the first time
    requantize  rounded again; the plan warns
    decode      a quantized weight written out in a floating type

No weight is read for a plan, and all sizes in it are exact. export.py carries it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from qtool.arch import find_family
from qtool.convert.formats import Held, WeightReader
from qtool.convert.gguf.arrange import Arranged, arrange
from qtool.convert.gguf.blocks.codecs import can_write
from qtool.convert.gguf.imatrix import ImportanceMatrix
from qtool.convert.gguf.import_ import FLOAT_DTYPES, GgufWeights
from qtool.convert.gguf.metadata import export_entries
from qtool.convert.gguf.mix import (
    MixOverrides,
    TypeChoice,
    choose_types,
    file_order,
    fixed_by_hand,
    require_importance,
)
from qtool.convert.gguf.mix_rules import DEFAULT_TYPES, MixModel
from qtool.convert.gguf.names import NameMap
from qtool.convert.gguf.repack import CODE_TYPES, code_type
from qtool.convert.gguf.ropes import DERIVED_TENSORS, derived_tensors
from qtool.convert.gguf.sizes import Sizes
from qtool.convert.gguf.split import SplitLimits, split_layouts
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.convert.gguf.writer import GgufLayout, TensorInfo
from qtool.errors import QtoolError, UnknownName

How = Literal["copy", "cast", "repack", "quantize", "requantize", "decode"]

# What an importance matrix can help. Rows of the embedding are looked up, not multiplied: a value
# that a matrix has for it is ignored, as by llama-quantize.
_ROUNDED = ("quantize", "requantize")
_EMBEDDING = "token_embd.weight"
_FLOAT_TYPES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOAT_DTYPES.items()}

# The file's type where none is asked for and no type has the model's codes.
DEFAULT_TYPE = "Q4_K_M"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file.

    source  its Hugging Face name, None for one that is computed from the config; the first expert's
            of a stack
    held    what the source holds
    wanted  the type it would have if its rows were whole blocks of that type
    importance  [matrices * columns] float32, mean squared input of each column, where that is known
    arranged    how it is made of the source's tensors
    """

    info: TensorInfo
    source: str | None
    held: Held
    how: How
    wanted: str
    importance: Tensor | None = field(default=None, compare=False)
    arranged: Arranged | None = None

    @property
    def reason(self) -> str | None:
        """Why it has another type than the mix wanted."""
        if self.wanted == self.info.type.name:
            return None
        block = TENSOR_TYPES[self.wanted].block_size
        return f"rows of {self.info.shape[-1]} are not whole blocks of {block} for {self.wanted}"


class Prepared(Protocol):
    """A maker of bytes that knows more than a tensor's values."""

    def __call__(self, tensor: PlannedTensor) -> Tensor | None:
        """Bytes, uint8 [rows, row_bytes], or None; called for each tensor in the file's order."""

    def recall(self, tensor: PlannedTensor, read: Callable[[], Tensor]) -> None:
        """In place of the call where an earlier run has written the tensor: how to read it."""

    def identity(self) -> Mapping[str, Any]:
        """What its bytes depend on beside the plan, for JSON."""

    def notes(self) -> tuple[str, ...]:
        """What came of it, when the file is written."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """All files of a model, decided. `nbytes` is exact.

    layouts   of the files, which share the tensors out in order; one where it is not split
    prepared  makes some tensors' bytes, in place of what their `how` says
    """

    reader: WeightReader
    file_type: str
    tensors: tuple[PlannedTensor, ...]
    layouts: tuple[GgufLayout, ...]
    warnings: tuple[str, ...]
    prepared: Prepared | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def num_weights(self) -> int:
        return sum(tensor.info.rows * tensor.info.shape[-1] for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(tensor.info.nbytes for tensor in self.tensors) / self.num_weights

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.reason is not None)

    def counts(self) -> Mapping[str, int]:
        """Tensors of each type, the most frequent first."""
        return dict(Counter(tensor.info.type.name for tensor in self.tensors).most_common())


class _Source(NamedTuple):
    """A tensor of the model under GGUF's name."""

    gguf: str
    arranged: Arranged

    @property
    def held(self) -> Held:
        return self.arranged.held

    @property
    def is_dense(self) -> bool:
        return self.held.is_plain

    @property
    def repacks_to(self) -> str | None:
        """The type whose codes it has already, or None."""
        return code_type(self.held)


def plan_export(
    reader: WeightReader,
    type: str | None = None,
    *,
    pre: str | None = None,
    overrides: MixOverrides | None = None,
    importance: ImportanceMatrix | None = None,
    limits: SplitLimits | None = None,
) -> ExportPlan:
    """Decide a whole export without reading weights.

    type  a file type such as "Q4_K_M"; None keeps codes where a type has them (Q4_0, Q4_1, Q8_0,
          MXFP4), and makes Q4_K_M of everything else
    pre   tokenizer.ggml.pre, where the tokenizer's is not recognized
    overrides   types that were fixed by hand
    importance  decides some types and, for each weight that it knows, how it is rounded
    limits      of each file, where the model is to be in several
    """
    architecture = find_family(reader.config)
    config = Sizes.of(reader.config)
    names = NameMap.of(architecture, config)
    sources = [_Source(name, tensor) for name, tensor in arrange(reader, names).items()]
    own = {source.repacks_to for source in sources}
    kept = next((kept for kept in CODE_TYPES if kept in own), None)
    keep_codes = type is None and kept is not None
    file_type = _writable(type or CODE_TYPES.get(kept or "", DEFAULT_TYPE))
    shapes = {source.gguf: source.held.shape for source in sources}
    model = MixModel(
        architecture.gguf_name,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        num_experts=config.num_experts,
        has_importance=importance is not None,
    )
    choices = choose_types(file_type, shapes, model, overrides)
    require_importance(file_type, choices, () if importance is None else importance.entries)
    by_name = {source.gguf: source for source in sources}
    tied = "output.weight" not in by_name
    tensors = []
    derived = derived_values(reader, config)
    for name in file_order([*by_name, *derived]):
        if name in derived:
            shape = tuple(derived[name].shape)
            info = TensorInfo(name, shape, TENSOR_TYPES["F32"])
            tensors.append(PlannedTensor(info, None, Held(shape, "float32"), "copy", "F32"))
            continue
        source = by_name[name]
        choice = choices.get(name)
        if choice is None and name == "output.weight":  # left alone, as asked for
            kind = _FLOAT_TYPES.get(source.held.kind, "F16")
            choice = TypeChoice(kind, kind)
        elif choice is None:  # norms and biases, which the converter writes as F32
            choice = TypeChoice("F32", "F32")
        elif not fixed_by_hand(name, overrides or MixOverrides(), tied=tied):
            choice = _keep_codes(source, file_type, choice, keep_all=keep_codes)
        tensors.append(_plan_tensor(source, choice, importance))
    num_weights = sum(_count(tensor) for tensor in tensors)
    entries = export_entries(reader, architecture, file_type, num_weights, pre, importance)
    infos = [tensor.info for tensor in tensors]
    layouts = split_layouts(entries, infos, limits or SplitLimits())
    warnings = _warnings(tensors, config)
    if importance is not None:
        warnings += _importance_warnings(tensors, importance)
    return ExportPlan(reader, file_type, tuple(tensors), layouts, warnings)


def _writable(name: str) -> str:
    """The file type, checked to be one whose default type can be written."""
    aliases = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's
    known = [file_type for file_type, default in DEFAULT_TYPES.items() if can_write(default)]
    wanted = aliases.get(name.upper(), name).lower()
    found = next((file_type for file_type in known if file_type.lower() == wanted), None)
    if found is None:
        raise UnknownName("writable GGUF type", name, known)
    return found


def _keep_codes(
    source: _Source, file_type: str, choice: TypeChoice, *, keep_all: bool
) -> TypeChoice:
    """Where the file type is that of the source's codes, keep them, whatever the mix says.

    keep_all  the type was not asked for but follows from the model's codes: other codes stay too,
              and linears that were left in 16 bit get 8, not 4
    """
    type = source.repacks_to
    if type is not None and (DEFAULT_TYPES[file_type] == type or keep_all):
        return TypeChoice(type, type)
    in_block = source.gguf.startswith("blk.")
    if keep_all and in_block and source.is_dense:
        fits = source.held.shape[-1] % TENSOR_TYPES["Q8_0"].block_size == 0
        return TypeChoice("Q8_0" if fits else "F16", "Q8_0")
    return choice


def _plan_tensor(
    source: _Source, choice: TypeChoice, importance: ImportanceMatrix | None
) -> PlannedTensor:
    if not can_write(choice.type):
        raise QtoolError(
            f"{source.gguf} would have the type {choice.type}, which cannot be written",
            "choose another --type",
        )
    info = TensorInfo(source.gguf, source.held.shape, TENSOR_TYPES[choice.type])
    how = _how(source, choice.type)
    known = None
    if importance is not None and how in _ROUNDED and source.gguf != _EMBEDDING:
        shape = source.held.shape
        known = importance.vector(source.gguf, shape[-1] * (shape[0] if len(shape) == 3 else 1))
    arranged = source.arranged
    return PlannedTensor(info, arranged.parts[0], source.held, how, choice.wanted, known, arranged)


def _how(source: _Source, type: str) -> How:
    if source.is_dense:
        if TENSOR_TYPES[type].is_quantized:
            return "quantize"
        same = source.held.kind == str(FLOAT_DTYPES[type]).removeprefix("torch.")
        return "copy" if same and not source.arranged.offset else "cast"
    if source.held.kind == type:
        return "copy"
    if source.repacks_to == type:
        return "repack"
    return "requantize" if TENSOR_TYPES[type].is_quantized else "decode"


def derived_values(reader: WeightReader, config: Sizes) -> dict[str, Tensor]:
    """Tensors that follow from config.json; a GGUF source's own, where it has them."""
    if isinstance(reader, GgufWeights):
        present = [name for name in DERIVED_TENSORS if name in reader.file.tensors]
        return {
            name: reader.file.data(name).clone().view(torch.float32).view(-1) for name in present
        }
    return derived_tensors(reader.config, config.head_dim)


def _count(tensor: PlannedTensor) -> int:
    return tensor.info.rows * tensor.info.shape[-1]


def _warnings(tensors: list[PlannedTensor], config: Sizes) -> tuple[str, ...]:
    warnings = []
    again = [tensor for tensor in tensors if tensor.how == "requantize"]
    if again:
        kinds = ", ".join(sorted({tensor.held.kind for tensor in again}))
        warnings.append(
            f"{len(again)} tensors are quantized already ({kinds}) and are rounded a second time; "
            "convert the original model, or choose the type that keeps their codes"
        )
    reasons = Counter((t.reason, t.info.type.name) for t in tensors if t.reason is not None)
    warnings += [f"{count} tensors are {type}: {why}" for (why, type), count in reasons.items()]
    if config.lost_window is not None:
        warnings.append(
            f"GGUF's architecture has no sliding window ({config.lost_window} here): "
            "beyond it the file attends to more than the model did"
        )
    return tuple(warnings)


def _importance_warnings(
    tensors: list[PlannedTensor], importance: ImportanceMatrix
) -> tuple[str, ...]:
    rounded = [t.info.name for t in tensors if t.how in _ROUNDED and t.info.name != _EMBEDDING]
    missing = [name for name in rounded if name not in importance.entries]
    if not missing:
        return ()
    if len(missing) == len(rounded):
        return ("the importance matrix knows none of this model's weights",)
    return (f"the importance matrix has nothing on {', '.join(missing)}: rounded without",)
