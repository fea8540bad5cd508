"""Watch what a block's linears are fed, and keep its statistics.

Linears fed the same tensor share their statistics, and each set is looked at when all linears
before it are quantized. Where the block can be recorded (recording.py), its chunks go from one set
to the next (steps.py). Where it cannot, it is run from its start for every set. Attention is the
same in all runs once the linears before it are final, so its output is kept from the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibration.activations import Activations
from qtool.calibration.groups import Compared, InputGroup, Stage
from qtool.calibration.linears import Linear, Site
from qtool.calibration.originals import (
    OUTPUT,
    Originals,
    Point,
    Probe,
    WatchNorms,
    find_points,
    is_norm,
    norms,
)
from qtool.calibration.recording import tensors_of
from qtool.calibration.runner import BlockRunner, SeenEnough
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Drift, Moments
from qtool.calibration.steps import Mark, RecordedBlock, Steps
from qtool.calibration.sums import DriftSums, MomentSums
from qtool.calibration.watch import Identity, Keep, Watch, identity, ignore

# One chunk in so many is held out, where there are as many.
HELD_OUT_EVERY = 4


class BlockCapture:
    """One loaded block, run over all chunks on its device as often as its solver asks.

    folder  where kept attention goes when memory is short
    """

    def __init__(
        self,
        skeleton: Skeleton,
        runner: BlockRunner,
        activations: Activations,
        index: int,
        folder: Path,
    ) -> None:
        self.skeleton = skeleton
        self.index = index
        self.device = runner.device(index)
        self._runner = runner
        self._activations = activations
        activations.travel(self.device)
        self._folder = folder
        # Attention outputs by their order in the block, a slot a chunk.
        self._attention: dict[int, Activations] = {}
        self._steps: Steps | None = None

    @property
    def recorded(self) -> RecordedBlock | None:
        """The block as a list of operations, once `trace` has found that it can be one."""
        return self._steps.recorded if self._steps is not None else None

    def first_output(self) -> Tensor:
        """The block's output for the first chunk, as its weights are now."""
        output = self._runner.run(self.index, 0, self._activations.get(0))
        assert output is not None
        return output

    @property
    def num_chunks(self) -> int:
        return self._runner.num_chunks

    @property
    def sequence_length(self) -> int:
        return self._runner.tokens(0).shape[1]

    def num_sequences(self, chunk: int) -> int:
        return self._runner.tokens(chunk).shape[0]

    def weights(self, linears: Mapping[Linear, Tensor]) -> dict[str, Tensor]:
        """Parameters of the block, by name in it, with new matrices [out, in] for some linears;
        gradients flow to those."""
        parameters = dict(self.skeleton.block_parameters(self.index))
        prefix = f"{self.skeleton.block_name(self.index)}."
        found: dict[str, Tensor] = {}
        for linear, values in linears.items():
            name = linear.parameter.removeprefix(prefix)
            if name not in found:
                found[name] = parameters[linear.parameter].detach().clone()
            linear.matrix(found[name]).copy_(values)
        return found

    def output(self, chunk: int, sequences: slice, weights: Mapping[str, Tensor]) -> Tensor:
        """The block's output for a part of a chunk, with gradients where the weights have them."""
        with self._runner.products(self.index):
            output = self._runner.run(
                self.index,
                chunk,
                self._activations.get(chunk),
                sequences=sequences,
                weights=weights,
            )
        assert output is not None
        return output

    def trace(self, sites: Iterable[Site]) -> list[InputGroup]:
        """Run the block on the first chunk and see in which order its linears are fed, and which of
        them share inputs. Experts that no token reached come last, each by itself; a linear that is
        never called (its weight is used some other way) is in no group.
        """
        wanted = list(sites)
        fed: dict[Site, list[Identity]] = {}
        sources: dict[Identity, str] = {}
        alive: list[Tensor] = []  # what identities are made of must not be freed and reused

        def on_input(site: Site, inputs: Tensor) -> None:
            alive.append(inputs)
            fed.setdefault(site, []).append(identity(inputs))

        def on_norm(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    alive.append(output)
                    sources[identity(output)] = name

            return hook

        hooks = [
            module.register_forward_hook(on_norm(name))
            for name, module in self.skeleton.blocks[self.index].named_modules()
            if is_norm(module)
        ]
        # One sequence shows all, but for experts: these are fed what is routed to them.
        routed = any(site.expert is not None for site in wanted)
        try:
            for sequences in (None,) if routed else (slice(0, 1), None):
                fed.clear()
                with Watch(self.skeleton, self.index, set(wanted), on_input):
                    self._runner.run(self.index, 0, self._activations.get(0), sequences=sequences)
                if set(wanted) <= set(fed):
                    break
        finally:
            for hook in hooks:
                hook.remove()
        shared: dict[tuple[Identity, ...], list[Site]] = {}
        for site, identities in fed.items():
            shared.setdefault(tuple(identities), []).append(site)
        groups = [
            InputGroup(tuple(found), len(identities), sources.get(identities[0]))
            for identities, found in shared.items()
        ]
        if all(group.calls == 1 and group.first.expert is None for group in groups):
            self._record(set(fed))
        idle = [site for site in wanted if site not in fed and site.expert is not None]
        return groups + [InputGroup((site,), 0, None) for site in idle]

    def _record(self, sites: set[Site]) -> None:
        """Note what the block does, where that can be run in parts."""
        block = self.skeleton.blocks[self.index]

        def watched(args: tuple[Any, ...], kwargs: Mapping[str, Any], mark: Mark) -> Tensor | None:
            watch = Watch(self.skeleton, self.index, sites, mark)
            with WatchNorms(block, norms(block), mark), self._runner.products(self.index), watch:
                output = block(*args, **kwargs)
            if isinstance(output, tuple) and not tensors_of(output[1:]):
                output = output[0]
            return output if isinstance(output, Tensor) else None

        found = RecordedBlock.of(self._runner, self.index, block, self._activations, watched)
        self._steps = Steps(found, self._activations, self._folder) if found is not None else None

    def compared(
        self, groups: Sequence[InputGroup], weights: Mapping[Site, Tensor]
    ) -> dict[Site, Compared]:
        """Where each group is best compared with the original stream, under its first site; groups
        that have no such place, and experts, are left out.

        weights  views [out, in] of linears that fill their parameter, by site
        """
        single = [group for group in groups if group.calls == 1 and group.first.expert is None]
        alone = [
            group.first for group in single if len(group.sites) == 1 and group.first in weights
        ]
        inputs: dict[Site, Tensor] = {}

        def on_input(site: Site, values: Tensor) -> None:
            inputs[site] = values.clone()

        hidden = self._activations.get(0)
        with Watch(self.skeleton, self.index, set(alone), on_input):
            self._runner.run(self.index, 0, hidden, sequences=slice(0, 1))
        probes = {site.parameter: Probe(weights[site], inputs[site]) for site in alone}
        points = find_points(self.skeleton, self._runner, self.index, hidden, probes)
        found = {}
        for group in single:
            point = points.get(group.first.parameter) if group.first in alone else None
            if point is not None:
                found[group.first] = Compared(point, added=True)
            elif group.source is not None:
                found[group.first] = Compared(Point(group.source), added=False)
        return found

    def collect(
        self, stage: Stage, in_features: Callable[[Site], int], pending: set[Site]
    ) -> dict[Site, Moments]:
        """Moments of each group's inputs over all chunks, under the group's first site.

        pending  linears whose weights will still change; attention that depends on none is kept
        """
        sums = {
            group.first: MomentSums.zeros(in_features(group.first), self.device)
            for group in stage.groups
        }
        if self._steps is not None:
            self._collect_in_steps(self._steps, sums)
        else:
            self._collect_in_passes(stage, sums, pending)
        # One by one: with many experts, sums and moments of all would be twice the memory.
        return {group.first: self._moments(sums.pop(group.first)) for group in stage.groups}

    def _moments(self, sums: MomentSums) -> Moments:
        """Of what all chunks added up to."""
        return sums.moments()

    def _moments_and_drift(
        self, sums: MomentSums, drift: DriftSums | None
    ) -> tuple[Moments, Drift]:
        """Of what all chunks added up to, the held-out ones in `drift` alone so far."""
        assert drift is not None
        sums.include(drift.held)
        return sums.moments(), drift.drift()

    def _collect_in_passes(
        self, stage: Stage, sums: Mapping[Site, MomentSums], pending: set[Site]
    ) -> None:
        seen: set[Site] = set()

        def on_input(site: Site, inputs: Tensor) -> None:
            if site not in sums:
                return
            sums[site].add(inputs)
            seen.add(site)
            if stage.stops_early and len(seen) == len(sums):
                raise SeenEnough

        watched = set(sums) | pending
        for chunk in range(self._runner.num_chunks):
            seen.clear()
            self._pass(chunk, watched, on_input, pending)

    def _collect_in_steps(self, steps: Steps, sums: Mapping[Site, MomentSums]) -> None:
        inputs = {site: steps.input_of(site) for site in sums}
        if len(inputs) == 1:
            (number,) = inputs.values()
            chunks = steps.go_to(steps.recorded.any.place(number), {number})
        else:
            chunks = steps.look(inputs.values())
        for _, values in chunks:
            with self._runner.products(self.index):
                for site, number in inputs.items():
                    sums[site].add(values[number])

    def collect_compared(
        self,
        group: InputGroup,
        compared: Compared,
        originals: Originals,
        in_features: int,
        pending: set[Site],
    ) -> tuple[Moments, Drift]:
        """Second moment of one group's inputs, and how far they have come from the original
        stream."""
        if self._steps is not None:
            return self._compared_in_steps(self._steps, group, compared, originals, in_features)
        sums = MomentSums.zeros(in_features, self.device)
        drift: DriftSums | None = None
        norm = None
        if not compared.added:
            norm = self.skeleton.blocks[self.index].get_submodule(compared.point.norm)
        chunk = 0
        seen: Tensor | None = None

        def on_input(site: Site, inputs: Tensor) -> None:
            nonlocal seen
            if site != group.first:
                return
            seen = inputs
            if norm is not None:
                expected = norm(originals.at(compared.point, chunk))
                compare(expected - inputs.view_as(expected))
                raise SeenEnough

        def on_point(point: Point, values: Tensor) -> None:
            if seen is not None:
                compare(originals.at(point, chunk) - values)
                raise SeenEnough

        def compare(difference: Tensor) -> None:
            nonlocal drift
            if drift is None:
                drift = DriftSums.zeros(difference.shape[-1], in_features, self.device)
            assert seen is not None
            held_out = self.is_held_out(chunk)
            drift.add(difference, seen, held_out=held_out)
            if not held_out:
                sums.add_squares(seen)

        block = self.skeleton.blocks[self.index]
        names = [compared.point.norm] if compared.added and compared.point != OUTPUT else []
        for chunk in range(self._runner.num_chunks):
            seen = None
            with WatchNorms(block, names, on_point):
                output = self._pass(chunk, {group.first} | pending, on_input, pending)
            if output is not None:
                compare(originals.at(OUTPUT, chunk) - output)
        return self._moments_and_drift(sums, drift)

    def _compared_in_steps(
        self,
        steps: Steps,
        group: InputGroup,
        compared: Compared,
        originals: Originals,
        in_features: int,
    ) -> tuple[Moments, Drift]:
        recording = steps.recorded.any
        number = steps.input_of(group.first)
        point = compared.point
        norm = None
        if compared.added:
            other = recording.output if point == OUTPUT else recording.marks[point]
        else:
            other = recording.marks[group.first]
            norm = self.skeleton.blocks[self.index].get_submodule(point.norm)
        sums = MomentSums.zeros(in_features, self.device)
        drift: DriftSums | None = None
        for chunk, values in steps.go_to(recording.place(number), {number, other}):
            original = originals.at(point, chunk)
            with torch.no_grad(), self._runner.products(self.index):
                expected = original if norm is None else norm(original)
                difference = expected - values[other].view_as(expected)
                if drift is None:
                    drift = DriftSums.zeros(difference.shape[-1], in_features, self.device)
                held_out = self.is_held_out(chunk)
                drift.add(difference, values[number], held_out=held_out)
                if not held_out:
                    sums.add_squares(values[number])
        return self._moments_and_drift(sums, drift)

    def is_held_out(self, chunk: int) -> bool:
        """Of the calibration data, the part that decides and is not learned from: a quarter."""
        return chunk % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

    @property
    def has_held_out(self) -> bool:
        return self._runner.num_chunks >= HELD_OUT_EVERY

    def _pass(
        self,
        chunk: int,
        watched: set[Site],
        on_input: Callable[[Site, Tensor], None],
        pending: set[Site],
    ) -> Tensor | None:
        keep = self._keeper(chunk, store=True)
        watch = Watch(self.skeleton, self.index, watched, on_input, pending, keep)
        with self._runner.products(self.index), watch:
            return self._runner.run(self.index, chunk, self._activations.get(chunk))

    def advance(self) -> None:
        """Replace each chunk's hidden state by the block's output, its weights being final."""
        if self._steps is not None:
            for chunk, values in self._steps.outputs():
                self._activations.take(chunk, values)
            return
        for chunk in range(self._runner.num_chunks):
            keep = self._keeper(chunk, store=False)
            watch = Watch(self.skeleton, self.index, set(), ignore, set(), keep)
            with self._runner.products(self.index), watch:
                output = self._runner.run(self.index, chunk, self._activations.get(chunk))
            assert output is not None
            self._activations.put(chunk, output)

    def forget_attention(self) -> None:
        """Weights that were final have changed after all: what attention made of them is stale."""
        for kept in self._attention.values():
            kept.close()
        self._attention.clear()

    def close(self) -> None:
        self.forget_attention()
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _keeper(self, chunk: int, *, store: bool) -> Keep:
        def keep(order: int, compute: Callable[[], Tensor]) -> Tensor:
            slots = self._attention.get(order)
            found = slots.get(chunk) if slots is not None else None
            if found is not None:
                return found.clone()
            output = compute()
            if store:
                if slots is None:
                    name = f"attention-{order}.bin"
                    slots = self._runner.activations(self._folder / name, self.index)
                    self._attention[order] = slots
                slots.put(chunk, output)
            return output

        return keep
