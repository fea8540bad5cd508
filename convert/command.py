"""`qtool convert`: a plan, the work, and what came of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from qtool.convert.gguf_options import gguf_options, options_for
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.convert.gguf.plan import ExportPlan
    from qtool.convert.outcome import Outcome
    from qtool.convert.plan import ConversionPlan

EPILOG = """\b
Examples:
  qtool convert Qwen/Qwen3-0.6B --to gguf --type Q4_K_M   # one step, no intermediate file
  qtool convert Qwen/Qwen3-0.6B --to gguf --type Q3_K_M --imatrix qwen3.imatrix.gguf
  qtool convert Qwen/Qwen3-8B --to gguf --type Q8_0 --split-max-size 2G   # several files
  qtool convert ./Qwen3-0.6B-int4 --to gguf               # int4 codes kept: Q4_0
  qtool convert ./Qwen3-0.6B-int4 --to marlin             # tiles as the CUDA kernel takes them
  qtool convert ./Qwen3-0.6B-int4 --to gptq --out ./gptq  # for stacks that read GPTQ
  qtool convert ./Qwen3-0.6B-int4 --to hf --type bf16     # dequantized, loads anywhere
  qtool convert --list                                    # every pair, and how close it comes"""


@click.command(epilog=EPILOG)
@click.argument("model", required=False)
@click.option(
    "--to",
    "target",
    metavar="FORMAT",
    help="gguf, marlin, gptq, awq, compressed-tensors or hf.",
)
@click.option(
    "--type",
    "type_",
    metavar="TYPE",
    help="With gguf: F16, BF16, Q8_0, Q4_0, Q4_K_M, ... With hf: bf16, fp16 or f32.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where to write. Default: ./<model>-<format or type>.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Round a second time what FORMAT cannot hold as it is, in place of leaving it in 16 bit.",
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a Hub model.")
@click.option("--list", "list_", is_flag=True, help="Print what can become what, and how closely.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@gguf_options
def convert(
    model: str | None,
    target: str | None,
    type_: str | None,
    out: Path | None,
    requantize: bool,
    revision: str | None,
    list_: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **gguf: Any,
) -> None:
    """Convert MODEL to another format.

    Integer formats carry the same codes and scales from one to the other: nothing is quantized
    again unless --requantize asks for it, and what a format cannot hold stays in 16 bit and is
    named. MODEL is a folder, a .gguf file, a Hub id, or builtin:books-7m.
    """
    if list_:
        return _list_conversions(as_json)
    if model is None or target is None:
        missing = "MODEL" if model is None else "--to FORMAT"
        raise UsageError(
            f"qtool convert needs {missing}", "qtool convert --list shows what can become what"
        )
    from qtool.convert.fidelity import GGUF_TARGET
    from qtool.convert.formats import open_weights
    from qtool.convert.gguf_plan import plan_gguf, tensor_facts
    from qtool.convert.gguf_run import check_gguf_out, default_gguf_out, write_gguf_files
    from qtool.convert.plan import check_requantize, check_target, plan_conversion
    from qtool.convert.run import check_out, default_out, write_checkpoint
    from qtool.source import resolve

    check_target(target)
    check_requantize(target, requantize)
    options = options_for(target, gguf)
    source = resolve(model, revision)
    if target == GGUF_TARGET:
        if out is not None:
            check_gguf_out(source, out)
        export = plan_gguf(open_weights(source), type_, options)
        gguf_out = out or default_gguf_out(source, export.file_type)
        if not dry_run:
            check_gguf_out(source, gguf_out, num_files=len(export.layouts), force=force)
        facts = {"source": source.name, **_show_export(export, source.name, gguf_out)}
        if dry_run:
            facts["tensor_plan"] = tensor_facts(export, options)
            _show_tensors(facts["tensor_plan"])
            return _finish(facts, None, as_json)
        return _finish(facts, write_gguf_files(export, gguf_out, force=force), as_json)
    folder = out or default_out(source, target)
    if not dry_run:
        check_out(source, folder, force=force)
    reader = open_weights(source)
    plan = plan_conversion(reader, target=target, type=type_, requantize=requantize)
    facts = {"source": source.name, **_show_plan(plan, source.name)}
    if dry_run:
        facts["tensor_plan"] = [
            {
                "name": step.name,
                "shape": list(step.held.shape),
                "has": step.held.kind,
                "type": step.writes,
                "bytes": step.nbytes,
                "how": step.action,
                "why": step.reason or HOW[step.action],
            }
            for step in plan.steps
        ]
        _show_tensors(facts["tensor_plan"])
        return _finish(facts, None, as_json)
    return _finish(facts, write_checkpoint(reader, plan, folder, force=force), as_json)


def _list_conversions(as_json: bool) -> None:
    from qtool.convert import matrix

    click.echo(json.dumps(matrix.as_facts(), indent=2) if as_json else matrix.as_text())


# How each action of a plan reads.
HOW = {
    "repack": "codes kept",
    "dequantize": "dequantized",
    "cast": "other float type",
    "copy": "as it is",
    "quantize": "quantized",
    "requantize": "quantized again",
    "decode": "dequantized",
}


class _Row(NamedTuple):
    name: str
    held: str
    writes: str
    action: str


def _show_plan(plan: ConversionPlan, source: str) -> dict[str, Any]:
    """What happens to which tensors, then what stays dense and why; the same as facts for JSON."""
    rows = [_Row(s.name, s.held.kind, s.writes, s.action) for s in plan.steps]
    _show_table(rows, f"{source} to {plan.target}", plan.nbytes)
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.left_dense.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        _say(f"stays dense, {reason}: {', '.join(names)}")
    for warning in plan.warnings:
        _say(f"warning: {warning}")
    return {
        "target": plan.target,
        "tensors": _counts(rows),
        "left_dense": plan.left_dense,
        "warnings": list(plan.warnings),
    }


def _show_export(plan: ExportPlan, source: str, out: Path) -> dict[str, Any]:
    from qtool.convert.gguf.parts import part_paths

    rows = [_Row(t.info.name, t.held.kind, t.info.type.name, t.how) for t in plan.tensors]
    _show_table(rows, f"{source} to GGUF {plan.file_type}", plan.nbytes)
    names = [path.name for path in part_paths(out, len(plan.layouts))]
    files = [
        {"name": name, "tensors": len(layout.tensors), "bytes": layout.nbytes}
        for name, layout in zip(names, plan.layouts, strict=True)
    ]
    if len(files) > 1:
        largest = max(layout.nbytes for layout in plan.layouts)
        _say(f"{len(files)} files, {names[0]} and so on, the largest {largest / 1e6:.1f} MB")
    for warning in plan.warnings:
        _say(f"warning: {warning}")
    return {
        "target": "gguf",
        "type": plan.file_type,
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "bytes": plan.nbytes,
        "files": files,
        "tensors": _counts(rows),
        "warnings": list(plan.warnings),
    }


def _show_table(rows: list[_Row], title: str, nbytes: int) -> None:
    """A row for each kind of change: which tensors, how many, from what to what, and how."""
    from rich.table import Table

    from qtool.progress import console

    table = Table("tensors", "count", "has", "gets", "how", box=None, pad_edge=False)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault(row[1:], []).append(row.name)
    for (held, writes, action), names in groups.items():
        table.add_row(_summary(names), str(len(names)), held, writes, HOW[action])
    _say(f"{title}, about {nbytes / 1e6:.1f} MB")
    console.print(table)


def _show_tensors(facts: list[dict[str, Any]]) -> None:
    """The same for a reader, on stderr."""
    from rich.table import Table

    from qtool.progress import console

    table = Table("tensor", "shape", "type", "bytes", "why", box=None, pad_edge=False)
    for row in facts:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, row["type"], f"{row['bytes']:,}", row["why"])
    console.print(table)


def _summary(names: list[str]) -> str:
    """The last parts of the names, each once: "k_proj, q_proj, v_proj"."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    kinds = {".".join(p[-2:]) if p[-1] == "bias" else p[-1] for p in parts}
    return ", ".join(sorted(kinds))


def _counts(rows: list[_Row]) -> dict[str, int]:
    return dict(Counter(row.action for row in rows))


def _say(text: str) -> None:
    from qtool.progress import console

    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _finish(facts: dict[str, Any], outcome: Outcome | None, as_json: bool) -> None:
    """The result on stdout: lines for a reader, or everything as JSON."""
    if as_json:
        click.echo(json.dumps(facts | _outcome_facts(outcome), indent=2))
    elif outcome is not None:
        click.echo(_closing_lines(facts, outcome))


def _outcome_facts(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {}
    return {
        "out": str(outcome.out),
        "bytes": outcome.nbytes,
        "exact_layers": outcome.exact_layers,
        "rounded_layers": outcome.rounded_layers,
        "max_scale_error": outcome.max_scale_error,
        "near_layers": outcome.near_layers,
        "max_rms_error": outcome.max_rms_error,
        "again_layers": outcome.again_layers,
        "max_again_error": outcome.max_again_error,
        "notes": list(outcome.notes),
    }


def _closing_lines(facts: dict[str, Any], outcome: Outcome) -> str:
    kind = facts["target"]
    if "type" in facts:
        kind = f"GGUF {facts['type']}, {facts['bits_per_weight']:.2f} bits a weight"
    more = outcome.num_files - 1
    name = f"{outcome.out} and {more} more" if more else str(outcome.out)
    lines = [f"{name}: {outcome.nbytes / 1e6:.1f} MB, {kind}, read back and checked"]
    if outcome.exact_layers:
        lines.append(f"{outcome.exact_layers} layers hold the source's weights bit for bit")
    if outcome.rounded_layers:
        lines.append(
            f"{outcome.rounded_layers} layers had scales rounded to the target's type, "
            f"by at most {outcome.max_scale_error:.2g} of a scale"
        )
    if outcome.near_layers:
        lines.append(
            f"{outcome.near_layers} layers keep their codes, and their minima are rounded: "
            f"weights change by at most {outcome.max_rms_error:.2g} (relative RMS)"
        )
    if outcome.again_layers:
        lines.append(
            f"{outcome.again_layers} layers were rounded a second time: "
            f"weights change by at most {outcome.max_again_error:.2g} (relative RMS)"
        )
    left_dense = facts.get("left_dense", {})
    if left_dense:
        lines.append(f"{len(left_dense)} layers stay in 16 bit: {', '.join(left_dense)}")
    return "\n".join(lines)
