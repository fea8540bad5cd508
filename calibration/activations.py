"""Hidden states at a block boundary: in memory up to a budget, in a mapped file beyond it.

One slot a chunk of calibration sequences. A block reads a slot and its output goes back into the
same one, so a pass over the model needs one boundary's worth of space however many blocks it has.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qtool.output import require_disk_space
from qtool.settings import settings

# Of the machine's memory, for activations, unless QTOOL_MAX_MEMORY says otherwise.
_MEMORY_SHARE = 0.25


def memory_budget() -> int:
    given = settings().max_activation_bytes
    if given is not None:
        return given
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(physical * _MEMORY_SHARE)


class Activations:
    """`num_chunks` slots for tensors of one shape (the last may be smaller).

    file  made only where the budget is exceeded
    """

    def __init__(self, num_chunks: int, file: Path, budget: int | None = None) -> None:
        self._slots: list[Tensor | None] = [None] * num_chunks
        self._file = file
        self._budget = memory_budget() if budget is None else budget
        self._mapped: Tensor | None = None

    @property
    def on_disk(self) -> bool:
        return self._mapped is not None

    def get(self, chunk: int) -> Tensor | None:
        return self._slots[chunk]

    def put(self, chunk: int, values: Tensor) -> None:
        """Keep a copy of `values`; the first call decides where all of them live."""
        slot = self._slots[chunk]
        if slot is None or slot.shape != values.shape:
            slot = self._new_slot(chunk, values)
            self._slots[chunk] = slot
        slot.copy_(values)

    def take(self, chunk: int, values: Tensor) -> None:
        """Keep `values` themselves where they fit into memory; nobody else may change them."""
        whole = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
        if not whole or self._mapped is not None or self._exceeds(values):
            self.put(chunk, values)
        else:
            self._slots[chunk] = values

    def drop(self, chunk: int) -> None:
        """Give a slot's memory back."""
        self._slots[chunk] = None

    def close(self) -> None:
        self._slots = [None] * len(self._slots)
        self._mapped = None
        self._file.unlink(missing_ok=True)

    def _new_slot(self, chunk: int, values: Tensor) -> Tensor:
        count = prod(values.shape)
        if self._mapped is None and self._exceeds(values):
            require_disk_space(self._file.parent, values.nbytes * len(self._slots))
            self._mapped = torch.from_file(
                str(self._file), shared=True, size=count * len(self._slots), dtype=values.dtype
            ).view(len(self._slots), count)
        if self._mapped is None:
            return torch.empty_like(values)
        return self._mapped[chunk, :count].view(values.shape)

    def _exceeds(self, values: Tensor) -> bool:
        return values.nbytes * len(self._slots) > self._budget
