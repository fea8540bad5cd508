"""How much of a device a block takes while it is quantized, from shapes alone.

    weights     the block's parameters in float32
    sums        float64 sums over the inputs of the linears that are looked at together
    forward     what a chunk makes on its way through the block, and bfloat16 copies of weights
    statistics  the sums, and the float32 matrices that are made of them in the end
    solving     the solver's matrices: Hessian, its factor and inverse, and slices of the weight

These come after each other: a block takes its weights and the largest of sums with a chunk,
statistics, and solving. Hidden states may lie in the machine's memory, so they are not part of what
is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qtool.calibration.linears import Linear
from qtool.calibration.runner import CHUNK_TOKENS
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.sums import squares_size
from qtool.quantize.plan import Plan
from qtool.recipe import Gptq, Recipe, Rtn

_FLOAT32, _FLOAT64 = 4, 8
# [in, in] matrices that are there at once: the Hessian, the damped one in order, its factor and the
# factor's inverse.
_SOLVER_MATRICES = 4
# Moments of all inputs, of the held-out ones, of the others, and a factor.
_CORRECTION_MATRICES = 4
# Temporaries of a slice of 64 MB of a weight.
_SLICES_BYTES = 6 * 64 * 2**20
# Tensors as wide as the widest linear that a block makes of a chunk and has at once.
_CHUNK_TENSORS = 6


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What one block takes of its device."""

    weights: int
    sums: int
    forward: int
    statistics: int
    solving: int

    @property
    def total(self) -> int:
        return self.weights + max(self.sums + self.forward, self.statistics, self.solving)


def block_bytes(skeleton: Skeleton, plan: Plan, recipe: Recipe, index: int) -> BlockBytes:
    """What block `index` takes."""
    weights = sum(item.numel() for _, item in skeleton.block_parameters(index)) * _FLOAT32
    linears = plan.block(index)
    if isinstance(recipe.method, Rtn) or not linears:
        # One linear at a time, read from the checkpoint.
        largest = max((linear.out_features * linear.in_features for linear in linears), default=0)
        return BlockBytes(0, 0, 0, 0, _SLICES_BYTES + 6 * _FLOAT32 * largest)
    sets = _sets(linears)
    one_by_one = isinstance(recipe.method, Gptq) and recipe.method.sequential
    together: Callable[[Iterable[int]], int] = max if one_by_one else sum
    sums = together(_sums(found, recipe.method) for found in sets)
    statistics = together(_statistics(found, recipe.method) for found in sets)
    widest = max(max(linear.in_features, linear.out_features) for linear in linears)
    forward = _CHUNK_TENSORS * CHUNK_TOKENS * widest * _FLOAT32 + weights // 2
    return BlockBytes(weights, sums, forward, statistics, max(map(_solving, sets)))


def outside_bytes(skeleton: Skeleton) -> int:
    """Embeddings and what else is no block and comes before them, as `load_outside` has them."""
    left = skeleton.head_alone()
    seen: dict[int, int] = {}
    for name, parameter in skeleton.outside.items():
        if name not in left and name in skeleton.stored:
            seen[id(parameter)] = parameter.numel() * skeleton.outside_dtype(name).itemsize
    buffers: int = sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in skeleton.model.named_buffers()
        if not name.startswith(f"{skeleton.prefix}.")
    )
    return sum(seen.values()) + buffers


def _sets(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Linears whose statistics are taken together: those of one module with as many inputs, and
    all experts of a parameter."""
    found: dict[tuple[str, int], list[Linear]] = {}
    for linear in linears:
        owner = linear.parameter if linear.expert is not None else _parent(linear.module)
        found.setdefault((owner, linear.in_features), []).append(linear)
    return list(found.values())


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def _sums(linears: list[Linear], method: object) -> int:
    width = linears[0].in_features
    squares = squares_size(width) * _FLOAT64
    if linears[0].expert is not None:
        return len({linear.expert for linear in linears}) * squares
    if not _is_compared(linears, method):
        return squares
    # Of all inputs and the held-out ones, and both of their products with the drift.
    rows = sum(linear.out_features for linear in linears)
    return 2 * squares + 2 * rows * width * _FLOAT64


def _statistics(linears: list[Linear], method: object) -> int:
    width = linears[0].in_features
    matrix = width * width * _FLOAT32
    sums = _sums(linears, method)
    if not _is_compared(linears, method):
        return sums + 2 * matrix
    rows = sum(linear.out_features for linear in linears)
    return sums + 2 * (matrix + rows * width * _FLOAT32)


def _is_compared(linears: list[Linear], method: object) -> bool:
    """With the original stream."""
    follows = isinstance(method, Gptq) and method.follows_original
    return follows and linears[0].expert is None


def _solving(linears: list[Linear]) -> int:
    width = linears[0].in_features
    experts = len({linear.expert for linear in linears})
    rows = sum(linear.out_features for linear in linears)
    matrix = width * width * _FLOAT32
    stacked = rows // experts * width * _FLOAT32
    # Experts wait with their statistics for those before them.
    waiting = (experts - 1) * matrix
    correcting = _CORRECTION_MATRICES * matrix + 5 * stacked
    solving = _SOLVER_MATRICES * matrix + 4 * stacked + min(_SLICES_BYTES, 6 * stacked)
    return waiting + max(correcting, solving)
