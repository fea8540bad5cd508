"""The page's plots as inline SVG: text in, text out, coloured by the page's own CSS variables.

Drawn by hand and not by matplotlib: the marks follow the reader's light or dark theme, stay sharp,
carry a tooltip each, and the page needs no font, script or image of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from qtool.artifact import LayerReport
from qtool.runtime.evaluate.divergence import Divergence
from qtool.runtime.svg import circle, line, rectangle, round_numbers, shortened, svg, text

# KL divergences below this are float32 rounding; a logarithmic axis has to end somewhere.
SMALLEST_KLD = 1e-7

# Of a label's letters, in units of the drawing.
_LABEL_ADVANCE = 8.0
_LABEL_HEIGHT = 18.0

Span = tuple[float, float, float]
"""A label's left end, right end and baseline."""

_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


def divergence_plot(models: Mapping[str, Divergence]) -> str:
    """One line a model on a logarithmic axis of KLD: a bar from the 10th to the 90th percentile, a
    tick at the median, and marks at the mean, 99 %, 99.9 % and the largest.
    """
    left, right, row, top = 170, 20, 46, 14
    width, height = 760, top + row * len(models) + 34
    ends = [_ends(divergence) for divergence in models.values()]
    low = math.floor(math.log10(min(end[0] for end in ends)))
    high = max(low + 1, math.ceil(math.log10(max(end[1] for end in ends))))

    def x(value: float) -> float:
        share = (math.log10(max(value, SMALLEST_KLD)) - low) / (high - low)
        return left + min(1.0, max(0.0, share)) * (width - left - right)

    parts = []
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(line(at, top, at, height - 30, "grid"))
        parts.append(text(at, height - 12, f"{10.0**power:g}", "tick", anchor="middle"))
    for index, (name, divergence) in enumerate(models.items()):
        y = top + row * index + row / 2
        quantile = divergence.kld_percentiles
        begin, end = x(quantile[10.0]), x(quantile[90.0])
        median = x(quantile[50.0])
        parts.append(text(left - 12, y + 4, shortened(name), "label", anchor="end"))
        parts.append(line(begin, y, x(divergence.kld_max), y, "thin"))
        title = f"{name}: 10 % {quantile[10.0]:.2g}, 90 % {quantile[90.0]:.2g}"
        long = max(1.0, end - begin)
        parts.append(rectangle(begin, y - 8, long, 16, title, 'class="bar" rx="3"'))
        parts.append(line(median, y - 8, median, y + 8, "median"))
        marks = (
            ("99 %", quantile[99.0], "dot"),
            ("99.9 %", quantile[99.9], "dot"),
            ("largest", divergence.kld_max, "dot"),
            ("mean", divergence.kld.value, "mean"),
        )
        for title, value, kind in marks:
            parts.append(circle(x(value), y, 4.5, kind, f"{name}: {title} {value:.4g} nats"))
    return svg(width, height, "KL divergence of each token, by model", parts)


def _ends(divergence: Divergence) -> tuple[float, float]:
    smallest = max(divergence.kld_percentiles[10.0], SMALLEST_KLD)
    return smallest, max(divergence.kld_max, 10 * smallest)


def pareto_plot(points: Mapping[str, tuple[int, float]]) -> str:
    """A mark a model: size in bytes along, mean KLD up (logarithmic). Full where no other model is
    at most as large and at most as far, and smaller or closer; a ring where one is.
    """
    left, right, top, bottom = 76, 40, 24, 46
    width, height = 760, 300
    klds = {name: max(kld, SMALLEST_KLD) for name, (_, kld) in points.items()}
    low = math.floor(math.log10(min(klds.values())))
    high = max(low + 1, math.ceil(math.log10(max(klds.values()))))
    largest = 1.08 * max(size for size, _ in points.values())

    def x(size: float) -> float:
        return left + size / largest * (width - left - right)

    def y(kld: float) -> float:
        return top + (high - math.log10(kld)) / (high - low) * (height - top - bottom)

    parts = []
    for power in range(low, high + 1):
        parts.append(line(left, y(10.0**power), width - right, y(10.0**power), "grid"))
        parts.append(text(left - 8, y(10.0**power) + 4, f"{10.0**power:g}", "tick", anchor="end"))
    for size in round_numbers(largest):
        parts.append(line(x(size), top, x(size), height - bottom, "grid"))
        label = f"{size / 1e6:g} MB"
        parts.append(text(x(size), height - bottom + 18, label, "tick", anchor="middle"))
    # Marks are not written over either.
    taken: list[Span] = [
        (x(size) - 6, x(size) + 6, y(klds[name]) + 4) for name, (size, _) in points.items()
    ]
    for name, (size, kld) in points.items():
        kind = "mean" if is_best(points, name) else "dot"
        title = f"{name}: {size / 1e6:.4g} MB, {kld:.4g} nats"
        parts.append(circle(x(size), y(klds[name]), 5, kind, title))
        label = shortened(name, 30)
        anchor = "end" if x(size) > 0.7 * width else "start"
        shift = -10 if anchor == "end" else 10
        begin = x(size) + shift - (_LABEL_ADVANCE * len(label) if anchor == "end" else 0)
        span = free_span(begin, _LABEL_ADVANCE * len(label), y(klds[name]) - 8, taken)
        taken.append(span)
        parts.append(text(x(size) + shift, span[2], label, "label", anchor=anchor))
    return svg(width, height, "Mean KL divergence against size", parts)


def free_span(begin: float, length: float, baseline: float, taken: Sequence[Span]) -> Span:
    """The place nearest to ``baseline`` where a label of ``length`` covers none of ``taken``: the
    baseline itself, else whole lines below and above it in turn.
    """
    lines = (0, *(way * step for step in range(1, len(taken) + 1) for way in (1, -1)))
    for row in lines:
        at = baseline + row * _LABEL_HEIGHT
        if not any(
            begin < end and start < begin + length and abs(at - other) < _LABEL_HEIGHT
            for start, end, other in taken
        ):
            break
    return begin, begin + length, at


def is_best(points: Mapping[str, tuple[int, float]], name: str) -> bool:
    """Whether no other model is as good in both size and divergence and better in one."""
    own = points[name]
    return not any(
        size <= own[0] and kld <= own[1] and (size, kld) != own for size, kld in points.values()
    )


def error_map(layers: Sequence[LayerReport]) -> str:
    """Blocks down, linears across: the darker a cell, the larger that layer's relative error, from
    none to the largest. A cross: not measured (left in 16 bit, or nothing flowed through it).
    """
    errors = {split_module(layer.module): layer for layer in layers if layer.error is not None}
    highest = max((layer.error or 0.0 for layer in errors.values()), default=0.0)
    if highest <= 0:
        return ""
    blocks = list(dict.fromkeys(block for block, _ in errors))
    kinds = list(dict.fromkeys(kind for _, kind in errors))
    left, width = 60, 760
    across = min(110.0, (width - left) / len(kinds))
    down = max(12.0, min(26.0, 560 / len(blocks)))
    parts = []
    every = max(1, math.ceil(16 / down))
    names = [shortened(kind.split(".")[-1], 18) for kind in kinds]
    # Names wider than their columns stand on two levels in turn.
    crowded = any(8 * len(name) > across for name in names)
    top = 46 if crowded else 28
    for column, name in enumerate(names):
        level = top - 10 - (18 if crowded and column % 2 else 0)
        parts.append(text(left + across * (column + 0.5), level, name, "tick", anchor="middle"))
    for row, block in enumerate(blocks):
        y = top + down * row
        if row % every == 0:
            parts.append(text(left - 10, y + down / 2 + 4, block or "-", "tick", anchor="end"))
        for column, kind in enumerate(kinds):
            x = left + across * column
            layer = errors.get((block, kind))
            if layer is None:
                middle = x + across / 2
                parts.append(text(middle, y + down / 2 + 4, "\N{MULTIPLICATION SIGN}", "tick"))
                continue
            error = layer.error or 0.0
            title = f"{layer.module}: {layer.method} {layer.scheme or ''} error {error:.3g}"
            shade = f'class="cell" fill-opacity="{error / highest:.3f}"'
            parts.append(rectangle(x + 1, y + 1, across - 2, down - 2, title, shade))
            if down >= 20:
                kind_of_text = "on-dark" if error > 0.55 * highest else "tick"
                place = (x + across / 2, y + down / 2 + 4)
                words = f"{100 * error:.2f} %"
                parts.append(text(*place, words, kind_of_text, anchor="middle"))
    height = top + down * len(blocks) + 6
    return svg(width, height, "Relative error of each layer", parts)


def layer_plots(layers: Sequence[LayerReport]) -> list[str]:
    """One panel for each kind of linear (q_proj, down_proj, ...), one bar for each block: the
    layer's relative error, and a tick at the error of plain rounding. All panels share one scale.
    """
    measured = [layer for layer in layers if layer.error is not None]
    highest = max((max(_errors(layer)) for layer in measured), default=0.0)
    if highest <= 0:
        return []
    panels: dict[str, list[tuple[str, LayerReport]]] = {}
    for layer in measured:
        block, kind = split_module(layer.module)
        panels.setdefault(kind, []).append((block, layer))
    return [_panel(kind, bars, highest) for kind, bars in panels.items()]


def split_module(module: str) -> tuple[str, str]:
    """The block's number and what the linear is called within it.

    >>> split_module("model.layers.3.mlp.down_proj")
    ('3', 'mlp.down_proj')
    >>> split_module("lm_head")
    ('', 'lm_head')
    """
    match = _BLOCK.match(module)
    return (match[1], match[2]) if match else ("", module)


def _panel(kind: str, bars: Sequence[tuple[str, LayerReport]], highest: float) -> str:
    left, right, top, bottom = 44, 8, 30, 20
    width, height = 344, 150
    inner_width, inner_height = width - left - right, height - top - bottom
    step = inner_width / len(bars)
    thickness = min(26.0, step * 0.72)

    def y(error: float) -> float:
        return top + inner_height * (1 - error / highest)

    parts = [text(left, 18, shortened(kind, 34), "label")]
    for error in (0.0, highest / 2, highest):
        parts.append(line(left, y(error), width - right, y(error), "grid"))
        parts.append(text(left - 6, y(error) + 4, _error_text(error), "tick", anchor="end"))
    every = max(1, math.ceil(len(bars) / 10))
    for index, (block, layer) in enumerate(bars):
        center = left + step * (index + 0.5)
        error = layer.error or 0.0
        against = "" if layer.rtn_error is None else f", plain rounding {layer.rtn_error:.3g}"
        title = f"{layer.module}: {layer.method} {layer.scheme or ''} error {error:.3g}{against}"
        tall = inner_height * error / highest
        place = (center - thickness / 2, y(error), thickness, tall)
        parts.append(rectangle(*place, title, 'class="bar"'))
        if layer.rtn_error is not None:
            at = y(layer.rtn_error)
            parts.append(line(center - thickness / 2, at, center + thickness / 2, at, "rtn"))
        if index % every == 0:
            parts.append(text(center, height - 5, block, "tick", anchor="middle"))
    return svg(width, height, f"Relative error of {kind} in each block", parts)


def _errors(layer: LayerReport) -> Iterable[float]:
    return (value for value in (layer.error, layer.rtn_error, 0.0) if value is not None)


def _error_text(error: float) -> str:
    return "0" if error == 0 else f"{100 * error:.2g} %"
