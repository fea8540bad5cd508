"""Pieces of inline SVG: text in, text out. Colours and sizes are the page's own CSS classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, kind: str, *, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, title: str, more: str) -> str:
    """more: further attributes, class among them; title: what a pointer on it is told."""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f"<rect {box} {more}><title>{escape(title)}</title></rect>"


def circle(x: float, y: float, radius: float, kind: str, title: str) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
    return f'<circle class="{kind}" {place}><title>{escape(title)}</title></circle>'


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def shortened(words: str, limit: int = 22) -> str:
    return words if len(words) <= limit else f"{words[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def round_numbers(largest: float) -> list[float]:
    """0 and up to five multiples of 1, 2 or 5 times a power of ten, not above `largest`.

    >>> round_numbers(5.8)
    [0.0, 2.0, 4.0]
    """
    power = 10.0 ** math.floor(math.log10(largest))
    step = next(factor * power for factor in (0.2, 0.5, 1, 2, 5) if largest / (factor * power) <= 5)
    return [step * count for count in range(int(largest / step) + 1)]
