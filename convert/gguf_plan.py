"""From GgufOptions to the plan of an export, with all that shapes it: types by hand, types for a
size, importance, search, files.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

from torch import Tensor

from qtool.arch import find_family
from qtool.convert.formats import WeightReader
from qtool.convert.gguf.arrange import matrices
from qtool.convert.gguf.blocks.codecs import can_write
from qtool.convert.gguf.imatrix import read_imatrix
from qtool.convert.gguf.mix import (
    MixOverrides,
    TypeChoice,
    explain,
    fixed_by_hand,
    is_quantizable,
)
from qtool.convert.gguf.names import NameMap
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.gguf.plan import DEFAULT_TYPE, ExportPlan, PlannedTensor, plan_export
from qtool.convert.gguf.sizes import Sizes
from qtool.convert.gguf.split import SplitLimits
from qtool.convert.gguf.target import FILE_TYPE_OF, Candidate, types_for_bits
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.convert.search import BestSearch
from qtool.errors import UnknownName, UsageError
from qtool.recipe import Calibration


def plan_gguf(reader: WeightReader, type: str | None, options: GgufOptions) -> ExportPlan:
    """The plan of an export with these options."""
    importance = None if options.imatrix is None else read_imatrix(options.imatrix)
    if importance is not None:
        importance = dataclasses.replace(importance, file=str(options.imatrix))
    overrides = mix_overrides(options)
    if options.target_bits is not None:
        base = plan_export(
            reader,
            type or DEFAULT_TYPE,
            pre=options.pre,
            overrides=overrides,
            importance=importance,
        )
        type, overrides = _for_bits(base, type, options.target_bits, overrides)
    limits = SplitLimits(
        options.split_max_bytes, options.split_max_tensors, options.no_tensor_first_split
    )
    plan = plan_export(
        reader, type, pre=options.pre, overrides=overrides, importance=importance, limits=limits
    )
    if options.search == "plain":
        return plan
    asked = {
        "num_samples": options.num_samples,
        "sequence_length": options.sequence_length,
        "seed": options.seed,
    }
    wanted = Calibration(
        options.calibration, **{name: value for name, value in asked.items() if value is not None}
    )
    search = BestSearch(plan, wanted, trust_remote_code=options.trust_remote_code)
    return dataclasses.replace(plan, prepared=search)


def _for_bits(
    base: ExportPlan, type: str | None, bits: float, overrides: MixOverrides
) -> tuple[str, MixOverrides]:
    """A file type, and a type by hand for each tensor that none was asked for.

    base  the plan without that, for what is quantized at all
    """
    reader = base.reader
    names = NameMap.of(find_family(reader.config), Sizes.of(reader.config))
    tied = all(tensor.info.name != "output.weight" for tensor in base.tensors)

    def candidate(tensor: PlannedTensor) -> Candidate:
        arranged = tensor.arranged
        assert arranged is not None, tensor.info.name

        def read() -> Tensor:
            first = next(matrices(arranged, reader, names))
            return first.dequantize()

        return Candidate(tensor.info.name, tensor.info.shape, read, tensor.importance)

    free, fixed_bytes = [], 0
    for tensor in base.tensors:
        rounded = tensor.how in ("quantize", "requantize")
        if rounded and not fixed_by_hand(tensor.info.name, overrides, tied=tied):
            free.append(candidate(tensor))
        else:
            fixed_bytes += tensor.info.nbytes
    found = types_for_bits(free, bits, fixed_bytes=fixed_bytes, num_weights=base.num_weights)
    patterns = tuple((f"^{re.escape(name)}$", chosen) for name, chosen in found.items())
    if type is None:
        frequent = Counter(found.values()).most_common(1)[0][0] if found else "Q4_K"
        type = FILE_TYPE_OF.get(frequent, frequent)
    return type, dataclasses.replace(overrides, by_pattern=(*overrides.by_pattern, *patterns))


def tensor_facts(plan: ExportPlan, options: GgufOptions) -> list[dict[str, Any]]:
    """A row for each tensor of a plan: what it will be, and why."""
    overrides = mix_overrides(options)
    tied = all(tensor.info.name != "output.weight" for tensor in plan.tensors)
    facts = []
    for tensor in plan.tensors:
        info = tensor.info
        choice = TypeChoice(info.type.name, tensor.wanted)
        if tensor.how in ("repack", "copy"):
            why = "as it is"
        elif not is_quantizable(info.name, info.shape, leave_output=overrides.leave_output):
            why = "never quantized"
        elif options.target_bits is not None and tensor.how in ("quantize", "requantize"):
            why = f"{options.target_bits:g} bits a weight"
        else:
            why = explain(plan.file_type, info.name, choice, overrides, tied=tied)
        facts.append(
            {
                "name": info.name,
                "shape": list(info.shape),
                "has": tensor.held.kind,
                "type": info.type.name,
                "bytes": info.nbytes,
                "how": tensor.how,
                "importance": tensor.importance is not None,
                "why": why,
                "fallback": tensor.reason,
            }
        )
    return facts


def mix_overrides(options: GgufOptions) -> MixOverrides:
    """The types that were fixed by hand."""
    patterns = []
    for text in options.tensor_types:
        pattern, equals, type = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--tensor-type {text!r} is not REGEX=TYPE", "such as 'ffn_down=Q6_K'")
        patterns.append((pattern, tensor_type(type)))
    return MixOverrides(
        output=None if options.output_type is None else tensor_type(options.output_type),
        embedding=None if options.embedding_type is None else tensor_type(options.embedding_type),
        by_pattern=tuple(patterns),
        pure=options.pure,
        leave_output=options.leave_output_tensor,
    )


def tensor_type(name: str) -> str:
    """A tensor type in its canonical spelling: "q4_k" is Q4_K."""
    known = [type for type in TENSOR_TYPES if can_write(type)]
    found = next((type for type in known if type.lower() == name.lower()), None)
    if found is None:
        raise UnknownName("GGUF tensor type that can be written", name, known)
    return found
