"""See which products a block makes with its own weights, and what each is fed.

Inputs are seen by intercepting torch's functions while the block runs: a product with a weight that
lies in the storage of one of the block's parameters is a call of that linear, be it nn.Linear,
GPT-2's Conv1D, or one expert's slice of a fused 3-D parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qtool.calibration.linears import Site
from qtool.calibration.skeleton import Skeleton

# torch's own linear, and x @ weight.T as some families write it; the weight comes second. addmm,
# of GPT-2's Conv1D, takes it third.
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}


class Identity(NamedTuple):
    """Two views with equal identities hold the same vectors."""

    storage: int
    offset: int
    elements: int
    width: int
    version: int


def identity(tensor: Tensor) -> Identity:
    return Identity(
        tensor.untyped_storage().data_ptr(),
        int(tensor.storage_offset()),
        tensor.numel(),
        tensor.shape[-1],
        tensor._version,
    )


# (the call's order in the block, how to compute it) -> attention output, kept or computed.
Keep = Callable[[int, Callable[[], Tensor]], Tensor]


def ignore(site: Site, inputs: Tensor) -> None:
    return


class Watch(TorchFunctionMode):
    """Calls `on_input(site, inputs)` for each product with one of the wanted weights.

    With `keep`, attention calls go through it until a pending linear has been fed: what comes
    before depends on final weights alone.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        wanted: set[Site],
        on_input: Callable[[Site, Tensor], None],
        pending: set[Site] | None = None,
        keep: Keep | None = None,
    ) -> None:
        super().__init__()
        self._wanted = wanted
        self._on_input = on_input
        self._pending = pending or set()
        self._keep = keep
        self._num_attention_calls = 0
        self._owners = {
            parameter.untyped_storage().data_ptr(): (name, parameter)
            for name, parameter in skeleton.block_parameters(index)
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) >= 2:
            self._look(args[0], args[1])
        elif func is torch.addmm and len(args) >= 3:
            self._look(args[1], args[2])
        elif func is F.scaled_dot_product_attention and self._keep is not None:
            order = self._num_attention_calls
            self._num_attention_calls += 1
            return self._keep(order, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _look(self, inputs: Tensor, weight: Tensor) -> None:
        owner = self._owners.get(weight.untyped_storage().data_ptr())
        if owner is None:
            return
        name, parameter = owner
        expert = None
        if parameter.ndim == 3 and weight.ndim == 2:
            expert = weight.storage_offset() // parameter[0].numel()
        site = Site(name, expert)
        if site in self._pending:
            self._keep = None
        if site in self._wanted:
            self._on_input(site, inputs)
