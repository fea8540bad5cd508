"""Layers with the statistics of real ones, small: correlated inputs, a few loud channels. And
accelerators where there are none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.calibration.placement import CPU
from qtool.calibration.recording import tensors_of


class Layer(NamedTuple):
    """weight [out, in], inputs [tokens, in], hessian [in, in] = E[x xᵀ]; all float32."""

    weight: Tensor
    inputs: Tensor
    hessian: Tensor


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    def make(rows: int = 48, columns: int = 128, tokens: int = 1024, seed: int = 0) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        rank = max(2, columns // 4)
        mixing = torch.randn(columns, rank, generator=generator) / math.sqrt(rank)
        inputs = torch.randn(tokens, rank, generator=generator) @ mixing.t()
        inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
        loudness = torch.exp(0.8 * torch.randn(columns, generator=generator))
        loudness[torch.randperm(columns, generator=generator)[: max(1, columns // 64)]] *= 10
        inputs *= loudness
        weight = 0.02 * torch.randn(rows, columns, generator=generator)
        return Layer(weight, inputs, inputs.t() @ inputs / tokens)

    return make


class PretendedDevices(TorchFunctionMode):
    """While inside, torch has two accelerators, `ipu:0` and `ipu:1`, that this machine lacks.

    Every tensor is one of the CPU's, and its storage is noted with the device that the program put
    it on. What would fail on a GPU fails here: an operation on tensors of two devices, and numpy's
    view of a tensor that is not the CPU's. So a test of the whole pass finds a tensor that was made
    on the wrong device without there being another one, and what comes out has the CPU's own bits.

    `peak_bytes` is the most that the tensors of all pretended devices held together.
    """

    def __init__(self) -> None:
        super().__init__()
        self._homes: dict[int, tuple[StorageWeakRef, torch.device, int]] = {}
        # For each call that is under way: the device of its tensors, or the one it asks for.
        self._inside: list[torch.device | None] = []
        self._to_cpu = False
        self._operations = _Operations(self)
        self._bytes_noted = 0
        self.peak_bytes = 0

    def __enter__(self) -> PretendedDevices:
        self._operations.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._operations.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.home(args[0])
        if func in (Tensor.numpy, Tensor.__array__) and self.home(args[0]) != CPU:
            raise TypeError(f"can't convert {self.home(args[0])} device type tensor to numpy")
        if func is Tensor.cpu:
            func, args = Tensor.to, (args[0], CPU)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.tensor and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return self._to(func(*args, **kwargs), device)
        homes = [self.home(tensor) for tensor in tensors_of((args, kwargs)) if not tensor.is_meta]
        asked = kwargs.get("device")
        # C++ makes tensors of its own beside those it was given.
        self._inside.append(next((home for home in homes if home != CPU), None))
        self._to_cpu = asked is not None and torch.device(asked) == CPU
        try:
            return func(*args, **kwargs)
        finally:
            self._inside.pop()
            self._to_cpu = False

    def home(self, tensor: Tensor) -> torch.device:
        if tensor.is_meta:
            return torch.device("meta")
        found = self._homes.get(tensor.untyped_storage()._cdata)
        return CPU if found is None else found[1]

    def settle(self, tensor: Tensor, device: torch.device) -> None:
        """Note where a new tensor lies; a view lies where its base does."""
        storage = tensor.untyped_storage()
        if device == CPU or storage._cdata in self._homes:
            return
        # A weak reference keeps the address from being used again.
        self._homes[storage._cdata] = StorageWeakRef(storage), device, storage.nbytes()
        self._bytes_noted += storage.nbytes()
        if self._bytes_noted > self.peak_bytes:
            self._homes = {key: home for key, home in self._homes.items() if not home[0].expired()}
            self._bytes_noted = sum(size for _, _, size in self._homes.values())
            self.peak_bytes = max(self.peak_bytes, self._bytes_noted)

    def maker(self, homes: Iterable[torch.device], wanted: torch.device | None) -> torch.device:
        """Where an operation leaves what it makes: C++ asks for the CPU of its own accord, taking
        its tensors for the CPU's."""
        if wanted is not None and (wanted != CPU or self._to_cpu):
            return wanted
        return next(iter(homes), (self._inside[-1] if self._inside else None) or CPU)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        if args and isinstance(args[0], Tensor):
            device, args = self.home(args[0]), (args[0].dtype, *args[1:])
        elif args and isinstance(args[0], str | torch.device):
            device, args = torch.device(args[0]), args[1:]
        if device is None or torch.device(device) == self.home(tensor):
            return Tensor.to(tensor, *args, **kwargs)
        dtype = kwargs.get("dtype") or (args[0] if args else None)
        self._to_cpu = torch.device(device) == CPU
        try:
            copied: Tensor = torch.ops.aten._to_copy.default(
                tensor, dtype=dtype, device=torch.device(device)
            )
        finally:
            self._to_cpu = False
        return copied


class _Operations(TorchDispatchMode):
    """What torch's functions come down to."""

    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._devices = devices

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [tensor for tensor in tensors_of((args, kwargs)) if not tensor.is_meta]
        homes = dict.fromkeys(self._devices.home(tensor) for tensor in given)
        wanted = kwargs.get("device")
        copies = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        if not copies and len(homes) > 1:
            # As on a GPU, numbers and indices may come from the CPU.
            indices = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
            homes = dict.fromkeys(
                home
                for tensor in given
                if (home := self._devices.home(tensor)) != CPU
                or not (tensor.ndim == 0 or (indices and not tensor.is_floating_point()))
            )
            if len(homes) > 1:
                raise RuntimeError(f"{func}: expected all tensors on one device, found {homes}")
        if wanted is not None and wanted.type == "ipu":
            kwargs["device"] = CPU
        found = func(*args, **kwargs)
        home = self._devices.maker(homes, wanted)
        for tensor in tensors_of(found):
            if not tensor.is_meta:
                self._devices.settle(tensor, home)
        return found


@pytest.fixture
def pretended() -> Iterator[PretendedDevices]:
    """Torch with two accelerators more."""
    with PretendedDevices() as devices:
        yield devices
