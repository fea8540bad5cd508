"""Memory that packed weights share."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from qtool import grid
from qtool.kernels.cpu.huge_pages import ALIGNMENT, PAGE_BYTES, HugePages
from qtool.kernels.cpu.native import Native
from qtool.kernels.cpu.native_linear import pack_for, pack_matrix
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight


def test_tensors_follow_each_other_in_a_chunk_that_begins_at_a_page() -> None:
    memory = HugePages(chunk_bytes=PAGE_BYTES)
    first = memory.zeros((3, 5), torch.float16)
    second = memory.zeros((7,), torch.uint8)
    assert first.data_ptr() % PAGE_BYTES == 0
    assert second.data_ptr() - first.data_ptr() == ALIGNMENT
    assert first.shape == (3, 5)
    assert torch.count_nonzero(first) == torch.count_nonzero(second) == 0


def test_a_tensor_that_does_not_fit_begins_another_chunk() -> None:
    memory = HugePages(chunk_bytes=PAGE_BYTES)
    small = memory.zeros((100,), torch.uint8)
    large = memory.zeros((PAGE_BYTES + 1,), torch.float32)
    assert large.data_ptr() % PAGE_BYTES == 0
    small.fill_(1)
    large.fill_(2)
    assert small.sum() == 100
    assert large.sum() == 2 * (PAGE_BYTES + 1)


def test_nothing_overlaps() -> None:
    memory = HugePages(chunk_bytes=PAGE_BYTES)
    sizes = torch.randint(0, PAGE_BYTES // 3, (40,), generator=torch.manual_seed(0)).tolist()
    tensors = [memory.zeros((size,), torch.uint8) for size in sizes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_a_chunk_goes_with_its_last_tensor() -> None:
    memory = HugePages(chunk_bytes=PAGE_BYTES)
    tensors = [memory.zeros((10,), torch.uint8) for _ in range(2)]
    assert memory._chunk is not None
    chunk: weakref.ref[object] = memory._chunk
    tensors.pop()
    gc.collect()
    assert chunk() is not None
    tensors.pop()
    gc.collect()
    assert chunk() is None
    assert memory.zeros((10,), torch.uint8).sum() == 0


def test_huge_pages_are_asked_for() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    held = HugePages().zeros((10,), torch.uint8)
    assert "hg" in _flags_at(held.data_ptr())


@pytest.mark.parametrize("word", ["int4-g32-sym", "int4-g32-asym", "int8-row-sym"])
def test_packed_weights_lie_in_them(native: Native, word: str) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    values = torch.randn(40, 64, generator=torch.manual_seed(0))
    scheme = QuantScheme.parse(word)
    found = grid.fit(values, scheme)
    weight = QuantizedWeight(grid.codes(values, found, scheme), found.scales, found.zeros, scheme)
    for packed in (pack_for(native, weight), pack_matrix(native, values)):
        parts = [part for part in (packed.codes, packed.scales, packed.zeros) if part is not None]
        assert all("hg" in _flags_at(part.data_ptr()) for part in parts)


def _flags_at(address: int) -> list[str]:
    """VmFlags of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        bounds = line.split(" ")[0].split("-")
        if len(bounds) == 2:
            inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping has the address")
