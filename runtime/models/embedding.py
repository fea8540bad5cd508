"""The table that token ids are looked up in, held as its file holds it where that is by rows.

A token reads one row, so nothing is gained by unpacking all of them: of a 0.5B model in GGUF Q8_0
the table in bfloat16 is 272 MB to write at load, more work than all that is packed for the kernels.
Blocks of a GGUF file stay in the file, which is mapped; a row is unpacked when it is asked for, to
the same values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.weights import BlockWeight, DenseWeight, Weight


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """stored [vocab, hidden]; looked up as `dtype`, which dense values have already."""

    stored: DenseWeight | BlockWeight
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Weight, dtype: torch.dtype, device: torch.device) -> "Embedding":
        if isinstance(weight, BlockWeight) and device.type == "cpu":
            return cls(weight, dtype)
        return cls(DenseWeight(weight.dequantize(dtype).to(device).contiguous()), dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [rows] int64 -> [rows, hidden], a copy."""
        stored = self.stored
        if isinstance(stored, DenseWeight):
            return stored.values.index_select(0, token_ids)
        data = stored.data.index_select(0, token_ids)
        return BlockWeight(data, stored.columns, stored.codec).dequantize(self.dtype)

    @property
    def values(self) -> Tensor | None:
        """The table [vocab, hidden], where it is dense."""
        return self.stored.values if isinstance(self.stored, DenseWeight) else None

    @property
    def hidden_size(self) -> int:
        return self.stored.shape[1]

    @property
    def device(self) -> torch.device:
        stored = self.stored
        return (stored.values if isinstance(stored, DenseWeight) else stored.data).device

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes
