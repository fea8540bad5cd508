"""Calibration data shared out among ranks: each runs its chunks, and statistics are added up.

Chunk i of all the data is rank i mod size's. Sums over all ranks have the same terms as one
process's, the held-out chunks are the same ones, and the order of additions, which differs, does
not change what comes out (sums.py). What is decided by looking at the first chunk (which linears
share an input, where streams are compared) is rank 0's decision everywhere. With the same sums
every rank then solves the same block by itself, and is asked whether it came to the same weights.
So the same command writes the same bytes, and another number of ranks too where each computes with
as many threads: `torchrun` gives each of several one, if OMP_NUM_THREADS does not say otherwise.

Ranks are the processes that `torchrun` starts, on one machine or several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from qtool.calibration.activations import Activations
from qtool.calibration.capture import HELD_OUT_EVERY, BlockCapture
from qtool.calibration.groups import Compared, InputGroup
from qtool.calibration.linears import Site
from qtool.calibration.placement import CPU
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Drift, Moments
from qtool.calibration.sums import DriftSums, MomentSums
from qtool.errors import QtoolError, UsageError
from qtool.settings import Launched

T = TypeVar("T")

# For the slowest thing that one rank does while others wait: rank 0 checks what was written before.
TIMEOUT = timedelta(hours=1)
MEETING_TIMEOUT = timedelta(minutes=5)


class DataRanks:
    """One of `size` ranks, and what it does with the others. All call the same in the same order.

    group  of torch.distributed; None: all of this program's processes
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def leave(self) -> None:
        """What is done from here on is done alone, and must not look shared: libraries that see a
        group of processes share out work of their own.
        """
        if self._group is None:
            dist.destroy_process_group()

    def add_up(self, tensor: Tensor) -> None:
        """The sum over the ranks, in place."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> None:
        """The largest of the ranks' numbers, in place."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        """Ranks meet in the machines' memory, wherever each has its tensor."""
        here = tensor.to(CPU)
        with _others():
            dist.all_reduce(here, operation, group=self._group)
        if here is not tensor:
            tensor.copy_(here)

    def count(self, number: int) -> int:
        """The sum of the ranks' numbers."""
        total = torch.tensor(number)
        self.add_up(total)
        return int(total)

    def from_first(self, value: T) -> T:
        """Rank 0's value."""
        holder: list[Any] = [value]
        with _others():
            dist.broadcast_object_list(holder, src=0, group=self._group)
        found: T = holder[0]
        return found

    def own_chunks(self, tokens: Tensor, size: int) -> Tensor:
        """This rank's sequences of tokens [sequences, length], of chunks of `size` sequences."""
        chunks: tuple[Tensor, ...] = torch.split(tokens, size)
        if len(chunks) < self.size:
            raise UsageError(
                f"{len(chunks)} chunks of calibration data cannot be shared by {self.size} ranks",
                f"start {len(chunks)} or fewer, or calibrate with more (--num-samples)",
            )
        return torch.cat(chunks[self.rank :: self.size])

    def require_same(self, digests: Mapping[str, str]) -> None:
        """Of each rank's solved weights."""
        first = self.from_first(dict(digests))
        other = next((name for name in digests if digests[name] != first.get(name)), None)
        if self.count(other is not None):
            name = f" {other}" if other is not None else ""
            raise QtoolError(
                f"ranks came to different weights{name} by the same statistics",
                "all ranks need the same processors, threads and versions of torch",
            )

    def sum_moments(self, sums: MomentSums) -> None:
        for tensor in (sums.squares.flat, sums.magnitude):
            self.add_up(tensor)
        self.largest(sums.peak)
        sums.count = self.count(sums.count)

    def sum_drift(self, drift: DriftSums) -> None:
        for tensor in (drift.cross, drift.held_cross):
            self.add_up(tensor)
        self.sum_moments(drift.held)


@contextmanager
def _others() -> Iterator[None]:
    """Around what needs all ranks."""
    try:
        yield
    except RuntimeError as error:
        raise QtoolError(
            f"another rank has ended: {error}",
            "see what it said; the same command goes on from the last block that was finished",
        ) from error


@contextmanager
def joined_ranks(launch: Launched | None) -> Iterator[DataRanks | None]:
    """The ranks of the program that torchrun has started; None where it has not."""
    if launch is None:
        yield None
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING_TIMEOUT))
        store.set_timeout(MEETING_TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise QtoolError(
            f"rank {launch.rank} of {launch.size} cannot meet the others at {launch.meeting}: "
            f"{error}",
            "another --master-port for torchrun, or a --master-addr that all machines reach",
        ) from error
    try:
        yield DataRanks()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class SharedCapture(BlockCapture):
    """A `BlockCapture` of this rank's chunks that tells of all ranks' chunks."""

    def __init__(
        self,
        ranks: DataRanks,
        skeleton: Skeleton,
        runner: BlockRunner,
        activations: Activations,
        index: int,
        folder: Path,
    ) -> None:
        super().__init__(skeleton, runner, activations, index, folder)
        self._ranks = ranks
        self._num_all_chunks = ranks.count(runner.num_chunks)

    def trace(self, sites: Iterable[Site]) -> list[InputGroup]:
        return self._ranks.from_first(super().trace(sites))

    def compared(
        self, groups: Sequence[InputGroup], weights: Mapping[Site, Tensor]
    ) -> dict[Site, Compared]:
        return self._ranks.from_first(super().compared(groups, weights))

    def _moments(self, sums: MomentSums) -> Moments:
        self._ranks.sum_moments(sums)
        return super()._moments(sums)

    def _moments_and_drift(
        self, sums: MomentSums, drift: DriftSums | None
    ) -> tuple[Moments, Drift]:
        assert drift is not None
        self._ranks.sum_moments(sums)
        self._ranks.sum_drift(drift)
        return super()._moments_and_drift(sums, drift)

    def is_held_out(self, chunk: int) -> bool:
        return super().is_held_out(chunk * self._ranks.size + self._ranks.rank)

    @property
    def has_held_out(self) -> bool:
        return self._num_all_chunks >= HELD_OUT_EVERY
