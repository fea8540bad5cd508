"""What `qtool convert --to gguf` can be told beside a type, and the plan that follows from it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qtool.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from qtool.convert.formats import WeightReader
    from qtool.convert.gguf.export import ExportPlan
    from qtool.convert.gguf.imatrix import ImportanceMatrix
    from qtool.convert.gguf.mix import MixOverrides

SEARCHES = ("plain", "best")
Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--imatrix",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="With gguf: an importance matrix, of `qtool imatrix` or llama-imatrix.",
    ),
    click.option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="REGEX=TYPE",
        help="With gguf: the type of tensors whose name matches; the first that fits decides.",
    ),
    click.option(
        "--output-tensor-type", "output_type", metavar="TYPE", help="With gguf: the head's."
    ),
    click.option(
        "--token-embedding-type",
        "embedding_type",
        metavar="TYPE",
        help="With gguf: the embedding's.",
    ),
    click.option("--pure", is_flag=True, help="With gguf: one type for all, no mix."),
    click.option("--leave-output-tensor", is_flag=True, help="With gguf: the head stays as it is."),
    click.option(
        "--target-bits",
        type=float,
        metavar="X",
        help="With gguf: at most X bits a weight, spent where they remove most error.",
    ),
    click.option(
        "--search",
        metavar="plain|best",
        default="plain",
        help="With gguf: best runs calibration data and chooses codes by the outputs' error.",
    ),
    click.option(
        "--calibration",
        metavar="DATA",
        help="With --search best: a .txt, .jsonl or .parquet file, or a Hub dataset id.",
    ),
    click.option(
        "--num-samples", type=click.IntRange(1), default=128, help="Calibration sequences."
    ),
    click.option("--sequence-length", type=click.IntRange(1), default=512, help="Tokens in each."),
    click.option("--seed", type=int, default=0, help="Chooses the sequences."),
)


def gguf_options(command: Command) -> Command:
    """Add the options to a click command, which takes them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """The options by their names; as they are where none was given."""

    imatrix: Path | None = None
    tensor_types: tuple[str, ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    target_bits: float | None = None
    search: str = "plain"
    calibration: str | None = None
    num_samples: int = 128
    sequence_length: int = 512
    seed: int = 0

    @classmethod
    def of(cls, target: str, values: Mapping[str, Any]) -> GgufOptions:
        options = cls(**values)
        if target != "gguf":
            for field in dataclasses.fields(cls):
                if getattr(options, field.name) != field.default:
                    name = field.name.replace("_", "-")
                    raise UsageError(f"--{name} is for --to gguf, not for --to {target}")
        if options.target_bits is not None and (options.pure or not 0 < options.target_bits <= 32):
            raise UsageError(
                f"--target-bits {options.target_bits:g} "
                + ("and --pure exclude each other" if options.pure else "is not between 0 and 32")
            )
        if options.search not in SEARCHES:
            raise UnknownName("search", options.search, SEARCHES)
        return options

    def overrides(self) -> MixOverrides:
        from qtool.convert.gguf.mix import MixOverrides

        patterns = []
        for text in self.tensor_types:
            pattern, equals, type = text.rpartition("=")
            if not equals or not pattern:
                raise UsageError(
                    f"--tensor-type {text!r} is not REGEX=TYPE", "such as 'ffn_down=Q6_K'"
                )
            patterns.append((pattern, tensor_type(type)))
        return MixOverrides(
            output=None if self.output_type is None else tensor_type(self.output_type),
            embedding=None if self.embedding_type is None else tensor_type(self.embedding_type),
            by_pattern=tuple(patterns),
            pure=self.pure,
            leave_output=self.leave_output_tensor,
        )


def tensor_type(name: str) -> str:
    """A tensor type in its canonical spelling: "q4_k" is Q4_K."""
    from qtool.convert.gguf.blocks.codecs import can_write
    from qtool.convert.gguf.types import TENSOR_TYPES

    known = [type for type in TENSOR_TYPES if can_write(type)]
    found = next((type for type in known if type.lower() == name.lower()), None)
    if found is None:
        raise UnknownName("GGUF tensor type that can be written", name, known)
    return found


def plan_gguf(reader: WeightReader, type: str | None, options: GgufOptions) -> ExportPlan:
    """The plan of an export with these options."""
    from qtool.convert.gguf.export import plan_export
    from qtool.convert.gguf.imatrix import read_imatrix

    importance = None if options.imatrix is None else read_imatrix(options.imatrix)
    if importance is not None:
        importance = dataclasses.replace(importance, file=str(options.imatrix))
    overrides = options.overrides()
    if options.target_bits is not None:
        type, overrides = _for_bits(reader, type, options.target_bits, overrides, importance)
    plan = plan_export(reader, type, overrides=overrides, importance=importance)
    if options.search == "plain":
        return plan
    from qtool.convert.search import BestSearch
    from qtool.recipe import Calibration

    wanted = Calibration(
        options.calibration, options.num_samples, options.sequence_length, options.seed
    )
    return dataclasses.replace(plan, prepared=BestSearch(plan, wanted))


def _for_bits(
    reader: WeightReader,
    type: str | None,
    bits: float,
    overrides: MixOverrides,
    importance: ImportanceMatrix | None,
) -> tuple[str, MixOverrides]:
    """A file type, and a type by hand for each tensor that none was asked for."""
    import re

    import torch

    from qtool.convert.gguf.export import PlannedTensor, plan_export
    from qtool.convert.gguf.mix import fixed_by_hand
    from qtool.convert.gguf.target import FILE_TYPE_OF, Candidate, types_for_bits

    base = plan_export(reader, type or "Q4_K_M", overrides=overrides, importance=importance)
    tied = all(tensor.info.name != "output.weight" for tensor in base.tensors)

    def candidate(tensor: PlannedTensor) -> Candidate:
        name, shape = tensor.info.name, tensor.info.shape
        assert tensor.source is not None
        source = tensor.source

        def read() -> torch.Tensor:
            values = reader.tensor(source).float()
            values = values.reshape(-1, values.shape[-1])
            return values if values.shape[1] == shape[-1] else values.t().contiguous()

        return Candidate(name, shape, read, tensor.importance)

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
    from qtool.convert.gguf.mix import TypeChoice, explain, is_quantizable

    overrides = options.overrides()
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


def show_tensors(facts: list[dict[str, Any]]) -> None:
    """The same for a reader, on stderr."""
    from rich.table import Table

    from qtool.progress import console

    table = Table("tensor", "shape", "type", "bytes", "why", box=None, pad_edge=False)
    for row in facts:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, row["type"], f"{row['bytes']:,}", row["why"])
    console.print(table)
