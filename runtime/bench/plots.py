"""A benchmark's result as one SVG that stands alone: what changes along the axis that was swept.

    latency   tokens a second and milliseconds a token, by batch size
    serve     tokens a second and time to first token, by request rate
    kernels   operations a second of each matrix, by tokens
    startup   where the seconds of each run went

Points are medians; a bar goes from the smallest to the 95th percentile where there is a spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from qtool.runtime.svg import circle, line, rectangle, round_numbers, shortened, svg, text

STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #636973; }
.label { font-weight: 600; fill: #1d1f23; }
.page { fill: #ffffff; } .grid { stroke: #eceae5; } .range { stroke-width: 2; }
.c0 { stroke: #2f66c9; fill: #2f66c9; } .c1 { stroke: #d2611c; fill: #d2611c; }
.c2 { stroke: #2e8b57; fill: #2e8b57; } .c3 { stroke: #8a4fbf; fill: #8a4fbf; }
@media (prefers-color-scheme: dark) {
text { fill: #9aa1ab; } .label { fill: #e7e8ea; }
.page { fill: #1b1e22; } .grid { stroke: #2d3138; } }
</style>"""
COLOURS = 4
PANEL_WIDTH, PANEL_HEIGHT = 420, 300


class Point(NamedTuple):
    """x as it is written on the axis; the median, and the ends of its bar."""

    x: str
    y: float
    low: float
    high: float


class Panel(NamedTuple):
    """One pair of axes; a line for each of the series."""

    title: str
    x_name: str
    series: Mapping[str, Sequence[Point]]


Rows = Sequence[Mapping[str, Any]]


def plot(kind: str, rows: Rows) -> str | None:
    """The plot of a result's rows, plain data as in the JSON; None where there is none to draw."""
    panels = PLOTS[kind](rows) if kind in PLOTS else []
    panels = [panel for panel in panels if any(panel.series.values())]
    if not panels:
        return None
    parts = [STYLE, f'<rect class="page" width="{PANEL_WIDTH * len(panels)}" height="100%"/>']
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({PANEL_WIDTH * number} 0)">')
        parts += _draw(panel)
        parts.append("</g>")
    whole = svg(PANEL_WIDTH * len(panels), PANEL_HEIGHT, f"qtool bench {kind}", parts)
    return whole.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _draw(panel: Panel) -> list[str]:
    left, right, top, bottom = 56, 14, 48, 56
    points = [point for series in panel.series.values() for point in series]
    names = list(dict.fromkeys(point.x for point in points))
    largest = 1.05 * max(max(point.high, point.y) for point in points) or 1.0
    step = (PANEL_WIDTH - left - right) / len(names)

    def x(name: str) -> float:
        return left + step * (names.index(name) + 0.5)

    def y(value: float) -> float:
        return top + (1 - value / largest) * (PANEL_HEIGHT - top - bottom)

    parts = [text(left, 20, panel.title, "label")]
    for value in round_numbers(largest):
        parts.append(line(left, y(value), PANEL_WIDTH - right, y(value), "grid"))
        parts.append(text(left - 6, y(value) + 4, f"{value:g}", "tick", anchor="end"))
    for name in names:
        parts.append(text(x(name), PANEL_HEIGHT - bottom + 18, name, "tick", anchor="middle"))
    parts.append(text(PANEL_WIDTH / 2, PANEL_HEIGHT - 18, panel.x_name, "tick", anchor="middle"))
    at = float(left)
    for number, (name, series) in enumerate(panel.series.items()):
        colour = f"c{number % COLOURS}"
        if len(panel.series) > 1:
            parts.append(rectangle(at, 30, 10, 10, name, f'class="{colour}"'))
            parts.append(text(at + 14, 40, shortened(name, 16), "tick"))
            at += 30 + 6.5 * min(len(name), 16)
        for before, after in pairwise(series):
            parts.append(line(x(before.x), y(before.y), x(after.x), y(after.y), colour))
        for point in series:
            if point.high > point.low:
                parts.append(
                    line(x(point.x), y(point.low), x(point.x), y(point.high), f"{colour} range")
                )
            title = f"{name}, {point.x}: {point.y:.4g} ({point.low:.4g} to {point.high:.4g})"
            parts.append(circle(x(point.x), y(point.y), 4, colour, title))
    return parts


def _spread(x: str, found: Mapping[str, float] | None) -> list[Point]:
    if found is None:
        return []
    return [Point(x, found["p50"], found["smallest"], found["p95"])]


def _one(x: str, value: float) -> Point:
    return Point(x, value, value, value)


def _latency(rows: Rows) -> list[Panel]:
    batches = [str(row["batch_size"]) for row in rows]
    speeds = [
        _one(batch, row["decode_tokens_per_second"])
        for batch, row in zip(batches, rows, strict=True)
    ]
    gaps = [
        point
        for batch, row in zip(batches, rows, strict=True)
        for point in _spread(batch, row["itl_ms"])
    ]
    return [
        Panel("tokens / s, all sequences", "batch size", {"decode": speeds}),
        Panel("ms between tokens", "batch size", {"ITL": gaps}),
    ]


def _serve(rows: Rows) -> list[Panel]:
    rates = [str(row["request_rate"]) for row in rows]
    loads = [row["load"] for row in rows]
    pairs = list(zip(rates, loads, strict=True))
    return [
        Panel(
            "tokens / s",
            "requests / s",
            {"output": [_one(rate, load["tokens_per_second"]) for rate, load in pairs]},
        ),
        Panel(
            "ms",
            "requests / s",
            {
                name.removesuffix("_ms").upper(): [
                    point for rate, load in pairs for point in _spread(rate, load[name])
                ]
                for name in ("ttft_ms", "tpot_ms")
            },
        ),
    ]


def _kernels(rows: Rows) -> list[Panel]:
    series: dict[str, list[Point]] = {}
    for row in rows:
        name = f"{row['out_features']}x{row['in_features']} {row['kernel']}"
        point = _one(str(row["tokens"]), row["giga_operations_per_second"])
        series.setdefault(name, []).append(point)
    return [Panel("GOP / s", "tokens", series)]


def _startup(rows: Rows) -> list[Panel]:
    parts = ("python", "imports", "loading", "first_token")
    runs = [str(number) for number in range(1, len(rows) + 1)]
    series = {
        name: [_one(run, row[name]) for run, row in zip(runs, rows, strict=True)] for name in parts
    }
    return [Panel("seconds", "run", series)]


PLOTS: Mapping[str, Callable[[Rows], list[Panel]]] = {
    "latency": _latency,
    "serve": _serve,
    "kernels": _kernels,
    "startup": _startup,
}
