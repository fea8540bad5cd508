"""Which devices a model is quantized on, and what of it lies where.

One block is worked on at a time, read from the checkpoint when its turn comes, so a device needs
room for the largest block and its statistics, however large the model is. On one device, embeddings
lie there too where there is room, else in the machine's memory. A device map spreads blocks as
accelerate would for inference, in order over the devices, each to be calibrated and solved where it
lies; what accelerate leaves in the machine's memory or on disk is worked on by the first device, as
accelerate runs it. All that is decided from shapes, before any weight is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from qtool.calibration.placement import CPU, Placement, has_fast_bfloat16
from qtool.calibration.skeleton import Skeleton
from qtool.errors import UsageError
from qtool.quantize.device_memory import BlockBytes, block_bytes, outside_bytes
from qtool.quantize.plan import Plan
from qtool.recipe import Recipe
from qtool.units import size_text

# Of what a device has free: the rest is for its libraries and what does not fit between tensors.
_USABLE_SHARE = 0.9
# Streams of hidden states that may be kept at once: two models' own, points of one, what chunks
# need in order to go on.
_STREAMS = 8
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Accelerator(NamedTuple):
    """A device of this machine that is no CPU.

    name  of the kind
    free_bytes  asks the device, which takes some of its memory for this process
    """

    device: torch.device
    name: str
    free_bytes: Callable[[], int]


def accelerators() -> list[Accelerator]:
    """The CUDA devices of this machine."""
    if not torch.cuda.is_available():
        return []
    return [
        Accelerator(
            torch.device("cuda", index),
            torch.cuda.get_device_name(index),
            partial(_free_bytes, index),
        )
        for index in range(torch.cuda.device_count())
    ]


def _free_bytes(index: int) -> int:
    free: int = torch.cuda.mem_get_info(index)[0]
    return free


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """What was asked for.

    name        auto, cpu, cuda or cuda:N
    spread      over all devices, by accelerate
    max_memory  bytes by "0", "1" ... and "cpu"
    local_rank  of several processes that share this machine's devices
    """

    name: str = "auto"
    spread: bool = False
    max_memory: Mapping[str, int] = field(default_factory=dict)
    local_rank: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.name):
            raise UsageError(
                f"--device {self.name!r} is not a device", "auto, cpu, cuda, or cuda:1 and so on"
            )
        if self.spread and self.name != "auto":
            raise UsageError(
                f"--device {self.name} is one device and --device-map auto is all of them",
                "give one of the two",
            )


def parse_max_memory(text: str) -> dict[str, int]:
    """Bytes by device.

    >>> parse_max_memory("0=10GiB,cpu=30GB")
    {'0': 10737418240, 'cpu': 30000000000}
    """
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\d+|cpu)=(\d+(?:\.\d+)?)\s*([KMG]I?B)", part.strip(), re.IGNORECASE)
        if match is None:
            raise UsageError(
                f"--max-memory {part.strip()!r} is not a device and a size",
                "for example 0=10GiB,1=10GiB,cpu=30GiB",
            )
        found[match[1].lower()] = int(float(match[2]) * _UNITS[match[3].upper()])
    return found


class Room(NamedTuple):
    """A device and the bytes that may be used of it."""

    device: torch.device
    limit_bytes: int


def choose(request: DeviceRequest, found: Sequence[Accelerator]) -> tuple[Room, ...]:
    """The devices to use of those that the machine has; none: the CPU. UsageError where one is
    asked for that is not there."""
    local_rank = request.local_rank
    limited = [int(name) for name in request.max_memory if name.isdigit()]
    if request.name == "cpu":
        if limited:
            raise UsageError(
                f"--max-memory names device {limited[0]}, and --device cpu uses none",
                "leave one of the two out",
            )
        return ()
    here = f"{len(found)} ({', '.join(item.name for item in found)})" if found else "none"
    wanted = request.name.partition(":")[2]
    for index in (*([int(wanted)] if wanted else []), *limited):
        if index >= len(found):
            raise UsageError(
                f"there is no CUDA device {index}; this machine has {here}",
                _way_out(found),
            )
    if not found:
        if request.name == "auto" and not request.spread:
            return ()
        asked = "--device-map auto" if request.spread else f"--device {request.name}"
        raise UsageError(f"{asked} needs a CUDA device; this machine has none", "use --device cpu")

    def rooms(*numbers: int) -> tuple[Room, ...]:
        return tuple(Room(found[i].device, _limit(request, found[i], i)) for i in numbers)

    if request.spread:
        if local_rank is not None:
            raise UsageError(
                "--device-map auto is for one process, and torchrun has started several",
                "leave it out: each rank takes a device of its own",
            )
        return rooms(*(limited or range(len(found))))
    if wanted:
        return rooms(int(wanted))
    if local_rank is not None and local_rank >= len(found):
        raise UsageError(
            f"rank {local_rank} of this machine finds {here} CUDA devices",
            f"torchrun --nproc-per-node {len(found)}, or --device cpu",
        )
    if local_rank is None and len(limited) == 1:
        return rooms(limited[0])
    return rooms(local_rank or 0)


def _way_out(found: Sequence[Accelerator]) -> str:
    if not found:
        return "use --device cpu"
    return f"cuda:0 to cuda:{len(found) - 1}, or cpu" if len(found) > 1 else "use cuda:0, or cpu"


def _limit(request: DeviceRequest, item: Accelerator, index: int) -> int:
    usable = int(item.free_bytes() * _USABLE_SHARE)
    return min(usable, request.max_memory.get(str(index), usable))


class Placed(NamedTuple):
    """placement  for the skeleton
    block     what the largest block takes of its device, None where all is on the CPU
    outside_bytes  of embeddings, wherever they are
    warnings  what was decided against the first choice
    """

    placement: Placement
    block: BlockBytes | None
    outside_bytes: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        block = self.block
        return {
            "outside": str(self.placement.outside),
            "outside_bytes": self.outside_bytes,
            "blocks": [str(device) for device in self.placement.blocks],
            "block_bytes": None if block is None else {**asdict(block), "total": block.total},
            "kept_bytes_a_stream": self.placement.kept_bytes,
        }


ON_CPU = Placed(Placement(), None, 0)


def place(
    skeleton: Skeleton, plan: Plan, recipe: Recipe, request: DeviceRequest, rooms: Sequence[Room]
) -> Placed:
    """What lies where. UsageError where a block does not fit."""
    on_cpu = Placement(bfloat16=has_fast_bfloat16())
    outside = outside_bytes(skeleton)
    if not rooms:
        return Placed(on_cpu, None, outside)
    needs = [block_bytes(skeleton, plan, recipe, index) for index in range(len(skeleton.blocks))]
    largest = max(needs, key=lambda need: need.total)
    best = max(rooms, key=lambda room: room.limit_bytes)
    if largest.total > best.limit_bytes:
        said = (
            f"a block takes {size_text(largest.total)} of a device while it is quantized, and "
            f"{best.device} may use {size_text(best.limit_bytes)}"
        )
        if request.name == "auto" and not request.spread and not request.max_memory:
            return Placed(on_cpu, None, outside, (f"{said}: quantized on the CPU",))
        raise UsageError(said, "raise --max-memory, or use --device cpu")
    where = _homes(skeleton, rooms, needs, request) if len(rooms) > 1 else {}
    blocks = [where.get(index, rooms[0]) for index in range(len(needs))]
    for index, need in enumerate(needs):
        if need.total > blocks[index].limit_bytes:
            blocks[index] = best
    used = {room.device: room for room in blocks}
    busiest = {
        device: max(need.total for need, room in zip(needs, blocks, strict=True) if room == mine)
        for device, mine in used.items()
    }
    left = {room.device: room.limit_bytes - busiest.get(room.device, 0) for room in rooms}
    home = next((room.device for room in rooms if left[room.device] >= outside), CPU)
    if home != CPU:
        left[home] -= outside
    kept = min(left[device] for device in used) // _STREAMS
    placement = Placement(
        home,
        tuple(room.device for room in blocks),
        kept,
        all(has_fast_bfloat16(device) for device in used),
    )
    return Placed(placement, largest, outside)


def _homes(
    skeleton: Skeleton, rooms: Sequence[Room], needs: Sequence[BlockBytes], request: DeviceRequest
) -> dict[int, Room]:
    """The device of each block in accelerate's map; those that it leaves on no device are left
    out."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    classes = sorted({type(block).__name__ for block in skeleton.blocks})
    # Beside the weights that a map is made for, a device works on one block.
    working = max(need.total - need.weights for need in needs)
    sizes: dict[Any, int] = {
        number: max(0, room.limit_bytes - working) for number, room in enumerate(rooms)
    }
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes["cpu"] = request.max_memory.get("cpu", physical)
    options: dict[str, Any] = {"no_split_module_classes": classes, "dtype": torch.float32}
    if not request.max_memory:
        sizes = get_balanced_memory(skeleton.model, sizes, **options)
    found = infer_auto_device_map(skeleton.model, sizes, **options)
    homes = {}
    for index in range(len(skeleton.blocks)):
        name = skeleton.block_name(index)
        while name and name not in found:
            name = name.rpartition(".")[0]
        place = found.get(name)
        if isinstance(place, int):
            homes[index] = rooms[place]
    return homes


def kinds(skeleton: Skeleton) -> list[str]:
    """What each block is worked on by: other kinds add up in another order."""
    devices = [skeleton.placement.block(index) for index in range(len(skeleton.blocks))]
    return [
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        for device in devices
    ]
