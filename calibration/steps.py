"""All chunks' passes through one block, stopped at the same place and gone on with later.

With a recording of the block (recording.py) each chunk is run once: up to the inputs of the first
linears, then, when these are quantized, from there to the inputs of the next ones, and at last to
the block's output. What a chunk needs in order to go on is kept, in memory or in a file where that
is short. It is good as long as the parameters that it came from are as they were; where they are
not, the chunks start from the block's arguments again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibration.activations import Activations
from qtool.calibration.linears import Site
from qtool.calibration.narrowing import narrowed
from qtool.calibration.recording import Recording, record, tensors_of
from qtool.calibration.runner import BlockRunner

Mark = Callable[[Hashable, Tensor], None]
Run = Callable[[int, Mapping[int, Tensor]], dict[int, Tensor]]
# Runs the block on args and kwargs, and marks what it sees on the way.
Watched = Callable[[tuple[Any, ...], Mapping[str, Any], Mark], Tensor | None]


@dataclass(frozen=True, slots=True)
class RecordedBlock:
    """recordings  by the shape of a chunk's tokens; numbers mean the same in all
    hidden      the number of the hidden state that goes in
    """

    runner: BlockRunner
    index: int
    block: nn.Module
    recordings: Mapping[tuple[int, ...], Recording]
    hidden: int

    @classmethod
    def of(
        cls,
        runner: BlockRunner,
        index: int,
        block: nn.Module,
        activations: Activations,
        watched: Watched,
    ) -> RecordedBlock | None:
        """None where the block cannot be recorded."""
        recordings: dict[tuple[int, ...], Recording] = {}
        hidden = -1
        for chunk in range(runner.num_chunks):
            shape = tuple(runner.tokens(chunk).shape)
            if shape in recordings:
                continue
            args, kwargs = runner.call(index, chunk, activations.get(chunk))

            def run(mark: Mark, args: Any = args, kwargs: Any = kwargs) -> Tensor | None:
                return watched(args, kwargs, mark)

            found = record(block, args, kwargs, run)
            if found is None:
                return None
            entry = args[0] if args else kwargs["hidden_states"]
            places = [tensor is entry for tensor in tensors_of((args, kwargs))]
            hidden = found.arguments[places.index(True)]
            wide = {number for mark, number in found.marks.items() if not isinstance(mark, Site)}
            found = narrowed(found, hidden, wide)
            if recordings and not found.same_as(next(iter(recordings.values()))):
                return None
            recordings[shape] = found
        return cls(runner, index, block, recordings, hidden)

    def of_chunk(self, chunk: int) -> Recording:
        return self.recordings[tuple(self.runner.tokens(chunk).shape)]

    @property
    def any(self) -> Recording:
        """For what is the same in all."""
        return next(iter(self.recordings.values()))

    def arguments(self, chunk: int, hidden: Tensor | None) -> dict[int, Tensor]:
        """What a chunk starts from; `hidden` as BlockRunner.run takes it."""
        args, kwargs = self.runner.call(self.index, chunk, hidden)
        numbers = self.of_chunk(chunk).arguments
        return dict(zip(numbers, tensors_of((args, kwargs)), strict=True))

    def run(self, wanted: Iterable[int]) -> Run:
        """A function from a chunk and the values it has to the wanted ones, with the parameters as
        they are at each shape's first call."""
        asked = frozenset(wanted)
        constants: dict[tuple[int, ...], dict[int, Tensor]] = {}

        def values(chunk: int, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
            recording = self.of_chunk(chunk)
            shape = tuple(self.runner.tokens(chunk).shape)
            with torch.no_grad(), self.runner.recorded_products(self.index):
                if shape not in constants:
                    constants[shape] = recording.constants(self.tensors(), given, asked)
                return recording.run(constants[shape], given, asked)

        return values

    def tensors(self) -> dict[str, Tensor]:
        return dict((*self.block.named_parameters(), *self.block.named_buffers()))


class Steps:
    """Where the chunks stand, and how they go on.

    folder  where kept values go when memory is short
    """

    def __init__(self, recorded: RecordedBlock, activations: Activations, folder: Path) -> None:
        self.recorded = recorded
        self._activations = activations
        self._folder = folder
        self._place = 0
        self._kept: dict[int, Activations] = {}
        # The parameters that what is kept came from, and how often each had been changed.
        self._sources: dict[str, tuple[Tensor, int]] = {}

    def input_of(self, mark: Hashable) -> int:
        """The number of what a linear multiplies: its marked input, rounded where it is rounded."""
        return self.recorded.any.rounded(self.recorded.any.marks[mark])

    def go_to(
        self, place: int, also: Iterable[int] = ()
    ) -> Iterator[tuple[int, Mapping[int, Tensor]]]:
        """Take every chunk to a place; (chunk, values) with those asked for among the values. What
        lies beyond the place is computed with the weights as they are, and not kept."""
        recording = self.recorded.any
        self._settle(place)
        extra = frozenset(also)
        live = recording.live(place)
        run = self.recorded.run(live | extra)
        if self._activations.get(0) is not None:
            live -= {self.recorded.hidden}
        before = self._kept
        kept = {number: before.get(number) or self._new(number) for number in live}
        for chunk in range(self.recorded.runner.num_chunks):
            given = self._given(chunk, before)
            values = {**given, **run(chunk, given)}
            for number, slots in before.items():
                if number not in kept:
                    slots.drop(chunk)
            for number, slots in kept.items():
                if number not in before:
                    slots.take(chunk, values[number])
            yield chunk, values
        for number, slots in before.items():
            if number not in kept:
                slots.close()
        self._kept = kept
        self._place = place
        self._sources = self._sources_of(place)

    def look(self, wanted: Iterable[int]) -> Iterator[tuple[int, Mapping[int, Tensor]]]:
        """Values of every chunk, which stays where it stands."""
        self._settle(0)
        run = self.recorded.run(wanted)
        for chunk in range(self.recorded.runner.num_chunks):
            yield chunk, run(chunk, self._given(chunk, self._kept))

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """The block's output for every chunk, which stays where it stands."""
        self._settle(len(self.recorded.any.operations))
        output = self.recorded.any.output
        run = self.recorded.run({output})
        for chunk in range(self.recorded.runner.num_chunks):
            values = run(chunk, self._given(chunk, self._kept))
            for slots in self._kept.values():
                slots.drop(chunk)
            yield chunk, values[output]
        self.close()

    def close(self) -> None:
        for slots in self._kept.values():
            slots.close()
        self._kept = {}
        self._place = 0
        self._sources = {}

    def _settle(self, place: int) -> None:
        """Start again where what is kept lies beyond a place, or is not what it would be now."""
        now = self.recorded.tensors()
        stale = any(
            now[name] is not tensor or tensor._version != version
            for name, (tensor, version) in self._sources.items()
        )
        if stale or self._place > place:
            self.close()

    def _given(self, chunk: int, kept: Mapping[int, Activations]) -> dict[int, Tensor]:
        hidden = self._activations.get(chunk)
        if self._place == 0:
            return self.recorded.arguments(chunk, hidden)
        given = {}
        for number, slots in kept.items():
            values = slots.get(chunk)
            assert values is not None
            given[number] = values
        if hidden is not None:
            given[self.recorded.hidden] = hidden
        return given

    def _new(self, number: int) -> Activations:
        file = self._folder / f"step-{number}.bin"
        return self.recorded.runner.activations(file, self.recorded.index)

    def _sources_of(self, place: int) -> dict[str, tuple[Tensor, int]]:
        recording = self.recorded.any
        used = {number for done in recording.operations[:place] for number in done.inputs}
        now = self.recorded.tensors()
        return {
            name: (now[name], now[name]._version)
            for name, number in recording.tensors.items()
            if number in used
        }
