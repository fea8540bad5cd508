"""Fixtures for the compiled kernels: every instruction set of this CPU, one thread and two."""

from collections.abc import Iterator

import pytest
import torch

from qtool.kernels.cpu.build import INSTRUCTION_SETS
from qtool.kernels.cpu.native import Native, load
from qtool.native_build import Missing

ISAS = tuple(isa.name for isa in INSTRUCTION_SETS)


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> Native:
    """The kernels of one instruction set; skips, with the reason, where they cannot be had."""
    found = load(request.param)
    if isinstance(found, Missing):
        pytest.skip(f"native {found.reason}")
    return found


@pytest.fixture
def natives() -> list[Native]:
    """The kernels of every instruction set that can be had; skips where there is none."""
    found = [load(isa) for isa in ISAS]
    there = [one for one in found if isinstance(one, Native)]
    if not there:
        pytest.skip("; ".join(one.reason for one in found if isinstance(one, Missing)))
    return there


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
