"""`bench kernels --tune`: measure which tile each linear of a model takes on this GPU, and keep it.

For each shape and number of rows all tiles are tried that the kernel can have, with weights used in
turn so that they come from memory. The fastest is written before the rules of the table
(`kernels.cuda.tuning`), and so is the number of rows from which unpacking the weight is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qtool.errors import UsageError
from qtool.kernels.cuda import marlin_linear
from qtool.kernels.cuda.marlin_linear import MarlinPacked
from qtool.kernels.cuda.tuning import (
    LEAST_BLOCKS,
    ROW_BUCKETS,
    LinearShape,
    LinearTile,
    linear_tile,
)
from qtool.runtime.bench.gpu_timing import seconds_of
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.attention import SelfAttention
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.mlp import Mlp
from qtool.runtime.models.model import Model

# Copies of one matrix that are used in turn take this much together, more than a GPU's L2.
COLD_BYTES = 256 << 20
SPLITS = (1, 2, 4, 8, 16)
# Where unpacking is compared.
UNPACK_ROWS = (64, 128, 256, 512, 1024)

Seconds = Callable[[Callable[[int], object]], float]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest tile for a shape, and how long the table's took before."""

    shape: LinearShape
    tile: LinearTile
    microseconds: float
    before_microseconds: float

    @property
    def row(self) -> dict[str, int]:
        """Of the table."""
        tile, shape = self.tile, self.shape
        return {
            "bits": shape.bits,
            "max_rows": shape.rows,
            "out": shape.out_features,
            "in": shape.in_features,
            "strips": tile.strips,
            "rows": tile.rows,
            "warps": tile.warps,
            "stages": tile.stages,
            "split": tile.split,
        }


def candidates(shape: LinearShape) -> Iterator[LinearTile]:
    """Tiles that fit the matrix and have no more rows than are needed."""
    blocks = shape.in_features // shape.block
    heights = [height for height in (16, 32, 64) if height < 2 * max(shape.rows, 16)]
    for strips in (1, 2, 4):
        if shape.out_features % (64 * strips):
            continue
        for height in heights:
            # Sums of 128 x 64 and more want eight warps.
            wide = height * strips >= 128
            for split in SPLITS:
                if split > 1 and split > blocks // LEAST_BLOCKS:
                    continue
                for stages in (2, 3, 4):
                    yield LinearTile(
                        strips, height, split, warps=8 if wide and strips > 1 else 4, stages=stages
                    )


def packed_linears(model: Model) -> list[MarlinPacked]:
    """The linears of a model that run as Marlin words, one of each shape."""
    if not isinstance(model, Decoder):
        return []
    layers: list[Linear | Linears] = [model.head]
    for block in model.blocks:
        if isinstance(block.attention, SelfAttention):
            layers += [block.attention.qkv, block.attention.o]
        if isinstance(block.mlp, Mlp):
            layers += [block.mlp.up, block.mlp.down]
    found: dict[LinearShape, MarlinPacked] = {}
    for layer in layers:
        for part in layer.parts if isinstance(layer, Linears) else (layer,):
            if isinstance(part.packed, MarlinPacked):
                found.setdefault(part.packed.shape_for(1), part.packed)
    return list(found.values())


def tune(
    packed: MarlinPacked,
    dtype: torch.dtype,
    *,
    rows: Sequence[int] = ROW_BUCKETS,
    seconds: Seconds = seconds_of,
) -> Iterator[Tuned]:
    """The fastest tile of one matrix for each number of rows."""
    copies = _copies(packed)
    for count in rows:
        shape = packed.shape_for(count)
        x = torch.randn(count, packed.in_features, device=packed.words.device).to(dtype)
        sums = marlin_linear.block_sums(x, packed)

        def took(tile: LinearTile, x: Any = x, sums: Any = sums) -> float:
            return seconds(
                lambda index: marlin_linear.add_parts(
                    marlin_linear.matmul_parts(
                        x, copies[index % len(copies)], sums=sums, config=tile
                    ),
                    dtype,
                )
            )

        before = took(linear_tile(shape, x.device))
        fastest, best = min((took(tile), place) for place, tile in enumerate(candidates(shape)))
        tile = list(candidates(shape))[best]
        yield Tuned(shape, tile, 1e6 * fastest, 1e6 * before)


def rows_to_unpack(
    packed: MarlinPacked, dtype: torch.dtype, *, seconds: Seconds = seconds_of
) -> int:
    """From so many rows on, unpacking the weight and a dense product take less time."""
    for count in UNPACK_ROWS:
        x = torch.randn(count, packed.in_features, device=packed.words.device).to(dtype)

        def fused(index: int, x: Any = x) -> object:
            return marlin_linear.add_parts(marlin_linear.matmul_parts(x, packed), dtype)

        def unpacked(index: int, x: Any = x) -> object:
            return F.linear(x, marlin_linear.unpack(packed, dtype))

        if seconds(unpacked) < seconds(fused):
            return count
    return 2 * UNPACK_ROWS[-1]


def _copies(packed: MarlinPacked) -> list[MarlinPacked]:
    count = max(1, min(16, COLD_BYTES // max(1, packed.words.nbytes)))
    return [packed, *(packed._replace(words=packed.words.clone()) for _ in range(count - 1))]


def check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise UsageError(
            f"--tune measures kernels of a GPU, and the device is {device.type}",
            hint="run it where torch.cuda.is_available(), or leave --tune out",
        )
