"""Ranks as processes of one machine: sums of tensors, and parts gathered at rank 0.

torch.distributed's process groups, made without its global default group, so that one process can
be in several: gloo over this machine's loopback for CPUs, NCCL for GPUs. Ranks meet through a file
that only this user can read, and no port is chosen that somebody else could have taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from qtool.errors import UsageError

Backend = Literal["gloo", "nccl"]


class CutOff(RuntimeError):
    """What the others were to add did not come: one of them has ended, or waits itself."""


class ProcessGroup:
    """A `Collective` over processes; a sum that cannot be had raises CutOff."""

    def __init__(
        self, rank: int, size: int, meeting: Path, backend: Backend, *, timeout_seconds: float
    ) -> None:
        """Waits until all ranks have come to the file `meeting`.

        timeout_seconds  that a rank may be behind, which computes at most a layer more than others
        """
        timeout = timedelta(seconds=timeout_seconds)
        self.rank, self.size = rank, size
        make = _nccl if backend == "nccl" else _gloo
        with _cut_off():
            store = c10d.FileStore(str(meeting), size)
            store.set_timeout(timeout)
            self._group: Any = make(store, rank, size, timeout)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        with _cut_off():
            self._group.allreduce([tensor]).wait()
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        options = c10d.GatherOptions()
        options.rootRank = 0
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else []
        with _cut_off():
            self._group.gather([parts] if parts else [], [tensor], options).wait()
        return parts

    def abort(self) -> None:
        """End what waits for a rank that is gone, with an error."""
        self._group.abort()


@contextmanager
def _cut_off() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CutOff(str(error)) from error


def _gloo(store: c10d.Store, rank: int, size: int, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    # By itself it takes the interface that the host's name resolves to, which may be any or none.
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _nccl(store: c10d.Store, rank: int, size: int, timeout: timedelta) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)


def choose_backend(
    device: str, size: int, *, num_devices: int, has_nccl: bool, has_gloo: bool
) -> Backend:
    """num_devices, has_nccl, has_gloo  what this machine and its PyTorch have

    Raises UsageError where ranks cannot work together on it.
    """
    if device == "cpu":
        if not has_gloo:
            raise UsageError(
                f"{size} ranks on a CPU need gloo, and this PyTorch was built without it",
                "install one of PyTorch's own wheels, or use --tensor-parallel-size 1",
            )
        return "gloo"
    if num_devices < size:
        raise UsageError(
            f"--tensor-parallel-size {size} needs {size} GPUs, and this machine shows "
            f"{num_devices}",
            f"use --tensor-parallel-size {max(num_devices, 1)}, or look at CUDA_VISIBLE_DEVICES",
        )
    if not has_nccl:
        raise UsageError(
            f"{size} GPUs need NCCL, and this PyTorch was built without it",
            "install a CUDA build of torch for Linux, or use --tensor-parallel-size 1",
        )
    return "nccl"


def backend_here(device: torch.device, size: int) -> Backend:
    return choose_backend(
        device.type,
        size,
        num_devices=torch.cuda.device_count(),
        has_nccl=dist.is_available() and dist.is_nccl_available(),
        has_gloo=dist.is_available() and dist.is_gloo_available(),
    )
