"""The linears of a model's decoder blocks, one for each matrix on disk.

What is quantized is what is stored: a fused expert parameter in memory is many linears here, each
with its own name on disk and its place in the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from qtool.calibration.skeleton import Skeleton

# A matrix with fewer rows or columns is a gate or a router, not worth a kernel.
_SMALLEST_SIDE = 32


class Site(NamedTuple):
    """Where inputs arrive: a parameter, and the expert of it where it is fused."""

    parameter: str
    expert: int | None


@dataclass(frozen=True, slots=True)
class Linear:
    """name        on disk, less ".weight": "model.layers.0.mlp.experts.3.up_proj"
    parameter   in the model: "model.layers.0.mlp.experts.gate_up_proj"
    start, stop its rows of the parameter, or of the expert's matrix
    transposed  stored [in, out], as GPT-2's Conv1D
    """

    name: str
    block: int
    parameter: str
    expert: int | None
    start: int
    stop: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def site(self) -> Site:
        return Site(self.parameter, self.expert)

    @property
    def tensor(self) -> str:
        """The tensor on disk."""
        return f"{self.name}.weight"

    @property
    def module(self) -> str:
        """The name that loaders match against: the module's, or the expert's name on disk."""
        return self.name if self.expert is not None else self.parameter.removesuffix(".weight")

    def matrix(self, parameter: Tensor) -> Tensor:
        """The linear's weight [out, in] as a view of its parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.t() if self.transposed else matrix[self.start : self.stop]


class Unpacked(NamedTuple):
    """A weight of a block that cannot be quantized as it is stored."""

    name: str
    reason: str


def block_linears(skeleton: Skeleton, block: int) -> Iterator[Linear | Unpacked]:
    """Every linear of a block in the model's order, and what looks like one but cannot be taken."""
    prefix = skeleton.block_name(block)
    for path, module in skeleton.blocks[block].named_modules():
        name = f"{prefix}.{path}" if path else prefix
        if isinstance(module, nn.Linear):
            yield from _matrices(skeleton, block, f"{name}.weight", transposed=False)
        elif type(module).__name__ == "Conv1D":
            yield from _matrices(skeleton, block, f"{name}.weight", transposed=True)
        elif not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and min(parameter.shape[1:]) >= _SMALLEST_SIDE:
                    yield from _matrices(skeleton, block, f"{name}.{leaf}", transposed=False)


def all_linears(skeleton: Skeleton, block: int) -> list[Linear]:
    """Every linear of a block that can be taken, in the model's order."""
    return [item for item in block_linears(skeleton, block) if isinstance(item, Linear)]


def _matrices(
    skeleton: Skeleton, block: int, parameter: str, *, transposed: bool
) -> Iterator[Linear | Unpacked]:
    pieces = skeleton.stored.pieces(parameter)
    if pieces is None:
        yield Unpacked(
            parameter,
            "stored as one tensor for all experts, for which no portable packed layout exists"
            if "expert" in parameter
            else "stored in a form whose rows are not the layer's",
        )
        return
    for piece in pieces:
        shape = skeleton.checkpoint.tensors[piece.tensor].shape
        if not piece.tensor.endswith(".weight"):
            yield Unpacked(piece.tensor, "its name on disk does not end in .weight")
            continue
        out_features, in_features = shape[::-1] if transposed else shape
        name = piece.tensor.removesuffix(".weight")
        if min(shape) < _SMALLEST_SIDE:
            yield Unpacked(name, f"{out_features} x {in_features}: a gate, too small to gain")
            continue
        yield Linear(
            name,
            block,
            parameter,
            piece.expert,
            piece.start,
            piece.stop,
            out_features,
            in_features,
            transposed,
        )
