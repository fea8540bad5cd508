"""LoRA adapters beside a model: rows of one step may use different ones, or none.

Every linear that an adapter could change is wrapped once. Before a step `Adapters.select` says
which rows use which adapter; a wrapped linear computes what it did, for all rows, and adds the
low-rank product on the rows that want one. So the base model's weights are shared, packed as they
are, and quantized ones stay quantized.

    y = base(x);   y[rows, columns] += (x[rows] down^T) up^T

Adapters on experts, and on models that transformers' own code runs, are not offered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.arch import Architecture, Role, find_architecture
from qtool.convert.formats import open_weights
from qtool.errors import UnknownName, UnsupportedModel, UsageError
from qtool.kernels.dispatch import LinearKernel
from qtool.runtime.engine.peft import LowRank, read_adapter
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.attention import SelfAttention
from qtool.runtime.models.decoder import Block, Decoder
from qtool.runtime.models.mlp import Mlp
from qtool.runtime.models.model import Model
from qtool.runtime.models.tensors import role_shapes
from qtool.source import Source


class _Part(NamedTuple):
    """down [rank, in], up [columns, rank]"""

    columns: slice
    down: Tensor
    up: Tensor


class _Rows(NamedTuple):
    rows: slice
    adapter: str


@dataclass(slots=True)
class _Step:
    """Which rows of the step that is being computed use which adapter."""

    rows: tuple[_Rows, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """A wrapped linear's additions, by adapter."""

    base: Linear | Linears
    step: _Step
    parts: dict[str, list[_Part]] = field(default_factory=dict)


def _matmul(x: Tensor, packed: tuple[_Target], bias: Tensor | None) -> Tensor:
    (target,) = packed
    y = target.base(x)
    for rows, adapter in target.step.rows:
        for columns, down, up in target.parts.get(adapter, ()):
            y[rows, columns] += (x[rows] @ down.T) @ up.T
    return y


def _never_packed(weight: Any, dtype: torch.dtype, device: torch.device) -> Any:
    raise AssertionError("never chosen: it is for no weight, and wraps what is packed already")


# A kernel like the others, so that a wrapped linear is a `Linear`.
LORA = LinearKernel(
    name="lora",
    takes="a packed linear",
    is_for=lambda weight: False,
    keeps_packed=True,
    refuses=lambda weight, dtype, device, activations: "wraps other kernels",
    pack=_never_packed,
    matmul=_matmul,
)


class Adapters:
    """The adapters of one model. `model` is the model that can use them."""

    def __init__(self, model: Model, source: Source) -> None:
        if not isinstance(model, Decoder):
            raise UnsupportedModel(
                f"{source.name} is run by transformers' code, to which adapters cannot be added",
                hint="merge the adapter into the weights (peft: merge_and_unload)",
            )
        reader = open_weights(source)
        self._architecture: Architecture = find_architecture(reader.config)
        self._config = model.config
        self._dtype, self._device = model.dtype, model.device
        self._step = _Step()
        # The module's name -> where it lies in which wrapped linear.
        self._places: dict[str, tuple[_Target, slice, tuple[int, ...]]] = {}
        self._names: dict[str, Path] = {}
        blocks = tuple(self._wrap(index, block) for index, block in enumerate(model.blocks))
        self.model: Decoder = dataclasses.replace(model, blocks=blocks)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def load(self, name: str, folder: Path) -> None:
        """Make an adapter known by a name; all of it or, with an error, nothing."""
        if name in self._names:
            if self._names[name] == folder:
                return
            raise UsageError(
                f"the adapter {name} is {self._names[name]}, and cannot be {folder} too"
            )
        additions = read_adapter(folder)
        for module, addition in additions.items():
            self._check(folder, module, addition)
        for module, (down, up) in ((m, (a.down, a.up)) for m, a in additions.items()):
            target, columns, _ = self._places[module]
            part = _Part(
                columns, down.to(self._device, self._dtype), up.to(self._device, self._dtype)
            )
            target.parts.setdefault(name, []).append(part)
        self._names[name] = folder

    def check(self, name: str) -> None:
        if name not in self._names:
            raise UnknownName("LoRA adapter", name, self._names)

    def select(self, rows: Sequence[tuple[str | None, int]]) -> None:
        """For the rows of the next steps, one after the other: (adapter or None, how many)."""
        chosen: list[_Rows] = []
        start = 0
        for adapter, count in rows:
            stop = start + count
            if adapter is not None:
                if chosen and chosen[-1].adapter == adapter and chosen[-1].rows.stop == start:
                    start = chosen.pop().rows.start
                chosen.append(_Rows(slice(start, stop), adapter))
            start = stop
        self._step.rows = tuple(chosen)

    def _check(self, folder: Path, module: str, addition: LowRank) -> None:
        if module not in self._places:
            raise UnsupportedModel(
                f"{folder} changes {module}, which adapters cannot change here",
                hint="merge the adapter into the weights (peft: merge_and_unload)",
            )
        shape = self._places[module][2]
        found = (addition.up.shape[0], addition.down.shape[1])
        if found != shape:
            raise UsageError(
                f"{folder} was made for another model: {module} is {list(found)} there and "
                f"{list(shape)} here"
            )

    def _wrap(self, index: int, block: Block) -> Block:
        attention, mlp = block.attention, block.mlp
        if isinstance(attention, SelfAttention):
            attention = dataclasses.replace(
                attention,
                qkv=self._wrapped(attention.qkv, self._present(("qkv",), ("q", "k", "v")), index),
                o=self._wrapped(attention.o, ("o",), index),
            )
        if isinstance(mlp, Mlp):
            up = self._present(("gate_up",), ("gate", "up"), ("up",))
            mlp = dataclasses.replace(
                mlp,
                up=self._wrapped(mlp.up, up, index),
                down=self._wrapped(mlp.down, ("down",), index),
            )
        return dataclasses.replace(block, attention=attention, mlp=mlp)

    def _present(self, *choices: tuple[Role, ...]) -> tuple[Role, ...]:
        return next(roles for roles in choices if roles[0] in self._architecture.tensors)

    def _wrapped(self, base: Linear | Linears, roles: tuple[Role, ...], index: int) -> Linear:
        target = _Target(base, self._step)
        shapes: Mapping[Role, tuple[int, ...]] = role_shapes(self._architecture, self._config)
        start = 0
        for role in roles:
            stop = start + shapes[role][0]
            module = self._architecture.hf_name(role, index)
            self._places[module] = target, slice(start, stop), shapes[role]
            start = stop
        return Linear(LORA, (target,), None)
