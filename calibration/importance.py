"""The importance pass: sums of squared inputs of every linear of the model as it is.

Chunks are those of the calibration data: windows of one length laid end to end over the text, drawn
by the seed, each beginning with the beginning-of-text token where the tokenizer adds one. That is
llama-imatrix's protocol but for the order of chunks. Nothing is quantized on the way, so that one
matrix serves every type.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtool.calibration.capture import BlockCapture
from qtool.calibration.groups import stages
from qtool.calibration.linears import Site, all_linears
from qtool.calibration.placement import CPU
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.errors import QtoolError
from qtool.progress import bar


@dataclass(frozen=True, slots=True)
class InputSquares:
    """sums   [in] float32, sum of x² over all inputs
    count  inputs seen; 0 for an expert that no token reached
    """

    sums: Tensor
    count: int


def input_squares(skeleton: Skeleton, tokens: Tensor) -> dict[str, InputSquares]:
    """Every linear of the decoder blocks by its name on disk, less ".weight".

    tokens  [sequences, length] int64
    """
    found: dict[str, InputSquares] = {}
    skeleton.load_outside()
    runner = BlockRunner(skeleton, tokens)
    last = len(skeleton.blocks) - 1
    with tempfile.TemporaryDirectory(prefix="qtool-imatrix-") as name:
        folder = Path(name)
        activations = runner.activations(folder / "activations.bin")
        with bar("Measuring inputs", len(skeleton.blocks)) as progress:
            for index in range(len(skeleton.blocks)):
                skeleton.load_block(index)
                capture = BlockCapture(skeleton, runner, activations, index, folder)
                found |= _block_squares(skeleton, capture, index)
                if index < last:
                    capture.advance()
                capture.close()
                skeleton.free_block(index)
                progress.advance()
        activations.close()
    return found


def _block_squares(
    skeleton: Skeleton, capture: BlockCapture, index: int
) -> dict[str, InputSquares]:
    linears = all_linears(skeleton, index)
    widths = {linear.site: linear.in_features for linear in linears}
    groups = capture.trace(widths)
    squares: dict[Site, InputSquares] = {}
    for stage in stages(groups, sequential=False):
        for first, moments in capture.collect(stage, widths.__getitem__, set()).items():
            if not moments.is_finite:
                raise QtoolError(
                    f"the inputs of {first.parameter} are not finite",
                    "the checkpoint holds NaN or infinite weights, or overflows on this text",
                )
            group = next(group for group in stage.groups if group.first == first)
            sums = moments.gram.diagonal().to(CPU, torch.float32, copy=True)
            squares |= dict.fromkeys(group.sites, InputSquares(sums, moments.count))
    return {linear.name: squares[linear.site] for linear in linears if linear.site in squares}
