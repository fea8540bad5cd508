"""A model into one GGUF file, in one step: plan everything from headers, then stream the tensors.

`plan_export` decides each tensor's type and how its bytes come about, before any weight is read:

    copy        already held as it will be
    cast        another floating type
    repack      integer codes kept: symmetric int2 to int4 is Q4_0, symmetric int5 to int8 is Q8_0,
                and int2 to int4 with zero points is Q4_1 but for the rounding of its minima
    quantize    rounded for the first time
    requantize  rounded again; the plan warns
    decode      a quantized weight written out in a floating type

`write_gguf` carries it out slab by slab; memory is about one tensor. For dense sources the data
section is that of llama.cpp's two steps (convert, then llama-quantize on x86-64) without the file
in between: same mix, same order, same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from qtool.arch import find_family
from qtool.convert.formats import Held, WeightReader
from qtool.convert.gguf.arrange import Arranged, arrange, matrices, vector
from qtool.convert.gguf.blocks.codecs import can_write, quantize, slab_rows
from qtool.convert.gguf.blocks.legacy import (
    half_scale_error,
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    repack_type,
)
from qtool.convert.gguf.imatrix import ImportanceMatrix
from qtool.convert.gguf.import_ import FLOAT_DTYPES, GgufWeights
from qtool.convert.gguf.metadata import export_entries
from qtool.convert.gguf.mix import (
    DEFAULT_TYPES,
    MixModel,
    MixOverrides,
    TypeChoice,
    choose_types,
    file_order,
    find_file_type,
    require_importance,
)
from qtool.convert.gguf.names import NameMap
from qtool.convert.gguf.parallel import run_in_order
from qtool.convert.gguf.ropes import DERIVED_TENSORS, derived_tensors
from qtool.convert.gguf.sizes import Sizes
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
from qtool.errors import QtoolError, UnknownName
from qtool.progress import bar
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight, Weight

How = Literal["copy", "cast", "repack", "quantize", "requantize", "decode"]

# What an importance matrix can help. Rows of the embedding are looked up, not multiplied: a value
# that a matrix has for it is ignored, as by llama-quantize.
_ROUNDED = ("quantize", "requantize")
_EMBEDDING = "token_embd.weight"
_FLOAT_TYPES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOAT_DTYPES.items()}

# Types that keep integer codes: the first that a model has codes for is its file's type, where
# none is asked for; DEFAULT_TYPE where it has none.
PACKERS = {"Q4_0": pack_q4_0, "Q4_1": pack_q4_1, "Q8_0": pack_q8_0}
DEFAULT_TYPE = "Q4_K_M"
# A scale may move by half precision's rounding where repacking needs it; more is not repacking.
MAX_SCALE_ERROR = 2.0**-10


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

    def notes(self) -> tuple[str, ...]:
        """What came of it, when the file is written."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A whole file, decided. `nbytes` is exact.

    prepared  makes some tensors' bytes, in place of what their `how` says
    """

    reader: WeightReader
    file_type: str
    tensors: tuple[PlannedTensor, ...]
    layout: GgufLayout
    warnings: tuple[str, ...]
    prepared: Prepared | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

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
        scheme = self.held.scheme
        return None if scheme is None else repack_type(scheme, self.held.shape[-1])


def plan_export(
    reader: WeightReader,
    type: str | None = None,
    *,
    pre: str | None = None,
    overrides: MixOverrides | None = None,
    importance: ImportanceMatrix | None = None,
) -> ExportPlan:
    """Decide a whole GGUF file without reading weights.

    type  a file type such as "Q4_K_M"; None keeps integer codes where a type has them (Q4_0, Q4_1,
          Q8_0), and makes Q4_K_M of everything else
    pre   tokenizer.ggml.pre, where the tokenizer's is not recognized
    overrides   types that were fixed by hand
    importance  decides some types and, for each weight that it knows, how it is rounded
    """
    architecture = find_family(reader.config)
    config = Sizes.of(reader.config)
    names = NameMap.of(architecture, config)
    sources = [_Source(name, tensor) for name, tensor in arrange(reader, names).items()]
    own = {source.repacks_to for source in sources}
    kept = next((kept for kept in PACKERS if kept in own), None)
    keep_codes = type is None and kept is not None
    file_type = _writable(type or kept or DEFAULT_TYPE)
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
    tensors = []
    derived = _derived(reader, config)
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
        else:
            choice = _keep_codes(source, file_type, choice, keep_all=keep_codes)
        tensors.append(_plan_tensor(source, choice, importance))
    num_weights = sum(_count(tensor) for tensor in tensors)
    entries = export_entries(reader, architecture, file_type, num_weights, pre, importance)
    layout = GgufLayout.of(entries, [tensor.info for tensor in tensors])
    warnings = _warnings(tensors, config)
    if importance is not None:
        warnings += _importance_warnings(tensors, importance)
    return ExportPlan(reader, file_type, tuple(tensors), layout, warnings)


def _writable(name: str) -> str:
    """The file type, checked to be one whose default type can be written."""
    aliases = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's
    known = [file_type for file_type, default in DEFAULT_TYPES.items() if can_write(default)]
    file_type = find_file_type(aliases.get(name.upper(), name))
    if file_type not in known:
        raise UnknownName("GGUF type that can be written", name, known)
    return file_type


def _keep_codes(
    source: _Source, file_type: str, choice: TypeChoice, *, keep_all: bool
) -> TypeChoice:
    """Where the file type is that of the source's codes, keep them, whatever the mix says.

    keep_all  the type was not asked for but follows from the model's codes: other codes stay too,
              and linears that were left in 16 bit get 8, not 4
    """
    type = source.repacks_to
    if type is not None and (file_type == type or keep_all):
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


def _derived(reader: WeightReader, config: Sizes) -> dict[str, Tensor]:
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


def write_gguf(
    plan: ExportPlan,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Write the file; returns what only the data could tell: rounded scales, tensor by tensor.

    progress  called with the bytes of each slab that was written; None shows a bar on stderr
    """
    notes: list[str] = []
    with GgufWriter(out, plan.layout, force=force) as writer:
        if progress is not None:
            _stream(plan, writer, notes, progress)
        else:
            with bar(f"writing {out.name}", plan.nbytes) as shown:
                _stream(plan, writer, notes, shown.advance)
    if plan.prepared is not None:
        notes += plan.prepared.notes()
    return tuple(notes)


class _Slab(NamedTuple):
    info: TensorInfo
    data: Tensor


def _stream(
    plan: ExportPlan,
    writer: GgufWriter,
    notes: list[str],
    progress: Callable[[int], None],
) -> None:
    names = NameMap.of(find_family(plan.reader.config), Sizes.of(plan.reader.config))

    def jobs() -> Iterator[Callable[[], _Slab]]:
        for tensor in plan.tensors:
            ready = None if plan.prepared is None else plan.prepared(tensor)
            if ready is None:
                yield from _jobs(tensor, plan.reader, names, notes)
            else:
                yield partial(_Slab, tensor.info, ready)

    for slab in run_in_order(jobs()):
        writer.write(slab.info, slab.data)
        progress(slab.data.numel())


def _jobs(
    tensor: PlannedTensor, reader: WeightReader, names: NameMap, notes: list[str]
) -> Iterator[Callable[[], _Slab]]:
    """The work on one tensor, a slab of rows at a time; its source is read when this begins."""
    if tensor.arranged is None:
        values = _derived(reader, names.config)[tensor.info.name]
        yield lambda: _Slab(tensor.info, _encode(tensor, values))
        return
    arranged = tensor.arranged
    if arranged.is_vector:
        values = vector(arranged, reader, names)
        yield lambda: _Slab(tensor.info, _encode(tensor, values))
        return
    columns = tensor.info.shape[-1]
    for number, weight in enumerate(matrices(arranged, reader, names)):
        known = tensor.importance
        if known is not None and known.numel() > columns:
            known = known[number * columns : (number + 1) * columns]
        module = arranged.parts[min(number, len(arranged.parts) - 1)].rpartition(".")[0]
        if tensor.how == "repack":
            assert isinstance(weight, QuantizedWeight), type(weight)
            notes += _repack_notes(module, weight, tensor.info.type.name)
        order = names.row_order(module)
        yield from _slabs(replace(tensor, importance=known), weight, order)


def _repack_notes(module: str, weight: QuantizedWeight, type: str) -> list[str]:
    error = half_scale_error(weight)
    if error > MAX_SCALE_ERROR:
        raise QtoolError(
            f"{module}: half precision changes its scales by {error:.2g} of them, "
            f"so {type} cannot hold it",
            "choose a --type that quantizes again, such as Q4_K_M",
        )
    if error == 0:
        return []
    return [f"{module}: scales rounded to half precision, by up to {error:.2g} of one"]


def _slabs(
    tensor: PlannedTensor, weight: Weight, order: Tensor | None
) -> Iterator[Callable[[], _Slab]]:
    num_rows = weight.shape[0]
    height = slab_rows(tensor.info.shape[-1])
    for begin in range(0, num_rows, height):
        end = min(begin + height, num_rows)
        rows = torch.arange(begin, end) if order is None else order[begin:end]

        def job(rows: Tensor = rows) -> _Slab:
            return _Slab(tensor.info, _encode_rows(tensor, weight, rows))

        yield job


def _encode_rows(tensor: PlannedTensor, weight: Weight, rows: Tensor) -> Tensor:
    """The bytes of some rows of a weight, uint8 [rows, row_bytes]."""
    if isinstance(weight, DenseWeight):
        return _encode(tensor, weight.values[rows])
    part = weight.rows(rows)
    if tensor.how == "repack":
        assert isinstance(part, QuantizedWeight), type(part)
        return PACKERS[tensor.info.type.name](part, max_scale_error=MAX_SCALE_ERROR)
    if tensor.how == "copy":
        # a Q4_0 block weight comes out of a GGUF reader as codes: the same bytes again
        if isinstance(part, QuantizedWeight):
            return pack_q4_0(part)
        assert isinstance(part, BlockWeight), type(part)
        return part.data
    return _encode(tensor, part.dequantize())


def _encode(tensor: PlannedTensor, values: Tensor) -> Tensor:
    """The bytes of dense values in the planned type; refuses NaN and infinities, new ones too."""
    type = tensor.info.type
    rows = values.float().view(-1, values.shape[-1])
    finite = rows if type.name != "F16" else rows.half()
    if not bool(finite.isfinite().all()):
        if bool(rows.isfinite().all()):
            raise QtoolError(
                f"{tensor.info.name} has values of {float(rows.abs().max()):g}, too large for F16",
                "choose --type BF16",
            )
        raise QtoolError(f"{tensor.info.name} has NaN or infinite values in the source")
    if not type.is_quantized:
        return rows.to(FLOAT_DTYPES[type.name]).view(torch.uint8)
    return quantize(type.name, rows, tensor.importance)
