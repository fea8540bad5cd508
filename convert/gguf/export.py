"""An export's plan carried out: tensors streamed, slab by slab, into one file or several.

Memory is about one tensor. For dense sources the data section is that of llama.cpp's two steps
(convert, then llama-quantize on x86-64) without the file in between: same mix, same order, same
bits. An export that was killed goes on where it stopped (staging.py), with the same bytes: each
tensor's depend on the plan and the source alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.arch import find_family
from qtool.artifact import tool_versions
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import WeightReader
from qtool.convert.gguf.arrange import matrices, vector
from qtool.convert.gguf.blocks.codecs import quantize, slab_rows
from qtool.convert.gguf.blocks.legacy import pack_q4_0
from qtool.convert.gguf.import_ import FLOAT_DTYPES, GgufWeights
from qtool.convert.gguf.names import NameMap
from qtool.convert.gguf.parallel import run_in_order
from qtool.convert.gguf.parts import part_paths
from qtool.convert.gguf.plan import ExportPlan, PlannedTensor, derived_values
from qtool.convert.gguf.repack import repack, require_scales
from qtool.convert.gguf.sizes import Sizes
from qtool.convert.gguf.staging import ExportStage
from qtool.convert.gguf.writer import TensorInfo
from qtool.errors import QtoolError
from qtool.progress import bar, console
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight, Weight


class Written(NamedTuple):
    """The files, the first of which is the one to open, and what only the data could tell."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def write_gguf(
    plan: ExportPlan,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Written:
    """Write a model's files: `out`, or "<out's stem>-00001-of-00003.gguf" and so on.

    progress  called with the bytes of each slab that was written, and first with those that were
              there from an earlier run; None shows a bar on stderr
    check     called with the first file before it takes its name; raises where it is not as meant
    """
    targets = part_paths(out, len(plan.layouts))
    stage = ExportStage(out, targets, plan.layouts, _fingerprint(plan), force=force)
    with stage:
        if stage.finished:
            _say(f"{out.name}: {stage.finished} of {len(plan.tensors)} tensors are there already")
        try:
            if progress is not None:
                _stream(plan, stage, progress)
            else:
                total = sum(tensor.info.nbytes for tensor in plan.tensors)
                with bar(f"writing {out.name}", total) as shown:
                    _stream(plan, stage, shown.advance)
        except KeyboardInterrupt:
            _say(f"stopped after {stage.finished} tensors; the same command goes on from there")
            raise
        stage.complete()
        if check is not None:
            check(stage.first)
        stage.publish()
    notes = stage.notes
    if plan.prepared is not None:
        notes += plan.prepared.notes()
    return Written(targets, notes)


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _fingerprint(plan: ExportPlan) -> str:
    """A hash of all that the files' bytes depend on."""
    source = plan.reader.source.path
    if isinstance(plan.reader, GgufWeights):
        files = list(plan.reader.file.paths)
    else:
        tensors = Checkpoint.open(source).tensors.values()
        files = [source / "config.json", *sorted({info.file for info in tensors})]
    states = [(file.name, file.stat()) for file in files]
    facts = {
        "source": [(name, state.st_size, state.st_mtime_ns) for name, state in states],
        "how": [tensor.how for tensor in plan.tensors],
        "versions": tool_versions(),
        "prepared": None if plan.prepared is None else plan.prepared.identity(),
    }
    found = hashlib.sha256(json.dumps(facts).encode())
    for layout in plan.layouts:
        found.update(layout.header)
    for tensor in plan.tensors:
        if tensor.importance is not None:
            found.update(tensor.importance.contiguous().numpy().data)
    return found.hexdigest()


class _Slab(NamedTuple):
    info: TensorInfo
    data: Tensor


def _stream(plan: ExportPlan, stage: ExportStage, progress: Callable[[int], None]) -> None:
    names = NameMap.of(find_family(plan.reader.config), Sizes.of(plan.reader.config))
    prepared, start = plan.prepared, stage.finished
    notes: dict[str, list[str]] = {tensor.info.name: [] for tensor in plan.tensors}
    if start:
        progress(sum(tensor.info.nbytes for tensor in plan.tensors[:start]))

    def jobs() -> Iterator[Callable[[], _Slab]]:
        for number, tensor in enumerate(plan.tensors):
            if number < start:
                if prepared is not None:
                    prepared.recall(tensor, partial(stage.read, number))
                continue
            ready = None if prepared is None else prepared(tensor)
            if ready is None:
                yield from _jobs(tensor, plan.reader, names, notes[tensor.info.name])
            else:
                yield partial(_Slab, tensor.info, ready)

    for slab in run_in_order(jobs()):
        stage.write(slab.info, slab.data, notes[slab.info.name])
        progress(slab.data.numel())


def _jobs(
    tensor: PlannedTensor, reader: WeightReader, names: NameMap, notes: list[str]
) -> Iterator[Callable[[], _Slab]]:
    """The work on one tensor, a slab of rows at a time; its source is read when this begins."""
    if tensor.arranged is None:
        values = derived_values(reader, names.config)[tensor.info.name]
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
            notes += require_scales(module, weight, tensor.info.type.name)
        order = names.row_order(module)
        yield from _slabs(replace(tensor, importance=known), weight, order)


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
        return repack(part, tensor.info.type.name)
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
