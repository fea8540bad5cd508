"""The unquantized model beside the quantized one: what a block's linears should have been fed.

Every block is run once with its weights as they were on the hidden states of a model in which
nothing was quantized, before anything in the block is. Tensors at chosen points of it are kept, a
slot a chunk, for the passes over the quantized block to be compared with; the block's output is the
next one's input.

A point is the input of the norm that feeds a linear, or, better, a place in the residual stream
that the linear's output is added to: there not only what the linear was fed wrongly shows, but what
everything before it has left wrong. Such places are found by trial: with the weight W at zero, the
tensor that drops by exactly W x is the one. Looked at are the inputs of norms and the block's
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.calibration.activations import Activations
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.steps import RecordedBlock

# Of the largest change: float32 rounding is 1e-6, another path to the same place is not small.
_TOLERANCE = 1e-4


class Point(NamedTuple):
    """Where the streams are compared.

    norm    the norm whose input it is, a name in the block; "" for the block's output
    """

    norm: str = ""


OUTPUT = Point()


def is_norm(module: nn.Module) -> bool:
    """A leaf whose weight is one gain a channel: RMSNorm, LayerNorm and their kin."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not list(module.children())


def norms(block: nn.Module) -> list[str]:
    """Names in the block."""
    return [name for name, module in block.named_modules() if is_norm(module)]


class WatchNorms:
    """While inside, `on_input(point, tensor)` is told what each wanted norm is given."""

    def __init__(
        self, block: nn.Module, wanted: Iterable[str], on_input: Callable[[Point, Tensor], None]
    ) -> None:
        self._modules = [(name, block.get_submodule(name)) for name in wanted]
        self._on_input = on_input
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(self._hook(Point(name))))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, point: Point) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self._on_input(point, args[0])

        return hook


class Originals:
    """The original stream at the block that is being quantized.

    folder  where kept tensors go when memory is short
    """

    def __init__(self, skeleton: Skeleton, runner: BlockRunner, folder: Path) -> None:
        self._skeleton = skeleton
        self._runner = runner
        self._folder = folder
        self._hidden = runner.activations(folder / "original.bin")
        self._kept: dict[Point, Activations] = {}

    def record(
        self, index: int, points: Iterable[Point], recorded: RecordedBlock | None = None
    ) -> None:
        """Run the loaded block, its weights being the checkpoint's, and keep what passes the
        points. A recording of the block is marked with them."""
        self._hidden.travel(self._runner.device(index))
        for number, point in enumerate(dict.fromkeys(points)):
            if point != OUTPUT:
                file = self._folder / f"original-{number}.bin"
                self._kept[point] = self._runner.activations(file, index)
        if recorded is not None:
            self._replay(recorded)
            return
        block = self._skeleton.blocks[index]
        for chunk in range(self._runner.num_chunks):

            def keep(point: Point, values: Tensor, chunk: int = chunk) -> None:
                self._kept[point].put(chunk, values)

            with WatchNorms(block, [point.norm for point in self._kept], keep):
                with self._runner.products(index):
                    output = self._runner.run(index, chunk, self._hidden.get(chunk))
            assert output is not None
            self._hidden.put(chunk, output)

    def _replay(self, recorded: RecordedBlock) -> None:
        marks = recorded.any.marks
        output = recorded.any.output
        run = recorded.run({output, *(marks[point] for point in self._kept)})
        for chunk in range(self._runner.num_chunks):
            values = run(chunk, recorded.arguments(chunk, self._hidden.get(chunk)))
            for point, slots in self._kept.items():
                slots.take(chunk, values[marks[point]])
            self._hidden.take(chunk, values[output])

    def drop(self, point: Point) -> None:
        """Forget one point."""
        if point in self._kept:
            self._kept.pop(point).close()

    def at(self, point: Point, chunk: int) -> Tensor:
        """[sequences, length, hidden] float32, after `record`."""
        slots = self._hidden if point == OUTPUT else self._kept[point]
        found = slots.get(chunk)
        assert found is not None
        return found

    def forget(self) -> None:
        """Drop what was kept of a block; its output stays."""
        for slots in self._kept.values():
            slots.close()
        self._kept.clear()

    def close(self) -> None:
        self.forget()
        self._hidden.close()


class Probe(NamedTuple):
    """A linear's weight in the loaded block, and what to find out.

    weight  a view of the parameter, [out, in]
    inputs  [..., in], what it was fed
    """

    weight: Tensor
    inputs: Tensor


def find_points(
    skeleton: Skeleton,
    runner: BlockRunner,
    index: int,
    hidden: Tensor | None,
    probes: Mapping[str, Probe],
) -> dict[str, Point]:
    """For each probe, the first place that its output is added to; absent where there is none.

    hidden  the block's input for the first chunk, of which one sequence is used; the probes' inputs
            are of that sequence
    """
    block = skeleton.blocks[index]

    def run() -> dict[Point, Tensor]:
        seen: dict[Point, Tensor] = {}

        def see(point: Point, values: Tensor) -> None:
            seen.setdefault(point, values.clone())

        with WatchNorms(block, norms(block), see):
            output = runner.run(index, 0, hidden, sequences=slice(0, 1))
        assert output is not None
        seen[OUTPUT] = output
        return seen

    before = run()
    found: dict[str, Point] = {}
    for name, probe in probes.items():
        kept = probe.weight.clone()
        with torch.no_grad():
            probe.weight.zero_()
            after = run()
            probe.weight.copy_(kept)
        change = probe.inputs @ kept.t()
        largest = float(change.abs().max())
        for point, values in before.items():
            if values.shape[-1] != kept.shape[0] or values.numel() != change.numel():
                continue
            off = (values - after[point] - change.view(values.shape)).abs().max()
            if largest > 0 and float(off) <= _TOLERANCE * max(largest, float(values.abs().max())):
                found[name] = point
                break
    return found
