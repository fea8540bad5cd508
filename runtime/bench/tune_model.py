"""Tune all linears of a model, and keep what was found for this GPU."""

from __future__ import annotations

from pathlib import Path
from statistics import median_low

import torch

from qtool.errors import UsageError
from qtool.kernels.cuda.tuning import ROW_BUCKETS, write_tuned
from qtool.progress import bar
from qtool.runtime.bench.tune import check_device, packed_linears, rows_to_unpack, tune
from qtool.runtime.config import Device, Dtype
from qtool.runtime.loading import choose_device, load_model


def tune_model(model: str, dtype: Dtype, device: Device) -> Path:
    """The file that the tiles are kept in; minutes, with a progress bar."""
    where = choose_device(device)
    check_device(where)
    loaded = load_model(model, dtype=dtype, device=device)
    linears = packed_linears(loaded.decoder)
    if not linears:
        raise UsageError(
            f"{model} has no linears of 2 to 8 bits that run packed on this GPU",
            hint="the start-up table of `qtool serve` says by what its linears run",
        )
    rows, unpack_at = [], []
    with torch.inference_mode(), bar("tuning", len(linears) * len(ROW_BUCKETS)) as progress:
        for packed in linears:
            for found in tune(packed, loaded.dtype):
                rows.append(found.row)
                progress.advance()
            unpack_at.append(rows_to_unpack(packed, loaded.dtype))
    return write_tuned(where, rows, unpack_at_rows=median_low(unpack_at))
