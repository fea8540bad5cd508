"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from qtool.runtime.bench.output import new_table
from qtool.runtime.bench.timing import Spread
from qtool.runtime.plan.answer import Facts, Load
from qtool.runtime.plan.costs import MeasuredCosts
from qtool.runtime.plan.fit import Fit
from qtool.runtime.plan.hardware import ARITHMETIC_SHARE, BANDWIDTH_SHARE
from qtool.runtime.plan.measure import Measurement
from qtool.runtime.plan.variants import Variant
from qtool.units import size_text


def pages(result: Mapping[str, Any], loads: Sequence[Load]) -> RenderableType:
    return Group(*_pages(result, loads))


def _pages(result: Mapping[str, Any], loads: Sequence[Load]) -> Iterator[RenderableType]:
    facts: Facts = result["model"]
    yield _headline(facts)
    yield _forms_table(result["forms"], facts)
    if result["fits"]:
        yield _fits_table(result["fits"])
        yield (
            f"sequences of {result['context']:,} tokens at once; tokens a second, from data sheets "
            f"at assumed {100 * BANDWIDTH_SHARE:.0f} % of bandwidth and "
            f"{100 * ARITHMETIC_SHARE:.0f} % of arithmetic\n"
        )
    measured: Measurement | None = result["measured"]
    if measured is not None:
        costs = measured.costs
        yield _costs_table(costs)
        yield (
            f"steps of {measured.model} as measured here; {1e6 * costs.seconds_per_draw:.0f} µs a "
            f"token drawn, {1e9 * costs.seconds_per_read:.0f} ns a cached token read\n"
        )
    if loads:
        yield _loads_table(loads)
        yield "simulated with qtool's scheduler; TTFT, TPOT, E2E: medians, p95 under them"
        yield from (f"{row.variant} on {row.on}: {row.problem}" for row in loads if row.problem)


def _headline(facts: Facts) -> str:
    active = ""
    if facts.num_active_weights < 0.9 * facts.num_weights:
        active = f" ({facts.num_active_weights / 1e9:.2f} B for a token)"
    return (
        f"{facts.name}: {facts.model_type}, {facts.num_weights / 1e9:.2f} B weights{active}, "
        f"{facts.num_layers} layers, context {facts.max_position_embeddings:,}, KV cache "
        f"{facts.kv_bytes_per_token / 1e3:.1f} kB a token "
        f"({facts.kv_bytes_per_token_int8 / 1e3:.1f} in int8)\n"
    )


def _forms_table(forms: Sequence[Variant], facts: Facts) -> Table:
    table = new_table("form size bits_/weight of_bf16")
    largest = max(form.num_bytes for form in forms)
    for form in forms:
        table.add_row(
            form.name,
            size_text(form.num_bytes),
            f"{8 * form.num_bytes / facts.num_weights:.2f}",
            f"{100 * form.num_bytes / largest:.0f} %",
        )
    return table


def _fits_table(fits: Sequence[Fit]) -> Table:
    table = new_table("GPU form KV_tokens sequences decode_1 decode_all prefill")
    for row in fits:
        name = row.gpu if row.num_gpus == 1 else f"{row.num_gpus} x {row.gpu}"
        if not row.fits:
            table.add_row(name, row.variant, "does not fit", "", "", "", "", style="dim")
            continue
        table.add_row(
            name,
            row.variant,
            f"{row.kv_tokens:,}",
            str(row.sequences),
            f"{row.decode_tokens_per_second:,.0f}",
            f"{row.batch_tokens_per_second:,.0f}",
            f"{row.prefill_tokens_per_second:,.0f}",
        )
    return table


def _costs_table(costs: MeasuredCosts) -> Table:
    table = new_table("rows ms")
    for rows, seconds in costs.rows:
        table.add_row(str(rows), f"{1e3 * seconds:.2f}")
    return table


def _loads_table(loads: Sequence[Load]) -> Table:
    table = new_table("on form replicas req_/s tokens_/s TTFT_ms TPOT_ms E2E_s at_once")
    for load in loads:
        found = load.outcome
        if found is None:
            table.add_row(load.on, load.variant, "-", "", "", "", "", "", "", style="dim")
            continue
        table.add_row(
            load.on,
            load.variant,
            str(found.num_replicas),
            f"{found.requests_per_second:.2f}",
            f"{found.tokens_per_second:,.0f}",
            _two(found.ttft, 1e3),
            _two(found.tpot, 1e3),
            _two(found.e2e, 1.0),
            f"{found.mean_sequences:.1f}",
        )
    return table


def _two(found: Spread, scale: float) -> str:
    return f"{scale * found.p50:.1f}\n[dim]{scale * found.p95:.1f}[/dim]"
