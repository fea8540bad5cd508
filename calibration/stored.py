"""Where each parameter of a model lies in its checkpoint.

Names and shapes on disk are not always the model's: experts are one 3-D parameter in memory and
one matrix each on disk, prefixes come and go, families rename. transformers keeps that knowledge as
its conversion mapping; it is used here as transformers itself uses it, one parameter at a time
instead of a whole model, so that a block can be read alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.calibration.placement import CPU
from qtool.checkpoint import Checkpoint
from qtool.errors import FormatError, UnsupportedModel


class Origin(NamedTuple):
    """A checkpoint tensor, and the pattern of the converter that takes it."""

    tensor: str
    pattern: str


@dataclass(slots=True)
class Entry:
    """What makes one parameter (or, with a converter that splits, several).

    converter  transformers' WeightConverter, or None where the tensor is the parameter
    """

    target: str
    converter: Any
    origins: list[Origin] = field(default_factory=list)


class Piece(NamedTuple):
    """A matrix on disk that is a run of rows of a parameter, or of one expert of it."""

    tensor: str
    expert: int | None
    start: int
    stop: int


class StoredModel:
    """The checkpoint seen through the parameter names of a model built on the meta device."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._shapes = {
            name: tensor.shape
            for name, tensor in (
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            )
        }
        self._entries, self.unused = _match(model, checkpoint, self._shapes)
        self._owners = {
            origin.tensor: entry.target
            for entry in self._entries.values()
            for origin in entry.origins
        }

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._entries

    def owner(self, tensor: str) -> str | None:
        """The parameter that a checkpoint tensor goes into (the first, where it goes into many)."""
        return self._owners.get(tensor)

    def sole_tensor(self, parameter: str) -> str | None:
        """The checkpoint tensor that is this parameter, where one alone is."""
        entry = self._entries.get(parameter)
        return entry.origins[0].tensor if entry is not None and entry.converter is None else None

    def require(self, parameters: Iterable[str]) -> None:
        """Raise where the checkpoint lacks a parameter, or holds another shape: a model must not
        run on random weights.
        """
        wanted = list(parameters)
        for name in wanted:
            tensor = self.sole_tensor(name)
            if tensor is not None:
                self._check_shape(name, self._checkpoint.tensors[tensor].shape)
        missing = [name for name in wanted if name not in self._entries]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise FormatError(
                f"{self._checkpoint.folder.name} lacks {', '.join(missing[:3])}{more}",
                "the checkpoint is incomplete, or of a version this transformers does not read",
            )

    def pieces(self, parameter: str) -> tuple[Piece, ...] | None:
        """The matrices on disk that tile a parameter [rows, in] or [experts, rows, in]; None where
        they do not.
        """
        entry = self._entries[parameter]
        shape = self._shapes[parameter]
        if entry.converter is None:
            if len(shape) != 2:
                return None
            return (Piece(entry.origins[0].tensor, None, 0, shape[0]),)
        if len(entry.converter.target_patterns) != 1:
            return None
        experts = shape[0] if len(shape) == 3 else 1
        pieces: list[Piece] = []
        start = 0
        for pattern in entry.converter.source_patterns:
            tensors = [origin.tensor for origin in entry.origins if origin.pattern == pattern]
            sizes = {self._checkpoint.tensors[name].shape for name in tensors}
            if len(tensors) != experts or len(sizes) != 1:
                return None
            size = sizes.pop()
            if len(size) != 2 or size[1] != shape[-1]:
                return None
            stop = start + size[0]
            pieces += [
                Piece(name, expert if len(shape) == 3 else None, start, stop)
                for expert, name in enumerate(tensors)
            ]
            start = stop
        return tuple(pieces) if start == shape[-2] else None

    def load(
        self, parameters: Iterable[str], dtype: torch.dtype, device: torch.device = CPU
    ) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name on a device, floating ones in `dtype`; an entry is converted once."""
        wanted = set(parameters)
        done: set[str] = set()
        for name in sorted(wanted):
            entry = self._entries.get(name)
            if entry is None or entry.target in done:
                continue
            done.add(entry.target)
            for target, tensor in self._realize(entry, dtype, device).items():
                if target in wanted:
                    self._check_shape(target, tensor.shape)
                    yield target, tensor

    def _realize(
        self, entry: Entry, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, Tensor]:
        if entry.converter is None:
            return {entry.target: self._read(entry.origins[0].tensor, dtype, device)}
        converter = deepcopy(entry.converter)
        for origin in entry.origins:
            tensor = self._read(origin.tensor, dtype, device)
            converter.add_tensor(entry.target, origin.tensor, origin.pattern, _ready(tensor))
        made = converter.convert(
            entry.target, model=self._model, config=getattr(self._model, "config", None)
        )
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def _read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A copy, never a view of the mapped file: weights are overwritten as they are solved."""
        tensor = self._checkpoint.tensor(name)
        # Moved before it is widened: half the bytes.
        there = tensor.to(device)
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        return there.to(wanted, copy=there is tensor)

    def _check_shape(self, name: str, shape: Sequence[int]) -> None:
        if tuple(shape) != tuple(self._shapes[name]):
            raise FormatError(
                f"{name} has shape {list(shape)} in the checkpoint, config.json describes "
                f"{list(self._shapes[name])}",
                "config.json and the weights are not of the same model",
            )


def _ready(tensor: Tensor) -> Any:
    """transformers takes tensors as functions that give them."""
    return lambda: tensor


def _match(
    model: nn.Module, checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Entry], list[str]]:
    """Parameter name -> entry, and the tensors that belong to none."""
    renamings, converters, rename, natural_order = _conversions(model)
    base = str(getattr(model, "base_model_prefix", ""))
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    entries: dict[str, Entry] = {}
    unused: list[str] = []
    state = dict.fromkeys(shapes, True)
    for name in sorted(checkpoint.tensors, key=natural_order):
        target, pattern = rename(name, renamings, converters, base, state)
        if target not in shapes and name in shapes:
            target, pattern = name, None
        if target not in shapes:
            unused.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        entry = entries.setdefault(target, Entry(target, converter))
        entry.origins.append(Origin(name, pattern or name))
        if converter is not None:
            for other in converter.target_patterns[1:]:
                entries[target.replace(converter.target_patterns[0], other)] = entry
    return entries, unused


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any], Any, Any]:
    """transformers' renamings, converters, and its two functions that apply them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise UnsupportedModel(
            f"this version of transformers keeps its weight names elsewhere ({error})",
            "install the version that constraints.txt names",
        ) from error
    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    return renamings, converters, rename_source_key, dot_natural_key
