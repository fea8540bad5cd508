"""What a person sees of a run: the plan before it, a line a block, a table after it. All on stderr;
`--json` gives the same facts to a machine on stdout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qtool.artifact import LayerReport, Manifest
from qtool.progress import console
from qtool.quantize.allocate import average_bits
from qtool.quantize.pipeline import Job
from qtool.scheme import QuantScheme


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
        f"  size: {_megabytes(plan.source_bytes)} -> {_megabytes(plan.output_bytes)}; "
        f"{_megabytes(plan.working_bytes)} of disk while it runs"
    )
    for warning in job.warnings:
        say(f"  warning: {warning}")


def print_result(job: Job, manifest: Manifest, out: Path, seconds: float) -> None:
    """The closing table: what the layers lost, beside plain rounding."""
    table = Table(title=f"{out}  ({seconds:.0f} s)", title_justify="left")
    for column in ("layers", "scheme", "method", "lost", "by rounding", "ratio"):
        table.add_column(column, justify="left" if column in ("layers", "method") else "right")
    for (leaf, scheme, method), reports in _by_kind(manifest.layers).items():
        ours = _mean([report.error for report in reports])
        plain = _mean([report.rtn_error for report in reports])
        ratio = "" if not ours or not plain else f"{ours / plain:.2f}"
        table.add_row(
            f"{len(reports)} x {leaf}", scheme, method, _percent(ours), _percent(plain), ratio
        )
    console.print(table)
    notes = Counter(note for report in manifest.layers for note in report.notes)
    for note, count in notes.most_common():
        say(f"note: {count} layers: {note}")
    for warning in manifest.warnings:
        say(f"warning: {warning}")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    say(f"{out}: {_megabytes(size)}, {job.source.name} was {_megabytes(job.plan.source_bytes)}")
    say("lost: share of each layer's output power, on the calibration data where there is any")


def result_to_dict(manifest: Manifest, out: Path, seconds: float) -> dict[str, Any]:
    return {"out": str(out), "seconds": round(seconds, 1), **manifest.to_dict()}


def plan_to_dict(job: Job) -> dict[str, Any]:
    return {
        "source": job.source.name,
        "format": job.layout.name,
        "recipe": job.recipe.to_dict(),
        **job.plan.to_dict(),
        "warnings": list(job.warnings),
    }


def grouped_reasons(left: Mapping[str, str], head: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in left.items():
        groups.setdefault(reason, []).append(name)
    if head:
        groups.setdefault("outside the decoder blocks", []).extend(head)
    return groups


def shortened(names: Sequence[str]) -> str:
    """Names that differ only in numbers, written once.

    >>> shortened(["layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "lm_head"])
    'layers.{0,1}.mlp.down_proj, lm_head'
    """
    numbers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        template = name if at is None else ".".join([*parts[:at], "{}", *parts[at + 1 :]])
        numbers.setdefault(template, []).extend([] if at is None else [parts[at]])
    return ", ".join(
        template.replace("{}", _ranges(found)) if found else template
        for template, found in numbers.items()
    )


def _ranges(numbers: Sequence[str]) -> str:
    """["0", "1", "2", "5"] -> "{0..2,5}"; one number alone stands without braces."""
    values = sorted(map(int, numbers))
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = []
    for run in runs:
        texts += [f"{run[0]}..{run[-1]}"] if len(run) > 2 else [str(value) for value in run]
    return texts[0] if len(values) == 1 else "{" + ",".join(texts) + "}"


def _by_kind(
    reports: Sequence[LayerReport],
) -> dict[tuple[str, str, str], list[LayerReport]]:
    kinds: dict[tuple[str, str, str], list[LayerReport]] = {}
    for report in reports:
        leaf = report.module.rpartition(".")[2]
        kinds.setdefault((leaf, str(report.scheme), report.method), []).append(report)
    return kinds


def _errors(reports: Sequence[LayerReport]) -> str:
    ours = _mean([report.error for report in reports])
    plain = _mean([report.rtn_error for report in reports])
    if ours is None:
        return "nothing to quantize"
    if ours == plain:
        return f"lost {_percent(ours)}"
    return f"lost {_percent(ours)}, by rounding {_percent(plain)}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3f} %"


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
