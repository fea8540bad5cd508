"""What a conversion came to, as read back from what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# bfloat16 rounds a scale by 2**-9 at most; beyond twice that it is no rounding.
MAX_SCALE_ERROR = 2.0**-8
# Below any scale: a zero that stays zero has changed by nothing.
TINY = 1e-37


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written, as read back.

    exact_layers     packed layers with the source's weights, bit for bit
    rounded_layers   packed layers whose scales were rounded to the target's type
    max_scale_error  the largest relative change of a scale among those
    nbytes           of all files
    notes            what only the data could tell, a line each
    near_layers      packed layers whose codes are kept and whose minima are rounded
    max_rms_error    the largest change among those, in the root mean square, relative to a layer's
    again_layers     packed layers whose weights were rounded a second time
    max_again_error  the largest change among those, likewise
    num_files        of a GGUF model; `out` is the first
    """

    out: Path
    exact_layers: int
    rounded_layers: int
    max_scale_error: float
    nbytes: int
    notes: tuple[str, ...] = ()
    near_layers: int = 0
    max_rms_error: float = 0.0
    again_layers: int = 0
    max_again_error: float = 0.0
    num_files: int = 1
