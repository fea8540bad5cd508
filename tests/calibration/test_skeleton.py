"""What the calibration asks of the C library."""

from __future__ import annotations

import pytest

from qtool.calibration.skeleton import raise_thresholds

TRIM, MMAP = -1, -3


@pytest.mark.parametrize(
    ("most", "taken"),
    [(2**31, {MMAP: 2**28, TRIM: 2**29}), (2**25, {MMAP: 2**25, TRIM: 2**29}), (0, {})],
)
def test_a_threshold_that_is_refused_leaves_none_worse(most: int, taken: dict[int, int]) -> None:
    """Since 2.35 glibc takes any size, before it 32 MB at the most; others may take none."""
    found: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if name == MMAP and value > most:
            return 0
        found[name] = value
        return 1

    raise_thresholds(mallopt)
    assert found == taken
