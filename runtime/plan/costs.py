"""How long a step takes: from a data sheet, or from what was measured.

    roofline   overhead + max(bytes / bandwidth, operations / arithmetic), for the linears and for
               attention apart, as they run one after the other
    measured   rows(M) + draws * seconds a draw + reads * seconds a read + pairs * seconds a pair

A step computes M rows: one for each sequence that decodes, and the tokens of prompt chunks. Every
row goes through the linears; each drawn token adds a row of the head; a decoding row reads what is
cached of its sequence, a chunk's rows attend to what is before them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

from qtool.errors import FormatError
from qtool.runtime.plan.hardware import ARITHMETIC_SHARE, BANDWIDTH_SHARE, STEP_SECONDS, Gpu
from qtool.runtime.plan.paper import PaperModel
from qtool.runtime.plan.variants import Variant


@dataclass(frozen=True, slots=True)
class StepShape:
    """num_rows   tokens that go through the model
    num_drawn     of them, those after which a token is drawn
    context_read  cached tokens that decoding rows attend to, summed
    pairs         query and key pairs of prompt chunks, summed
    """

    num_rows: int
    num_drawn: int
    context_read: float = 0.0
    pairs: float = 0.0


class StepCosts(Protocol):
    def seconds(self, step: StepShape) -> float:
        """Of one step."""


@dataclass(frozen=True, slots=True)
class RooflineCosts:
    """bytes and operations of a model in one form, over what a device gives.

    dense_bytes      of weights that every step reads, the head's among them
    expert_bytes     of all experts; a step reads those that some row chooses
    experts          (count, chosen a token), (1, 1) without
    """

    dense_bytes: float
    expert_bytes: float
    experts: tuple[int, int]
    row_operations: float
    head_operations: float
    kv_bytes_per_token: float
    attention_operations: float
    bytes_per_second: float
    operations_per_second: float
    attention_operations_per_second: float
    step_seconds: float = STEP_SECONDS

    @classmethod
    def of(
        cls,
        model: PaperModel,
        variant: Variant,
        gpu: Gpu,
        *,
        kv_int8: bool = False,
        num_gpus: int = 1,
    ) -> RooflineCosts:
        """num_gpus  that share every matrix (tensor parallel), without what talking costs"""
        linears = [matrix for matrix in model.matrices if matrix.is_linear]
        expert = sum(m.numel for m in linears if m.active < m.count)
        dense = sum(m.numel for m in linears) - expert
        active = sum(matrix.active_numel for matrix in linears)
        head = model.num_head_weights
        experts = model.config.experts
        return cls(
            dense_bytes=(dense * variant.linear_bits + head * variant.head_bits) / 8,
            expert_bytes=expert * variant.linear_bits / 8,
            experts=(1, 1) if experts is None else (experts.count, experts.per_token),
            row_operations=2.0 * active,
            head_operations=2.0 * head,
            kv_bytes_per_token=model.kv_bytes_per_token(int8=kv_int8),
            attention_operations=model.attention_operations,
            bytes_per_second=num_gpus * BANDWIDTH_SHARE * gpu.bandwidth_gb_s * 1e9,
            operations_per_second=num_gpus
            * ARITHMETIC_SHARE
            * gpu.operations_per_second(variant.multiplies_in),
            attention_operations_per_second=num_gpus
            * ARITHMETIC_SHARE
            * gpu.operations_per_second("bf16"),
        )

    def seconds(self, step: StepShape) -> float:
        count, chosen = self.experts
        # Of `count` experts, how many are chosen by at least one of the rows, at random.
        touched = 1.0 - (1.0 - chosen / count) ** step.num_rows
        weights = self.dense_bytes + touched * self.expert_bytes
        operations = step.num_rows * self.row_operations + step.num_drawn * self.head_operations
        linears = max(weights / self.bytes_per_second, operations / self.operations_per_second)
        reading = step.context_read * self.kv_bytes_per_token / self.bytes_per_second
        prompts = step.pairs * self.attention_operations / self.attention_operations_per_second
        return self.step_seconds + linears + reading + prompts


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """Of one model on one machine.

    rows              (M, seconds of a step of M rows that draws nothing), M rising from 1
    seconds_per_draw  head and sampler, for each token drawn
    seconds_per_read  for each cached token that a decoding row attends to
    seconds_per_pair  for each query and key pair of a prompt chunk
    """

    rows: tuple[tuple[int, float], ...]
    seconds_per_draw: float
    seconds_per_read: float
    seconds_per_pair: float

    def __post_init__(self) -> None:
        numbers = [number for number, _ in self.rows]
        if not numbers or numbers[0] != 1 or sorted(set(numbers)) != numbers:
            raise FormatError(f"steps were measured at {numbers} rows: must rise from 1")

    def seconds(self, step: StepShape) -> float:
        return (
            self._rows(step.num_rows)
            + step.num_drawn * self.seconds_per_draw
            + step.context_read * self.seconds_per_read
            + step.pairs * self.seconds_per_pair
        )

    def _rows(self, num_rows: int) -> float:
        """Straight between what was measured, and on as the last two are."""
        if num_rows <= 0 or len(self.rows) == 1:
            return self.rows[0][1] if num_rows > 0 else 0.0
        right = min(
            max(bisect_right(self.rows, num_rows, key=lambda row: row[0]), 1), len(self.rows) - 1
        )
        (low, before), (high, after) = self.rows[right - 1], self.rows[right]
        return before + (after - before) * (num_rows - low) / (high - low)
