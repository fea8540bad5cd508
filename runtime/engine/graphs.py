"""Decoding steps, recorded once for each size of batch and replayed with other numbers.

A step of a small model is hundreds of launches of a few microseconds each; replaying a recording is
one. What changes between steps (tokens, positions, pages, lengths, how tokens are drawn) lies in
buffers that never move. A batch takes the recording of the next size above; rows beyond it have no
tokens: their attention is zero, nothing of them is cached, and nobody reads what they draw.

Only one recording runs at a time, so all of them share what they keep: the buffers they read, those
they write, and the memory between (one pool of graphs). The largest size is recorded first, when
the first step comes, and takes all that there is to take; every other when it is first needed.
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


def sizes_for(max_num_seqs: int) -> tuple[int, ...]:
    """Those that batches of up to so many sequences take.

    >>> sizes_for(9)
    (1, 2, 4, 8, 16)
    """
    return tuple(
        size for size, smaller in zip(SIZES, (0, *SIZES), strict=False) if smaller < max_num_seqs
    )


class Outputs(NamedTuple):
    """logits [rows, vocab] float32, tokens [rows] int64, finite [rows] int32"""

    logits: Tensor
    tokens: Tensor
    finite: Tensor

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device) -> Outputs:
        return cls(
            torch.empty((rows, vocab), device=device),
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(rows, dtype=torch.int32, device=device),
        )

    def of_rows(self, rows: int) -> Outputs:
        return Outputs(self.logits[:rows], self.tokens[:rows], self.finite[:rows])


Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]


class CudaRecorder:
    """Records CUDA graphs over one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], None]) -> Replay:
        """What computes it anew."""
        # Once before, beside it: kernels are compiled and libraries take their workspaces.
        beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            compute()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        return graph.replay


class StepLogits(Protocol):
    def __call__(self, token_ids: Tensor, positions: Tensor, tables: StepTables) -> Tensor:
        """Logits [rows, vocab] float32 of a decoding step."""
        ...


@dataclass(slots=True, eq=False)
class Inputs:
    """What recorded steps read, and the same on the host, where it is filled: of as many rows as
    the largest step has; a smaller one reads the first.

    longs   [3, rows] int64: tokens, positions, slots
    ints    [2, rows] int32: lengths, top_k
    floats  [5, rows]: temperature, top_p, min_p, typical_p, number
    pages   [rows, width] int32
    held    for each row the pages that were written last: a sequence gets one in many steps
    copied  when the device has what was filled last; None: at once
    """

    longs: Tensor
    ints: Tensor
    floats: Tensor
    pages: Tensor
    host: tuple[Tensor, Tensor, Tensor, Tensor]
    held: list[list[int]]
    copied: torch.cuda.Event | None

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Inputs:
        """Of rows without tokens."""
        on_gpu = device.type == "cuda"
        longs = torch.zeros((3, rows), dtype=torch.int64, pin_memory=on_gpu)
        ints = torch.zeros((2, rows), dtype=torch.int32, pin_memory=on_gpu)
        floats = torch.zeros((5, rows), pin_memory=on_gpu)
        pages = torch.zeros((rows, width), dtype=torch.int32, pin_memory=on_gpu)
        host = (longs, ints, floats, pages)
        longs[2] = -1
        floats[[1, 3]] = 1.0
        copied: torch.cuda.Event | None = None
        if on_gpu:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # clone: on a CPU, `to` would give the host's own.
        moved = [part.clone().to(device) for part in host]
        held: list[list[int]] = [[] for _ in range(rows)]
        return cls(moved[0], moved[1], moved[2], moved[3], host, held, copied)

    def fill(self, batch: Batch, draws: Sequence[Draw], block_size: int) -> None:
        """From a decoding batch; rows beyond it have no tokens."""
        if self.copied is not None:
            # The device may be busy with the step before, whose numbers it has fetched by now.
            self.copied.synchronize()
        longs, ints, floats, pages = self.host
        spans = batch.spans
        rows = len(spans)
        longs[:, rows:] = torch.tensor([[0], [0], [-1]])
        ints[:, rows:] = 0
        floats[:, rows:] = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0]])
        last = [span.length - 1 for span in spans]
        slots = [
            span.block_ids[place // block_size] * block_size + place % block_size
            for span, place in zip(spans, last, strict=True)
        ]
        longs[2, :rows] = torch.tensor(slots)
        ints[0, :rows] = torch.tensor([span.length for span in spans], dtype=torch.int32)
        ints[1, :rows] = torch.tensor([draw.top_k for draw in draws], dtype=torch.int32)
        floats[:, :rows] = torch.tensor(
            [
                [draw.temperature, draw.top_p, draw.min_p, draw.typical_p, shorten(draw.number)]
                for draw in draws
            ]
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
            self.pages[:rows].copy_(pages[:rows], non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        # These are on the device already.
        self.longs[0, :rows] = batch.token_ids
        self.longs[1, :rows] = batch.positions

    def draws(self, rows: int) -> Draws:
        temperatures, top_ps, min_ps, typical_ps, numbers = self.floats[:, :rows].unbind()
        return Draws(temperatures, self.ints[1, :rows], top_ps, min_ps, typical_ps, numbers)

    def tables(self, rows: int, shapes: Sequence[AttentionShape], max_model_len: int) -> StepTables:
        device = self.pages.device
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
        lengths, slots = self.ints[0, :rows], self.longs[2, :rows]
        return StepTables(self.pages[:rows], numbers, lengths, slots, tiles)


class _Recorded(NamedTuple):
    """tables: what the recording reads beside the buffers, which has to stay where it is"""

    replay: Replay
    tables: StepTables


class DecodeGraphs:
    """Recordings of `compute`, by the size of the batch."""

    def __init__(
        self,
        compute: StepLogits,
        shapes: Sequence[AttentionShape],
        *,
        vocab_size: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self._compute = compute
        self._shapes = shapes
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._device = device
        self._record = record
        self._possible = sizes_for(max_num_seqs)
        self._buffers: tuple[Inputs, Outputs] | None = None
        self._recorded: dict[int, _Recorded] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """That have been recorded."""
        return tuple(sorted(self._recorded))

    def takes(self, batch: Batch) -> bool:
        """Whether it is a decoding step, of a size that is recorded."""
        spans = batch.spans
        return (
            len(spans) <= self._possible[-1]
            and len(batch.token_ids) == len(batch.sampled_rows) == len(spans)
            and all(span.length <= self._max_model_len for span in spans)
        )

    def logits(self, batch: Batch) -> Tensor:
        """[rows, vocab] float32, good until the next step."""
        return self._run(batch, [Draw()] * len(batch.spans)).logits

    def draw(self, batch: Batch, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Tokens and whether their rows are finite, [rows], good until the next step."""
        found = self._run(batch, draws)
        return found.tokens, found.finite

    def record_largest(self) -> None:
        """Take the buffers, and the memory that any recording needs."""
        self._find(self._possible[-1])

    def _run(self, batch: Batch, draws: Sequence[Draw]) -> Outputs:
        rows = len(batch.spans)
        size = next(size for size in self._possible if size >= rows)
        inputs, outputs, replay = self._find(size)
        inputs.fill(batch, draws, self._block_size)
        replay()
        return outputs.of_rows(rows)

    def _find(self, size: int) -> tuple[Inputs, Outputs, Replay]:
        largest = self._possible[-1]
        if self._buffers is None:
            width = -(-self._max_model_len // self._block_size)
            self._buffers = (
                Inputs.empty(largest, width, self._device),
                Outputs.empty(largest, self._vocab_size, self._device),
            )
        for wanted in (largest, size):
            if wanted not in self._recorded:
                self._recorded[wanted] = self._make(wanted, *self._buffers)
        return *self._buffers, self._recorded[size].replay

    def _make(self, size: int, inputs: Inputs, outputs: Outputs) -> _Recorded:
        tables = inputs.tables(size, self._shapes, self._max_model_len)
        tokens, positions, _ = inputs.longs[:, :size].unbind()
        draws, found = inputs.draws(size), outputs.of_rows(size)

        def compute() -> None:
            found.logits.copy_(self._compute(tokens, positions, tables))
            for kept, drawn in zip(
                (found.tokens, found.finite),
                sampling.draw_tokens(found.logits, draws),
                strict=True,
            ):
                kept.copy_(drawn)

        return _Recorded(self._record(compute), tables)
