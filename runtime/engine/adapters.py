"""LoRA adapters beside a model: rows of one step may use different ones, or none.

Every linear that an adapter could change is wrapped once. Before a step `Adapters.select` says
which rows use which adapter; a wrapped linear computes what it did, for all rows, and adds the
low-rank product on the rows that want one. So the base model's weights are shared, packed as they
are, and quantized ones stay quantized.

    y = base(x);   y[rows, columns] += (x[rows] down^T) up^T

Of a model that several ranks share, each has its part of every addition: of `up` the rows of its
outputs, or of `down` the columns of its inputs, whose products are added up with the base's.

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
from qtool.runtime.models.split import SplitDecoder
from qtool.runtime.models.tensors import role_shapes
from qtool.runtime.parallel.layers import own_part
from qtool.source import Source
from qtool.weight_parts import WHOLE, Part, take_runs


class _Part(NamedTuple):
    """down [rank, in], up [columns, rank]"""

    columns: slice
    down: Tensor
    up: Tensor


class Selected(NamedTuple):
    """Rows of a step, start to stop, that use an adapter."""

    adapter: str
    start: int
    stop: int


class _Place(NamedTuple):
    """Where a module lies: in a wrapped linear's columns, of a weight of `shape` this `part`."""

    target: _Target
    columns: slice
    shape: tuple[int, ...]
    part: Part


@dataclass(slots=True)
class _Step:
    """Which rows of the step that is being computed use which adapter."""

    rows: tuple[Selected, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """A wrapped linear's additions, by adapter."""

    base: Linear | Linears
    step: _Step
    device: torch.device
    parts: dict[str, list[_Part]] = field(default_factory=dict)


def _matmul(x: Tensor, packed: tuple[_Target], bias: Tensor | None) -> Tensor:
    (target,) = packed
    y = target.base(x)
    for adapter, start, stop in target.step.rows:
        rows = slice(start, stop)
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
        if not isinstance(model, Decoder | SplitDecoder):
            raise UnsupportedModel(
                f"{source.name} is run by transformers' code, to which adapters cannot be added",
                hint="merge the adapter into the weights (peft: merge_and_unload)",
            )
        reader = open_weights(source)
        self._architecture: Architecture = find_architecture(reader.config)
        self._shapes = role_shapes(self._architecture, model.whole_config)
        self._dtype = model.dtype
        self._step = _Step()
        # By the module's name.
        self._places: dict[str, _Place] = {}
        self._names: dict[str, Path] = {}
        self.model: Decoder | SplitDecoder
        if isinstance(model, SplitDecoder):
            starts = (stretch.blocks.start for stretch in model.stretches)
            parts = tuple(map(self._wrap_blocks, model.parts, starts))
            self.model = dataclasses.replace(model, parts=parts)
        else:
            self.model = self._wrap_blocks(model, 0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    @property
    def folders(self) -> Mapping[str, Path]:
        """By the adapters' names, in the order in which they came."""
        return self._names

    @property
    def selected(self) -> tuple[Selected, ...]:
        return self._step.rows

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
        for module, addition in additions.items():
            place = self._places[module]
            down, up = addition.down, addition.up
            if place.part.columns is not None:
                down = down[:, place.part.columns.start : place.part.columns.stop]
            if place.part.rows is not None:
                up = take_runs(up, place.part.rows)
            device = place.target.device
            part = _Part(place.columns, down.to(device, self._dtype), up.to(device, self._dtype))
            place.target.parts.setdefault(name, []).append(part)
        self._names[name] = folder

    def check(self, name: str) -> None:
        if name not in self._names:
            raise UnknownName("LoRA adapter", name, self._names)

    def select(self, rows: Sequence[tuple[str | None, int]]) -> None:
        """For the rows of the next steps, one after the other: (adapter or None, how many)."""
        chosen: list[Selected] = []
        start = 0
        for adapter, count in rows:
            stop = start + count
            if adapter is not None:
                if chosen and chosen[-1].adapter == adapter and chosen[-1].stop == start:
                    start = chosen.pop().start
                chosen.append(Selected(adapter, start, stop))
            start = stop
        self.use(chosen)

    def use(self, selected: Sequence[Selected]) -> None:
        """Select these rows, as another rank has chosen them."""
        self._step.rows = tuple(selected)

    def _check(self, folder: Path, module: str, addition: LowRank) -> None:
        if module not in self._places:
            raise UnsupportedModel(
                f"{folder} changes {module}, which adapters cannot change here",
                hint="merge the adapter into the weights (peft: merge_and_unload)",
            )
        shape = self._places[module].shape
        found = (addition.up.shape[0], addition.down.shape[1])
        if found != shape:
            raise UsageError(
                f"{folder} was made for another model: {module} is {list(found)} there and "
                f"{list(shape)} here"
            )

    def _wrap_blocks(self, decoder: Decoder, first: int) -> Decoder:
        """first: its first block's number in the whole model"""
        blocks = tuple(
            self._wrap(first + index, block, decoder) for index, block in enumerate(decoder.blocks)
        )
        return dataclasses.replace(decoder, blocks=blocks)

    def _wrap(self, index: int, block: Block, decoder: Decoder) -> Block:
        def wrapped(base: Linear | Linears, *roles: Role) -> Linear:
            return self._wrapped(base, roles, index, decoder)

        attention, mlp = block.attention, block.mlp
        if isinstance(attention, SelfAttention):
            attention = dataclasses.replace(
                attention,
                qkv=wrapped(attention.qkv, *self._present(("qkv",), ("q", "k", "v"))),
                o=wrapped(attention.o, "o"),
            )
        if isinstance(mlp, Mlp):
            up = self._present(("gate_up",), ("gate", "up"), ("up",))
            mlp = dataclasses.replace(
                mlp,
                up=wrapped(mlp.up, *up),
                down=wrapped(mlp.down, "down"),
            )
        return dataclasses.replace(block, attention=attention, mlp=mlp)

    def _present(self, *choices: tuple[Role, ...]) -> tuple[Role, ...]:
        return next(roles for roles in choices if roles[0] in self._architecture.tensors)

    def _wrapped(
        self, base: Linear | Linears, roles: tuple[Role, ...], index: int, decoder: Decoder
    ) -> Linear:
        ranks = decoder.ranks
        own = own_part(base)
        target = _Target(own, self._step, decoder.device)
        start = 0
        for role in roles:
            shape = self._shapes[role]
            part = WHOLE if ranks is None else ranks.plan.part(role)
            stop = start + (shape[0] if part.rows is None else sum(map(len, part.rows)))
            module = self._architecture.hf_name(role, index)
            self._places[module] = _Place(target, slice(start, stop), shape, part)
            start = stop
        linear = Linear(LORA, (target,), None)
        # What is added to a part of a product is added up with it.
        return linear if ranks is None or own is base else ranks.reduced(linear)
