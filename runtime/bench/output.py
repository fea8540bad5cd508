"""Results as tables for people and as JSON for machines, with the conditions beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import rich.table
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType

from qtool.convert.formats import open_weights
from qtool.runtime.bench.conditions import environment, write_whole
from qtool.runtime.bench.kernels import KernelRow
from qtool.runtime.bench.machine import Roofs
from qtool.runtime.bench.offline import LatencyRow
from qtool.runtime.bench.plots import plot
from qtool.runtime.bench.startup import Startup
from qtool.runtime.bench.timing import Load, Spread
from qtool.runtime.evaluate.sizes import measure as measure_size
from qtool.source import Source

VERSION = 1


def emit(
    kind: str,
    conditions: Mapping[str, Any],
    rows: Sequence[Any],
    shown: RenderableType,
    *,
    as_json: bool,
    out: Path | None,
) -> None:
    """What is shown to stdout, or the JSON; the JSON also to `out`, complete or not at all, and
    its plot beside it, as .svg.
    """
    result = {
        "qtool_bench": VERSION,
        "kind": kind,
        **plain(conditions),
        "environment": environment(),
        "rows": plain(rows),
    }
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if out is not None:
        write_whole(out, text)
        drawn = plot(kind, result["rows"])
        if drawn is not None:
            write_whole(out.with_suffix(".svg"), drawn)
    if as_json:
        click.echo(text, nl=False)
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160  # a pipe has no width, and rich would fold the table into 80
        console.print(shown)


def plain(value: Any) -> Any:
    """Dataclasses and named tuples as dictionaries."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Spread):
        return value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def num_weights(source: Source) -> int | None:
    """That each token is multiplied by: all but an embedding that is only looked up; None where
    experts share the work.
    """
    reader = open_weights(source)
    config = reader.config
    if any("experts" in key for key in config):
        return None
    total = measure_size(reader).num_weights
    if config.get("tie_word_embeddings"):
        return total
    return total - int(config["vocab_size"]) * int(config["hidden_size"])


def latency_table(rows: Sequence[LatencyRow], roofs: Roofs) -> rich.table.Table:
    caption = (
        f"medians in ms, p95 under them; MBU of {roofs.bytes_per_second / 1e9:.1f} GB/s, MFU of "
        f"{roofs.operations_per_second / 1e9:.0f} GOP/s in {roofs.dtype}, both measured here "
        f"on {roofs.threads} thread{'s' * (roofs.threads > 1)}"
    )
    table = new_table(
        "batch tokens_/s latency_ms TTFT_ms TPOT_ms ITL_p99 prefill_/s MBU MFU runs",
        caption,
    )
    for row in rows:
        table.add_row(
            str(row.batch_size),
            f"{row.decode_tokens_per_second:.1f}",
            _two(row.latency_ms),
            _two(row.ttft_ms),
            _two(row.tpot_ms),
            f"{row.itl_ms.p99:.1f}",
            f"{row.prefill_tokens_per_second:.0f}",
            f"{100 * row.mbu:.0f} %",
            "-" if row.mfu is None else f"{100 * row.mfu:.0f} %",
            str(row.n_runs),
        )
    return table


def load_table(loads: Sequence[tuple[str, Load]]) -> rich.table.Table:
    errors = [error for _, load in loads for error in load.errors]
    table = new_table(
        "rate sent failed s req_/s tokens_/s TTFT_ms TPOT_ms ITL_p99 cached",
        "; ".join(["TTFT, TPOT: medians in ms, p95 under them", *errors]),
    )
    for name, load in loads:
        share = load.num_cached_tokens / max(1, load.num_prompt_tokens)
        table.add_row(
            name,
            str(load.num_requests),
            str(load.num_failed),
            f"{load.seconds:.1f}",
            f"{load.requests_per_second:.2f}",
            f"{load.tokens_per_second:.1f}",
            _two(load.ttft_ms),
            _two(load.tpot_ms),
            "-" if load.itl_ms is None else f"{load.itl_ms.p99:.1f}",
            f"{100 * share:.0f} %",
        )
    return table


def kernel_table(rows: Sequence[KernelRow]) -> rich.table.Table:
    table = new_table("out in layers stored kernel tokens µs GB/s GOP/s", "medians")
    for row in rows:
        table.add_row(
            str(row.out_features),
            str(row.in_features),
            str(row.modules),
            row.stored,
            row.kernel,
            str(row.tokens),
            f"{row.microseconds:.1f}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.giga_operations_per_second:.0f}",
        )
    return table


def startup_table(rows: Sequence[Startup]) -> rich.table.Table:
    table = new_table("run python imports loading first_token total", "seconds")
    for number, row in enumerate(rows, start=1):
        values = (row.python, row.imports, row.loading, row.first_token, row.total)
        table.add_row(str(number), *(f"{value:.2f}" for value in values))
    return table


def new_table(header: str, caption: str | None = None) -> rich.table.Table:
    table = rich.table.Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        header_style="bold",
        caption=caption,
        caption_justify="left",
    )
    for name in header.split():
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    return table


def _two(found: Spread | None) -> str:
    return "-" if found is None else f"{found.p50:.1f}\n[dim]{found.p95:.1f}[/dim]"
