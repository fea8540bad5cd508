"""Which scheme a linear takes that is to be quantized again, as `--requantize` asks.

The width is the source's own or the next above that the target has (Q6_K becomes 8 bits in GPTQ),
the groups the largest of 128, 64 and 32 that fit, symmetric as every format holds it. Formats whose
config has room for one scheme take the one that holds the most weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from qtool.convert.formats import Format, Held
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.scheme import PORTABLE_GROUP_SIZES, QuantScheme

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def choose_schemes(
    linears: Mapping[str, Held], kept: Collection[QuantScheme], target: Format
) -> dict[str, QuantScheme]:
    """A scheme for each linear that the target can hold in some scheme; the rest are left out.

    linears  what the codes of cannot be kept, by module
    kept     schemes of linears that keep their codes
    """
    if not target.single_scheme:
        choices = {module: _first_that_fits(held, target) for module, held in linears.items()}
        return {module: scheme for module, scheme in choices.items() if scheme is not None}
    candidates = list(dict.fromkeys(QuantScheme(s.bits, s.group_size) for s in kept))[:1]
    if not candidates:
        largest = max(linears.values(), key=_size, default=None)
        candidates = [] if largest is None else _candidates(largest)
    fits = {
        scheme: [module for module, held in linears.items() if _fits(held, scheme, target)]
        for scheme in candidates
    }
    best = max(fits, key=lambda scheme: sum(_size(linears[m]) for m in fits[scheme]), default=None)
    return {} if best is None else dict.fromkeys(fits[best], best)


def bits_of(held: Held) -> int:
    """Whole bits of a code: "Q6_K" 6, "nf4-g64" 4, "int4-g128-sym act-order" 4."""
    if held.kind in TENSOR_TYPES:
        return int(TENSOR_TYPES[held.kind].bits_per_weight)
    found = re.search(r"\d+", held.kind)
    assert found is not None, held.kind
    return int(found[0])


def _candidates(held: Held) -> list[QuantScheme]:
    """Best first: the nearest width from its own upwards, then downwards; large groups first."""
    bits = bits_of(held)
    widths = [*(w for w in WIDTHS if w >= bits), *(w for w in reversed(WIDTHS) if w < bits)]
    return [QuantScheme(width, group) for width in widths for group in PORTABLE_GROUP_SIZES]


def _first_that_fits(held: Held, target: Format) -> QuantScheme | None:
    return next((scheme for scheme in _candidates(held) if _fits(held, scheme, target)), None)


def _fits(held: Held, scheme: QuantScheme, target: Format) -> bool:
    out_features, in_features = held.shape
    if scheme.group_size is not None and in_features % scheme.group_size:
        return False
    return target.refuses(scheme, out_features, in_features) is None


def _size(held: Held) -> int:
    return held.shape[0] * held.shape[1]
