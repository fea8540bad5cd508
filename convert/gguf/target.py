"""Types for a wanted size: bits go where they remove most error.

Every set of tensors begins at the smallest type of a ladder; the step that removes most error per
byte is taken, again and again, until none fits the budget. A tensor's error is that of the linear's
output, relative, under the diagonal of its inputs' second moment (all ones without importance):

    sum_rows sum_columns E[x²] (w - ŵ)²  /  sum_rows sum_columns E[x²] w²

measured by quantizing evenly spaced rows. Relative errors make linears of all sizes count alike, so
small ones get more bits, as the fixed mixes do with attn_v. Matrices that runtimes multiply as one
(q, k, v; gate, up) share a type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.gguf.mix import block_number, category, fitting_type
from qtool.convert.gguf.mix_rules import Category
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.errors import UsageError

LADDER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# The file type that is noted for a file whose most frequent type this is.
FILE_TYPE_OF = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
SAMPLED_WEIGHTS = 1 << 17

_FUSED: tuple[tuple[Category, ...], ...] = (("q", "k", "v"), ("gate", "up"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor whose type is to be found.

    read  its values, float32 [rows, columns], when asked
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    importance: Tensor | None

    def nbytes(self, type: str) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * TENSOR_TYPES[type].row_bytes(self.shape[-1])


class Rung(NamedTuple):
    """What a set of tensors costs at one step of the ladder."""

    nbytes: int
    error: float


def types_for_bits(
    candidates: Sequence[Candidate], bits: float, *, fixed_bytes: int, num_weights: int
) -> dict[str, str]:
    """The type of each candidate so that the file's tensors have at most `bits` a weight.

    fixed_bytes  of the tensors that are no candidates; num_weights counts theirs too
    """
    tied = all(candidate.name != "output.weight" for candidate in candidates)
    sets: dict[tuple[int, str], list[Candidate]] = {}
    for candidate in candidates:
        sets.setdefault(_set_of(candidate.name, tied=tied), []).append(candidate)
    ladders = {key: ladder(members) for key, members in sets.items()}
    budget = int(bits * num_weights / 8) - fixed_bytes
    steps = climb(ladders, budget)
    if steps is None:
        low, high = (
            8 * (fixed_bytes + sum(rungs[end].nbytes for rungs in ladders.values())) / num_weights
            for end in (0, -1)
        )
        raise UsageError(
            f"{bits:g} bits a weight are too few: this model takes {low:.2f} to {high:.2f}",
            "its embeddings and rows that fit no K-quant block count too",
        )
    return {
        member.name: fitting_type(LADDER[steps[key]], member.shape[-1])
        for key, members in sets.items()
        for member in members
    }


def _set_of(name: str, *, tied: bool) -> tuple[int, str]:
    kind = category(name, tied=tied)
    fused = next((kinds for kinds in _FUSED if kind in kinds), None)
    block = block_number(name)
    return (block, name) if fused is None or block < 0 else (block, "+".join(fused))


def ladder(members: Sequence[Candidate]) -> list[Rung]:
    """A set's cost at each step of LADDER; errors never rise along it."""
    sizes = [0] * len(LADDER)
    errors = [0.0] * len(LADDER)
    for member in members:
        rows = _sample(member)
        importance = member.importance
        if importance is not None and importance.numel() != rows.shape[1]:
            importance = None  # an expert's own; the sample is of the first
        for step, name in enumerate(LADDER):
            type = fitting_type(name, member.shape[-1])
            sizes[step] += member.nbytes(type)
            errors[step] += relative_error(rows, type, importance)
    for step in range(1, len(LADDER)):
        errors[step] = min(errors[step], errors[step - 1])
    return [Rung(nbytes, error) for nbytes, error in zip(sizes, errors, strict=True)]


def _sample(member: Candidate) -> Tensor:
    values = member.read()
    count = max(1, SAMPLED_WEIGHTS // values.shape[1])
    if values.shape[0] <= count:
        return values
    return values[torch.linspace(0, values.shape[0] - 1, count).long()]


def relative_error(rows: Tensor, type: str, importance: Tensor | None) -> float:
    weights = torch.ones(rows.shape[1]) if importance is None else importance
    read = BLOCK_CODECS[type].dequantize(quantize(type, rows, importance))
    energy = float((rows.square() @ weights).sum())
    return float(((rows - read).square() @ weights).sum()) / energy if energy > 0 else 0.0


def climb(
    ladders: Mapping[tuple[int, str], Sequence[Rung]], budget: int
) -> dict[tuple[int, str], int] | None:
    """The step of each set; None where not even the first steps fit."""
    at = dict.fromkeys(ladders, 0)
    left = budget - sum(rungs[0].nbytes for rungs in ladders.values())
    if left < 0:
        return None
    while True:
        best: tuple[float, tuple[int, str], int] | None = None
        for key, rungs in ladders.items():
            here = rungs[at[key]]
            for step in range(at[key] + 1, len(rungs)):
                cost = rungs[step].nbytes - here.nbytes
                gain = here.error - rungs[step].error
                if cost > left or gain <= 0:
                    continue
                worth = gain / max(cost, 1)
                if best is None or worth > best[0]:
                    best = (worth, key, step)
        if best is None:
            return at
        _, key, step = best
        left -= ladders[key][step].nbytes - ladders[key][at[key]].nbytes
        at[key] = step
