"""`qtool convert`: a plan, the work, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qtool.convert.plan import ConversionPlan
    from qtool.convert.run import Outcome

EPILOG = """\b
Examples:
  qtool convert Qwen/Qwen3-0.6B --to gguf --type Q4_K_M   # one step, no intermediate file
  qtool convert ./Qwen3-0.6B-int4 --to gguf               # int4 codes kept: Q4_0
  qtool convert ./Qwen3-0.6B-int4 --to marlin             # the layout that serve maps on CUDA
  qtool convert ./Qwen3-0.6B-int4 --to gptq --out ./gptq  # for stacks that read GPTQ
  qtool convert ./Qwen3-0.6B-int4 --to hf --type bf16     # dequantized, loads anywhere"""
"""Shown under the options."""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option(
    "--to",
    "target",
    required=True,
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
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    model: str,
    target: str,
    type_: str | None,
    out: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert MODEL to another format.

    Integer formats carry the same codes and scales from one to the other: nothing is quantized
    again, and what a format cannot hold stays in 16 bit and is named. MODEL is a folder, a .gguf
    file, a Hub id, or builtin:books-7m.
    """
    from qtool.checkpoint import resolve
    from qtool.convert.formats import open_weights
    from qtool.convert.plan import GGUF_TARGET, check_target, plan_conversion
    from qtool.convert.run import default_out, write_checkpoint

    check_target(target)
    source = resolve(model)
    reader = open_weights(source)
    if target == GGUF_TARGET:
        raise NotImplementedError
    plan = plan_conversion(reader, target=target, type=type_)
    _show_plan(plan, source.name)
    if dry_run:
        if as_json:
            click.echo(json.dumps(_plan_facts(plan, source.name), indent=2))
        return
    outcome = write_checkpoint(reader, plan, out or default_out(source, target), force=force)
    if as_json:
        facts = _plan_facts(plan, source.name) | _outcome_facts(outcome)
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(_closing_lines(plan, outcome))


# How each action reads in the plan.
HOW = {
    "repack": "codes kept",
    "dequantize": "dequantized",
    "cast": "rounded to the type",
    "copy": "as it is",
}


def _show_plan(plan: ConversionPlan, source: str) -> None:
    """What happens to which tensors, a row for each kind of them; then what stays dense and why."""
    from rich.table import Table

    from qtool.progress import console

    table = Table("tensors", "", "has", "gets", "", title=f"{source} to {plan.target}", box=None,
                  title_justify="left", pad_edge=False)  # fmt: skip
    rows: dict[tuple[str, str, str], list[str]] = {}
    for step in plan.steps:
        rows.setdefault((step.held.kind, step.writes, step.action), []).append(step.name)
    for (held, writes, action), names in rows.items():
        table.add_row(_summary(names), str(len(names)), held, writes, HOW[action])
    console.print(table)
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.left_dense.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        console.print(f"stays dense, {reason}: {', '.join(names)}", highlight=False)


def _summary(names: list[str]) -> str:
    """The last parts of the names, each once: "q_proj, k_proj, v_proj"."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    kinds = {".".join(p[-2:]) if p[-1] == "bias" else p[-1] for p in parts}
    return ", ".join(sorted(kinds))


def _plan_facts(plan: ConversionPlan, source: str) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for step in plan.steps:
        counts[step.action] = counts.get(step.action, 0) + 1
    return {
        "source": source,
        "target": plan.target,
        "tensors": counts,
        "left_dense": plan.left_dense,
    }


def _outcome_facts(outcome: Outcome) -> dict[str, Any]:
    return {
        "out": str(outcome.out),
        "bytes": outcome.nbytes,
        "exact_layers": outcome.exact_layers,
        "rounded_layers": outcome.rounded_layers,
        "max_scale_error": outcome.max_scale_error,
    }


def _closing_lines(plan: ConversionPlan, outcome: Outcome) -> str:
    lines = [f"{outcome.out}: {outcome.nbytes / 1e6:.1f} MB, {plan.target}, read back and checked"]
    if outcome.exact_layers:
        lines.append(f"{outcome.exact_layers} layers hold the source's weights bit for bit")
    if outcome.rounded_layers:
        lines.append(
            f"{outcome.rounded_layers} layers had scales rounded to the target's type, "
            f"by at most {outcome.max_scale_error:.2g} of a scale"
        )
    if plan.left_dense:
        lines.append(f"{len(plan.left_dense)} layers stay in 16 bit: {', '.join(plan.left_dense)}")
    return "\n".join(lines)
