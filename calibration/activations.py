"""Hidden states at a block boundary: on the device that computes while they are few, in the
machine's memory up to a budget, in a mapped file beyond it.

One slot a chunk of calibration sequences. A block reads a slot and its output goes back into the
same one, so a pass over the model needs one boundary's worth of space however many blocks it has.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qtool.calibration.placement import CPU
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

    file    made only where the budget is exceeded
    device  where what is got lies, and what is put comes from
    device_bytes  that all slots may take there, where it is no CPU; beyond them they lie in the
                  machine's memory
    """

    def __init__(
        self,
        num_chunks: int,
        file: Path,
        budget: int | None = None,
        *,
        device: torch.device = CPU,
        device_bytes: int = 0,
    ) -> None:
        self._slots: list[Tensor | None] = [None] * num_chunks
        self._file = file
        self._budget = memory_budget() if budget is None else budget
        self._device = device
        self._device_bytes = device_bytes
        self._mapped: Tensor | None = None

    @property
    def on_disk(self) -> bool:
        return self._mapped is not None

    def get(self, chunk: int) -> Tensor | None:
        slot = self._slots[chunk]
        # From pinned memory; a slot is written to after what reads it has been waited for.
        return None if slot is None else slot.to(self._device, non_blocking=True)

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
        stays = self._device == CPU or self._fits_device(values)
        if not whole or not stays or self._mapped is not None or self._exceeds(values):
            self.put(chunk, values)
        else:
            self._slots[chunk] = values

    def travel(self, device: torch.device) -> None:
        """From here on slots are read and written on another device."""
        if device == self._device:
            return
        for chunk, slot in enumerate(self._slots):
            if slot is not None and slot.device != CPU:
                self._slots[chunk] = slot.to(device)
        self._device = device

    def drop(self, chunk: int) -> None:
        """Give a slot's memory back."""
        self._slots[chunk] = None

    def close(self) -> None:
        self._slots = [None] * len(self._slots)
        self._mapped = None
        self._file.unlink(missing_ok=True)

    def _new_slot(self, chunk: int, values: Tensor) -> Tensor:
        if self._fits_device(values):
            return torch.empty_like(values, device=self._device)
        count = prod(values.shape)
        if self._mapped is None and self._exceeds(values):
            require_disk_space(self._file.parent, self._total(values))
            self._mapped = torch.from_file(
                str(self._file), shared=True, size=count * len(self._slots), dtype=values.dtype
            ).view(len(self._slots), count)
        if self._mapped is None:
            pinned = self._device.type == "cuda"
            return torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        return self._mapped[chunk, :count].view(values.shape)

    def _fits_device(self, values: Tensor) -> bool:
        return self._device != CPU and self._total(values) <= self._device_bytes

    def _exceeds(self, values: Tensor) -> bool:
        return not self._fits_device(values) and self._total(values) > self._budget

    def _total(self, values: Tensor) -> int:
        return values.nbytes * len(self._slots)
