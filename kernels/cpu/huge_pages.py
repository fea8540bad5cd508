"""Memory for packed weights, in pages of 2 MB where Linux gives them.

Decoding reads all weights for every token, and with pages of 4 KB the hardware's prefetch stops at
the end of each: on one core of a Xeon with AMX, 12.4 GB/s in pages of 4 KB and 15.0 in pages of
2 MB for plain reading, 8.3 and 11.5 for a product with 4-bit weights. A layer of a small model is
less than such a page, so layers share chunks: each takes the place after the one before. A chunk is
given back when the last tensor in it is gone.
"""

import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20
ALIGNMENT = 64


class HugePages:
    """Gives out parts of chunks; thread-safe."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        # The last chunk, as long as a tensor lies in it, and where its free part begins.
        self._chunk: weakref.ref[mmap.mmap] | None = None
        self._free = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros, contiguous, at a multiple of 64 bytes; raises MemoryError."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.zeros(shape, dtype=dtype)
        nbytes = count * dtype.itemsize
        with self._lock:
            chunk = None if self._chunk is None else self._chunk()
            if chunk is None or self._free + nbytes > len(chunk):
                chunk = _map(max(self._chunk_bytes, nbytes))
                self._chunk = weakref.ref(chunk)
                self._free = -_address(chunk) % PAGE_BYTES
            offset = self._free
            self._free += -(-nbytes // ALIGNMENT) * ALIGNMENT
            # Holds the chunk; the weak reference does not.
            flat = torch.frombuffer(chunk, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)


def _map(nbytes: int) -> mmap.mmap:
    """Private zeros of that many bytes from a page's beginning on; pages come when written."""
    whole = -(-nbytes // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES
    try:
        chunk = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes} bytes of packed weights: {error}") from None
    try:
        chunk.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them: smaller pages do
    return chunk


def _address(chunk: mmap.mmap) -> int:
    return torch.frombuffer(chunk, dtype=torch.uint8).data_ptr()
