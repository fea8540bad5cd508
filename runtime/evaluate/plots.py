"""The page's plots as inline SVG: text in, text out, coloured by the page's own CSS variables.

Drawn by hand and not by matplotlib: the marks follow the reader's light or dark theme, stay sharp,
carry a tooltip each, and the page needs no font, script or image of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from qtool.artifact import LayerReport
from qtool.runtime.evaluate.divergence import Divergence

# KL divergences below this are float32 rounding; a logarithmic axis has to end somewhere.
SMALLEST_KLD = 1e-7

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
        parts.append(_line(at, top, at, height - 30, "grid"))
        parts.append(_text(at, height - 12, f"{10.0**power:g}", "tick", anchor="middle"))
    for index, (name, divergence) in enumerate(models.items()):
        y = top + row * index + row / 2
        quantile = divergence.kld_percentiles
        begin, end = x(quantile[10.0]), x(quantile[90.0])
        median = x(quantile[50.0])
        parts.append(_text(left - 12, y + 4, _shortened(name), "label", anchor="end"))
        parts.append(_line(begin, y, x(divergence.kld_max), y, "thin"))
        parts.append(
            f'<rect class="bar" x="{begin:.1f}" y="{y - 8:.1f}" rx="3" '
            f'width="{max(1.0, end - begin):.1f}" height="16">'
            f"<title>{escape(name)}: 10 % {quantile[10.0]:.2g}, 90 % {quantile[90.0]:.2g}</title>"
            "</rect>"
        )
        parts.append(_line(median, y - 8, median, y + 8, "median"))
        marks = (
            ("99 %", quantile[99.0], "dot"),
            ("99.9 %", quantile[99.9], "dot"),
            ("largest", divergence.kld_max, "dot"),
            ("mean", divergence.kld.value, "mean"),
        )
        for title, value, kind in marks:
            parts.append(
                f'<circle class="{kind}" cx="{x(value):.1f}" cy="{y:.1f}" r="4.5">'
                f"<title>{escape(name)}: {title} {value:.4g} nats</title></circle>"
            )
    return _svg(width, height, "KL divergence of each token, by model", parts)


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
        parts.append(_line(left, y(10.0**power), width - right, y(10.0**power), "grid"))
        parts.append(_text(left - 8, y(10.0**power) + 4, f"{10.0**power:g}", "tick", anchor="end"))
    for size in round_numbers(largest):
        parts.append(_line(x(size), top, x(size), height - bottom, "grid"))
        label = f"{size / 1e6:g} MB"
        parts.append(_text(x(size), height - bottom + 18, label, "tick", anchor="middle"))
    for name, (size, kld) in points.items():
        kind = "mean" if is_best(points, name) else "dot"
        anchor = "end" if x(size) > 0.7 * width else "start"
        shift = -10 if anchor == "end" else 10
        parts.append(
            f'<circle class="{kind}" cx="{x(size):.1f}" cy="{y(klds[name]):.1f}" r="5">'
            f"<title>{escape(name)}: {size / 1e6:.4g} MB, {kld:.4g} nats</title></circle>"
        )
        parts.append(
            _text(x(size) + shift, y(klds[name]) - 8, _shortened(name, 30), "label", anchor=anchor)
        )
    return _svg(width, height, "Mean KL divergence against size", parts)


def round_numbers(largest: float) -> list[float]:
    """0 and up to five multiples of 1, 2 or 5 times a power of ten, not above `largest`.

    >>> round_numbers(5.8)
    [0.0, 2.0, 4.0]
    """
    power = 10.0 ** math.floor(math.log10(largest))
    step = next(factor * power for factor in (0.2, 0.5, 1, 2, 5) if largest / (factor * power) <= 5)
    return [step * count for count in range(int(largest / step) + 1)]


def is_best(points: Mapping[str, tuple[int, float]], name: str) -> bool:
    """Whether no other model is as good in both size and divergence and better in one."""
    own = points[name]
    return not any(
        size <= own[0] and kld <= own[1] and (size, kld) != own for size, kld in points.values()
    )


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

    parts = [_text(left, 18, _shortened(kind, 34), "label")]
    for error in (0.0, highest / 2, highest):
        parts.append(_line(left, y(error), width - right, y(error), "grid"))
        parts.append(_text(left - 6, y(error) + 4, _error_text(error), "tick", anchor="end"))
    every = max(1, math.ceil(len(bars) / 10))
    for index, (block, layer) in enumerate(bars):
        center = left + step * (index + 0.5)
        error = layer.error or 0.0
        against = "" if layer.rtn_error is None else f", plain rounding {layer.rtn_error:.3g}"
        title = f"{layer.module}: {layer.method} {layer.scheme or ''} error {error:.3g}{against}"
        parts.append(
            f'<rect class="bar" x="{center - thickness / 2:.1f}" y="{y(error):.1f}" '
            f'width="{thickness:.1f}" height="{inner_height * error / highest:.1f}">'
            f"<title>{escape(title)}</title></rect>"
        )
        if layer.rtn_error is not None:
            at = y(layer.rtn_error)
            parts.append(_line(center - thickness / 2, at, center + thickness / 2, at, "rtn"))
        if index % every == 0:
            parts.append(_text(center, height - 5, block, "tick", anchor="middle"))
    return _svg(width, height, f"Relative error of {kind} in each block", parts)


def _errors(layer: LayerReport) -> Iterable[float]:
    return (value for value in (layer.error, layer.rtn_error, 0.0) if value is not None)


def _error_text(error: float) -> str:
    return "0" if error == 0 else f"{100 * error:.2g} %"


def _shortened(text: str, limit: int = 22) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
