"""What a person sees of a run: the plan before it, a line a block, a table after it. All on stderr;
`--json` gives the same facts to a machine on stdout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qtool.artifact import LayerReport, Manifest
from qtool.progress import console
from qtool.quantize.allocate import average_bits
from qtool.quantize.devices import Placed
from qtool.quantize.job import Job
from qtool.quantize.summary import (
    KIND_COLUMNS,
    grouped_reasons,
    lost_by_kind,
    mean,
    percent,
    shortened,
)
from qtool.scheme import QuantScheme
from qtool.units import size_text


class ConsoleListener:
    """Prints a run as it goes."""

    def planned(self, job: Job) -> None:
        print_plan(job)
        self._num_blocks = job.num_blocks
        self._prefix = job.skeleton.prefix

    def block_done(self, index: int, reports: tuple[LayerReport, ...], seconds: float) -> None:
        say(
            f"{self._prefix}.{index}  {index + 1}/{self._num_blocks}  {_errors(reports)}"
            f"  {seconds:.1f} s"
        )

    def note(self, text: str) -> None:
        say(text)


def quiet_libraries() -> None:
    """transformers' and datasets' own bars and advice would break the lines of ours."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_plan(job: Job) -> None:
    plan, recipe = job.plan, job.recipe
    say(f"{job.source.name}  ->  {recipe.name}, {job.layout.name}")
    for scheme, count in plan.schemes.items():
        say(f"  {count:5d} linears  {scheme}")
    widths = {scheme.bits for scheme in plan.quantized.values() if isinstance(scheme, QuantScheme)}
    if len(widths) > 1:
        say(f"  mixed widths: {average_bits(plan):.3f} bits a weight with scales")
        for scheme in plan.schemes:
            names = [linear.name for linear, s in plan.quantized.items() if str(s) == scheme]
            say(f"    {scheme}: {shortened(names)}")
    for reason, names in grouped_reasons(plan.left, plan.head).items():
        say(f"  {len(names):5d} in 16 bit  {shortened(names)}: {reason}")
    if recipe.needs_calibration:
        data = recipe.calibration
        say(
            f"  calibration: {data.num_samples} samples of {data.sequence_length} tokens from "
            f"{data.dataset or 'the text that ships with qtool'}, seed {data.seed}"
        )
    say(
        f"  size: {size_text(plan.source_bytes)} -> {size_text(plan.output_bytes)}; "
        f"{size_text(plan.working_bytes)} of disk while it runs"
    )
    for line in _devices(job.placed):
        say(f"  {line}")
    for warning in job.warnings:
        say(f"  warning: {warning}")


def print_result(job: Job, manifest: Manifest, out: Path, seconds: float) -> None:
    """The closing table: what the layers lost, beside plain rounding."""
    table = Table(title=f"{out}  ({seconds:.0f} s)", title_justify="left")
    for column in KIND_COLUMNS:
        table.add_column(column, justify="left" if column in ("layers", "method") else "right")
    for row in lost_by_kind(manifest.layers):
        table.add_row(*row)
    console.print(table)
    notes = Counter(note for report in manifest.layers for note in report.remarks)
    for note, count in notes.most_common():
        say(f"note: {count} layers: {note}")
    for warning in manifest.warnings:
        say(f"warning: {warning}")
    held = [item.device_peak_bytes for item in manifest.layers if item.device_peak_bytes]
    if held:
        say(f"at most {size_text(max(held))} of a device's memory")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    say(f"{out}: {size_text(size)}, {job.source.name} was {size_text(job.plan.source_bytes)}")
    say("lost: share of each layer's output power, on the calibration data where there is any")


def result_to_dict(manifest: Manifest, out: Path, seconds: float) -> dict[str, Any]:
    return {"out": str(out), "seconds": round(seconds, 1), **manifest.to_dict()}


def plan_to_dict(job: Job) -> dict[str, Any]:
    return {
        "source": job.source.name,
        "format": job.layout.name,
        "recipe": job.recipe.to_dict(),
        **job.plan.to_dict(),
        "devices": job.placed.to_dict(),
        "warnings": list(job.warnings),
    }


def _devices(placed: Placed) -> Iterable[str]:
    """Nothing where all is done on the CPU."""
    if placed.block is None:
        return
    place, block = placed.placement, placed.block
    counts = Counter(str(device) for device in place.blocks)
    yield "device: " + ", ".join(f"{device} ({count} blocks)" for device, count in counts.items())
    yield (
        f"  the largest block takes {size_text(block.total)}: weights {size_text(block.weights)}, "
        f"and in turn sums {size_text(block.sums)} and a chunk {size_text(block.forward)}, "
        f"statistics {size_text(block.statistics)}, solver {size_text(block.solving)}"
    )
    yield f"  embeddings, {size_text(placed.outside_bytes)}, on {place.outside}"
    yield f"  hidden states there up to {size_text(place.kept_bytes)} a stream"


def _errors(reports: Sequence[LayerReport]) -> str:
    ours = mean([report.error for report in reports])
    plain = mean([report.rtn_error for report in reports])
    if ours is None:
        return "nothing to quantize"
    if ours == plain:
        return f"lost {percent(ours)}"
    return f"lost {percent(ours)}, by rounding {percent(plain)}"
