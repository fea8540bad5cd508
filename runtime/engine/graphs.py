"""Decoding steps, recorded once for each size of batch and replayed with other numbers.

A step of a small model is hundreds of launches of a few microseconds each; replaying a recording is
one. What changes between steps (tokens, positions, pages, lengths, how tokens are drawn) lies in
buffers that never move. A batch takes the recording of the next size above; rows beyond it have no
tokens: their attention is zero, nothing of them is cached, and nobody reads what they draw.

A size is recorded when it is first needed, and drawing tokens is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qtool.kernels.cuda import sampling
from qtool.kernels.cuda.launch import num_multiprocessors
from qtool.kernels.cuda.paged_attention import (
    AttentionShape,
    StepTables,
    Tiles,
    choose_parts,
    small_rows,
)
from qtool.kernels.cuda.sampling import Draw, Draws, shorten
from qtool.runtime.engine.batch import Batch

# Sequences in a recorded step: 1, 2, 4, 8, then every eighth.
SIZES = (1, 2, 4, *range(8, 257, 8))


class Outputs(NamedTuple):
    """logits [rows, vocab] float32, tokens [rows] int64, finite [rows] int32"""

    logits: Tensor
    tokens: Tensor
    finite: Tensor


Replay = Callable[[], None]


class Record(Protocol):
    def __call__(self, compute: Callable[[], Outputs]) -> tuple[Outputs, Replay]:
        """Outputs that never move, and what computes them anew."""
        ...


def record_cuda(compute: Callable[[], Outputs]) -> tuple[Outputs, Replay]:
    """As a CUDA graph."""
    # Once before, beside it: kernels are compiled and libraries take their workspaces.
    beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        compute()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = compute()
    return outputs, graph.replay


class StepLogits(Protocol):
    def __call__(self, token_ids: Tensor, positions: Tensor, tables: StepTables) -> Tensor:
        """Logits [rows, vocab] float32 of a decoding step."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a recorded step of some size reads, and the same on the host, where it is filled.

    longs   [3, rows] int64: tokens, positions, slots
    ints    [2, rows] int32: lengths, top_k
    floats  [4, rows]: temperature, top_p, min_p, number
    pages   [rows, width] int32
    held    for each row the pages that were written last: a sequence gets one in many steps
    """

    longs: Tensor
    ints: Tensor
    floats: Tensor
    pages: Tensor
    host: tuple[Tensor, Tensor, Tensor, Tensor]
    held: list[list[int]]

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Inputs:
        """Of rows without tokens."""
        pin = device.type == "cuda"
        longs = torch.zeros((3, rows), dtype=torch.int64, pin_memory=pin)
        ints = torch.zeros((2, rows), dtype=torch.int32, pin_memory=pin)
        floats = torch.zeros((4, rows), pin_memory=pin)
        pages = torch.zeros((rows, width), dtype=torch.int32, pin_memory=pin)
        host = (longs, ints, floats, pages)
        longs[2] = -1
        floats[1] = 1.0
        # clone: on a CPU, `to` would give the host's own.
        moved = [part.clone().to(device) for part in host]
        return cls(moved[0], moved[1], moved[2], moved[3], host, [[] for _ in range(rows)])

    def fill(self, batch: Batch, draws: Sequence[Draw], block_size: int) -> None:
        """From a decoding batch; rows beyond it have no tokens."""
        longs, ints, floats, pages = self.host
        spans = batch.spans
        rows = len(spans)
        longs[:, rows:] = torch.tensor([[0], [0], [-1]])
        ints[:, rows:] = 0
        floats[:, rows:] = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
        last = [span.length - 1 for span in spans]
        slots = [
            span.block_ids[place // block_size] * block_size + place % block_size
            for span, place in zip(spans, last, strict=True)
        ]
        longs[2, :rows] = torch.tensor(slots)
        ints[0, :rows] = torch.tensor([span.length for span in spans], dtype=torch.int32)
        ints[1, :rows] = torch.tensor([draw.top_k for draw in draws], dtype=torch.int32)
        floats[:, :rows] = torch.tensor(
            [[draw.temperature, draw.top_p, draw.min_p, shorten(draw.number)] for draw in draws]
        ).t()
        changed = False
        for row, span in enumerate(spans):
            block_ids = list(span.block_ids[: -(-span.length // block_size)])
            before = self.held[row]
            same = len(before) if block_ids[: len(before)] == before else 0
            if same < len(block_ids):
                new = torch.tensor(block_ids[same:], dtype=torch.int32)
                pages[row, same : len(block_ids)] = new
                self.held[row] = block_ids
                changed = True
        self.longs.copy_(longs, non_blocking=True)
        self.ints.copy_(ints, non_blocking=True)
        self.floats.copy_(floats, non_blocking=True)
        if changed:
            self.pages.copy_(pages, non_blocking=True)
        # These are on the device already.
        self.longs[0, :rows] = batch.token_ids
        self.longs[1, :rows] = batch.positions

    @property
    def draws(self) -> Draws:
        temperatures, top_ps, min_ps, numbers = self.floats.unbind()
        return Draws(temperatures, self.ints[1], top_ps, min_ps, numbers)

    def tables(self, shapes: Sequence[AttentionShape], max_model_len: int) -> StepTables:
        rows, device = len(self.pages), self.pages.device
        num_sms = num_multiprocessors(device)
        numbers = torch.arange(rows + 1, dtype=torch.int32, device=device)
        tiles: dict[AttentionShape, tuple[Tiles, ...]] = {
            shape: (
                Tiles(
                    sequences=numbers[:-1],
                    firsts=torch.zeros(rows, dtype=torch.int32, device=device),
                    rows=small_rows(shape),
                    parts=choose_parts(rows, shape, max_model_len, num_sms),
                    tokens=1,
                ),
            )
            for shape in shapes
        }
        return StepTables(self.pages, numbers, self.ints[0], self.longs[2], tiles)


class _Recorded(NamedTuple):
    inputs: Inputs
    outputs: Outputs
    replay: Replay


class DecodeGraphs:
    """Recordings of `compute`, by the size of the batch."""

    def __init__(
        self,
        compute: StepLogits,
        shapes: Sequence[AttentionShape],
        *,
        block_size: int,
        max_model_len: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self._compute = compute
        self._shapes = shapes
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._device = device
        self._record = record
        self._recorded: dict[int, _Recorded] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """That have been recorded."""
        return tuple(sorted(self._recorded))

    def takes(self, batch: Batch) -> bool:
        """Whether it is a decoding step, of a size that is recorded."""
        spans = batch.spans
        return (
            len(spans) <= SIZES[-1]
            and len(batch.token_ids) == len(batch.sampled_rows) == len(spans)
            and all(span.length <= self._max_model_len for span in spans)
        )

    def logits(self, batch: Batch) -> Tensor:
        """[rows, vocab] float32, good until the next step."""
        draws = [Draw()] * len(batch.spans)
        return self._run(batch, draws).logits[: len(draws)]

    def draw(self, batch: Batch, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Tokens and whether their rows are finite, [rows], good until the next step."""
        found = self._run(batch, draws)
        return found.tokens[: len(draws)], found.finite[: len(draws)]

    def _run(self, batch: Batch, draws: Sequence[Draw]) -> Outputs:
        size = next(size for size in SIZES if size >= len(batch.spans))
        recorded = self._recorded.get(size)
        if recorded is None:
            recorded = self._recorded[size] = self._make(size)
        recorded.inputs.fill(batch, draws, self._block_size)
        recorded.replay()
        return recorded.outputs

    def _make(self, size: int) -> _Recorded:
        width = -(-self._max_model_len // self._block_size)
        inputs = Inputs.empty(size, width, self._device)
        tables = inputs.tables(self._shapes, self._max_model_len)
        tokens, positions, _ = inputs.longs.unbind()

        def compute() -> Outputs:
            logits = self._compute(tokens, positions, tables)
            return Outputs(logits, *sampling.draw_tokens(logits, inputs.draws))

        outputs, replay = self._record(compute)
        return _Recorded(inputs, outputs, replay)
