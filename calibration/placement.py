"""Where a model is worked on: a device for each block, and one for what lies before the blocks.

Only the block that is being worked on is ever on its device. What goes through the blocks (hidden
states, and what a chunk needs in order to go on) lies on the device where it is small enough, else
in the machine's memory, pinned for a CUDA device, else in a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Placement:
    """outside  embeddings, rotary tables: all that is not a block
    blocks   one device each; empty where all of them are on the one of `outside`
    kept_bytes  that one stream of hidden states may take on a device that is no CPU
    bfloat16  whether every device multiplies bfloat16 itself
    """

    outside: torch.device = CPU
    blocks: tuple[torch.device, ...] = ()
    kept_bytes: int = 0
    bfloat16: bool = False

    def block(self, index: int) -> torch.device:
        return self.blocks[index] if self.blocks else self.outside

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Each once, in the order of the blocks."""
        return tuple(dict.fromkeys(self.blocks or (self.outside,)))


def has_fast_bfloat16(device: torch.device = CPU) -> bool:
    """Whether a device multiplies bfloat16 itself. For processors: 2.4 times float32's speed on a
    Zen 5 core (190 against 75 GFLOP/s at 4096 x 768 x 256), and slower than float32 where it does
    not. For CUDA: compute capability 8 and later.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def device_peak_bytes(device: torch.device) -> int | None:
    """The most that this process's tensors have held of a device; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def moved(value: Any, device: torch.device) -> Any:
    """All tensors in nested tuples, lists and dicts on a device; other things as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is tuple or type(value) is list:
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {name: moved(item, device) for name, item in value.items()}
    return value
