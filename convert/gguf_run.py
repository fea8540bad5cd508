"""Carrying an export to GGUF out: write, read back and compare, name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qtool.convert.formats import WeightReader
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.parts import part_paths, whole_stem
from qtool.convert.gguf.plan import ExportPlan, PlannedTensor
from qtool.convert.outcome import MAX_SCALE_ERROR, TINY, Outcome
from qtool.errors import OutputExists, UsageError, VerificationFailed
from qtool.progress import track
from qtool.source import Source
from qtool.weights import QuantizedWeight


def default_gguf_out(source: Source, file_type: str) -> Path:
    name = whole_stem(source.path) if source.is_gguf else source.short_name
    return Path(f"{name}-{file_type}.gguf")


def check_gguf_out(source: Source, out: Path, *, num_files: int = 0, force: bool = True) -> None:
    """Refuse an output that could not be made.

    num_files  that the model will be in, once that is known: whether they are there is looked at
    """
    if out.suffix != ".gguf":
        raise UsageError(f"{out} does not end in .gguf", "GGUF models are files, not folders")
    if out.is_dir():
        raise UsageError(f"{out} is a folder", "name another --out")
    for path in (out, *part_paths(out, max(num_files, 1))):
        if path.resolve() == source.path.resolve():
            raise UsageError(f"{path} is the source itself", "name another --out")
    for path in part_paths(out, num_files) if num_files else ():
        if path.exists() and not force:
            raise OutputExists(path)


def write_gguf_files(plan: ExportPlan, out: Path, *, force: bool = False) -> Outcome:
    """Write, compare what was to stay the same with the source's, then name."""
    check_gguf_out(plan.reader.source, out, num_files=len(plan.layouts), force=force)
    found: list[_Found] = []

    def check(first: Path) -> None:
        found.append(_compare(plan, first, out))

    written = write_gguf(plan, out, force=force, check=check)
    errors, near = found[0]
    return Outcome(
        out=written.paths[0],
        exact_layers=errors.count(0.0),
        rounded_layers=len(errors) - errors.count(0.0),
        max_scale_error=max(errors, default=0.0),
        nbytes=plan.nbytes,
        notes=written.notes,
        near_layers=len(near),
        max_rms_error=max(near, default=0.0),
        num_files=len(written.paths),
    )


class _Found(NamedTuple):
    """Of layers whose codes were kept: the largest relative changes of a scale, and for those with
    rounded minima of the weights in the root mean square.
    """

    scale_errors: list[float]
    weight_errors: list[float]


def _compare(plan: ExportPlan, first: Path, out: Path) -> _Found:
    """Weights whose codes were kept are compared; what was rounded anew is measured by eval."""
    written = GgufWeights(Source(str(out), first))
    errors, near = [], []
    for tensor in track(plan.tensors, f"checking {out.name}"):
        if tensor.source is None or tensor.how not in ("copy", "repack"):
            continue
        if tensor.how == "repack" and tensor.info.type.name == "Q4_1":
            near.append(_minimum_error(plan.reader, written, tensor))
            continue
        meant = plan.reader.tensor(tensor.source).float()
        found = written.tensor(tensor.source).float()
        change = ((meant - found).abs() / meant.abs().clamp(min=TINY)).max().item()
        if change > MAX_SCALE_ERROR:
            raise VerificationFailed(f"{tensor.source} reads back other than it was written")
        if tensor.how == "repack":
            errors.append(change)
    return _Found(errors, near)


def _minimum_error(reader: WeightReader, written: WeightReader, tensor: PlannedTensor) -> float:
    """How far rounded minima move a layer, relative; raises where more than they moved.

    A scale moves by 2**-10 of it at most, times a code of up to 15; half precision rounds
    -zero * scale by 2**-11 of it, and the reader's sum rounds once more.
    """
    assert tensor.source is not None
    module = tensor.source.removesuffix(".weight")
    weight = reader.weight(module)
    assert isinstance(weight, QuantizedWeight), type(weight)
    assert weight.zeros is not None
    meant, found = weight.dequantize(), written.tensor(tensor.source).float()
    scales = weight.scales.float()
    most = (2.0**-10 * (weight.zeros.float() + 16) * scales.abs()).unsqueeze(-1)
    change = (found - meant).abs().view(*scales.shape, -1)
    if not bool((change <= most).all()):
        raise VerificationFailed(f"{tensor.source} reads back other than it was written")
    return float((found - meant).norm() / meant.norm().clamp(min=TINY))
