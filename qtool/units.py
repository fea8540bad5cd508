"""Numbers as people read them."""

from __future__ import annotations


def size_text(size: int) -> str:
    """Decimal units, as disks and hubs count: 14.7 MB."""
    if size < 1000:
        return f"{size} B"
    for limit, divisor, unit in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if size < limit:
            return f"{size / divisor:.3g} {unit}"
    return f"{size / 1e12:.3g} TB" if size < 1e15 else f"{size / 1e12:,.0f} TB"
