"""What a device lets Triton kernels do: whether they run there at all, and in which form.

Triton itself is imported when a kernel is first launched, and never by a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The first of NVIDIA's architectures with bfloat16 products and asynchronous copies.
LEAST_CAPABILITY = (8, 0)
FLOAT8_CAPABILITY = (8, 9)
# From here on products take weights from registers in the order of the words.
WGMMA_CAPABILITY = (9, 0)


class Launch(NamedTuple):
    """How kernels are compiled for a device.

    has_assembly      whether they may hold NVIDIA's assembly
    inputs_by_thread  see `device.words.weight_tile`
    has_wgmma         whether products run beside other instructions and take shared memory as it is
    """

    has_assembly: bool
    inputs_by_thread: bool
    has_wgmma: bool

    @classmethod
    def on(cls, device: torch.device) -> Launch:
        if device.type != "cuda" or torch.version.hip is not None:
            return cls(has_assembly=False, inputs_by_thread=False, has_wgmma=False)
        return _on_nvidia(torch.cuda.get_device_capability(device))


@functools.cache
def _on_nvidia(capability: tuple[int, int]) -> Launch:
    if capability >= WGMMA_CAPABILITY:
        return Launch(has_assembly=True, inputs_by_thread=False, has_wgmma=True)
    # Which order costs no exchange depends on Triton's version: ask what it compiles.
    from qtool.kernels.aot import wants_inputs_by_thread

    try:
        by_thread = wants_inputs_by_thread(capability)
    except (OSError, subprocess.SubprocessError):
        # Not every build of Triton has the tools to look; either order gives the same numbers.
        by_thread = False
    return Launch(has_assembly=True, inputs_by_thread=by_thread, has_wgmma=False)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def obstacle(device: torch.device) -> str | None:
    """Why Triton kernels do not run on the device; None if they do."""
    if device.type != "cuda":
        return f"runs on cuda, not {device.type}"
    if not has_triton():
        return "needs Triton, which is not installed (pip install triton)"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = ("{}.{}".format(*pair) for pair in (LEAST_CAPABILITY, capability))
        return f"needs compute capability {least}, this GPU has {found}"
    return None


def has_float8(device: torch.device) -> bool:
    """Whether the GPU knows 8-bit floats (e4m3)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942"; "cpu" where kernels are interpreted."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, in lists as deep as the tensor has dimensions. A GPU fetches them when it is there:
    whoever calls does not wait for what it still computes.
    """
    made = torch.tensor(values, dtype=dtype)
    return made if device.type == "cpu" else on_its_way(made, device)


def on_its_way(values: Tensor, device: torch.device) -> Tensor:
    """values on the CPU, which a GPU fetches when it is there; the tensor may be let go of at
    once, and must not be changed.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def num_multiprocessors(device: torch.device) -> int:
    """132, an H100's or H200's, where kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
