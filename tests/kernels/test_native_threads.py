"""The library's threads: several callers at once, more threads than cores, a forked child."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from qtool.kernels.cpu import native_linear
from qtool.kernels.cpu.native import Native
from qtool.kernels.cpu.native_linear import NativePacked
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight


@pytest.fixture
def packed(native: Native) -> NativePacked:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (700, 512), dtype=torch.uint8, generator=generator)
    scales = torch.rand(700, 4, generator=generator).half().float()
    scheme = QuantScheme.parse("int4-g128-sym")
    return native_linear.pack_for(native, QuantizedWeight(codes, scales, None, scheme))


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows))


def test_callers_at_once_get_what_they_would_get_alone(packed: NativePacked, threads: int) -> None:
    expected = [native_linear.matmul(inputs(rows), packed, None) for rows in range(1, 9)]

    def call(index: int) -> bool:
        # A thread's own number of threads is torch's default, not this test's.
        torch.set_num_threads(threads)
        rows = index % 8 + 1
        found = native_linear.matmul(inputs(rows), packed, None)
        return torch.equal(found, expected[rows - 1])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


def test_more_threads_than_cores_change_nothing(packed: NativePacked) -> None:
    before = torch.get_num_threads()
    expected = native_linear.matmul(inputs(5), packed, None)
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(20):
                assert torch.equal(native_linear.matmul(inputs(5), packed, None), expected)
    finally:
        torch.set_num_threads(before)


# What is tested does not exist there.
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_has_threads_of_its_own(packed: NativePacked) -> None:
    """The parent's are not there; waiting for them would never end."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = native_linear.matmul(inputs(3), packed, None)
        child = os.fork()
        if child == 0:
            same = torch.equal(native_linear.matmul(inputs(3), packed, None), expected)
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        torch.set_num_threads(before)
