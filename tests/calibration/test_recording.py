"""A block written down as operations gives what the block gives, whole or in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.calibration.activations import Activations
from qtool.calibration.capture import BlockCapture
from qtool.calibration.groups import stages
from qtool.calibration.linears import Linear, block_linears
from qtool.calibration.originals import Originals
from qtool.calibration.recording import Recording, record
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Drift, Moments
from qtool.checkpoint import Checkpoint

# The last chunk is a smaller one.
TOKENS = torch.randint(4096, (9, 24), generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """Rounds its input twice, for two linears, and adds the second's output to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
            self.second.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.first(x.to(torch.bfloat16).float()))
        return x + self.second(gate * x.to(torch.bfloat16).float())


def written_down(module: nn.Module, x: Tensor) -> Recording | None:
    def watched(mark: Callable[[str, Tensor], None]) -> Tensor:
        second = module.get_submodule("second")
        hook = second.register_forward_pre_hook(lambda _, args: mark("second", args[0]))
        try:
            output: Tensor = module(x)
        finally:
            hook.remove()
        return output

    return record(module, (x,), {}, watched)


def test_a_pass_stops_at_a_linear_and_goes_on_with_its_new_weight() -> None:
    """By hand: x = (1, 2) gives the gate relu(3, -1) = (3, 0), so the second is fed (3, 0)."""
    module, x = Twice(), torch.tensor([[1.0, 2.0]])
    found = written_down(module, x)
    assert found is not None
    place = found.place(found.marks["second"])
    live = found.live(place)
    assert live == {found.arguments[0], found.marks["second"]}
    start = {found.arguments[0]: x}
    tensors = dict(module.named_parameters())
    values = found.run(found.constants(tensors, start, live), start, live)
    assert values[found.marks["second"]].tolist() == [[3.0, 0.0]]
    with torch.no_grad():
        module.second.weight.mul_(5)
    rest = found.run(found.constants(tensors, values, [found.output]), values, [found.output])
    assert rest[found.output].tolist() == [[31.0, 2.0]]
    assert torch.equal(rest[found.output], module(x))


def test_what_is_written_twice_is_done_once() -> None:
    found = written_down(Twice(), torch.ones(1, 2))
    assert found is not None
    copies = [o for o in found.operations if o.function is torch.ops.aten._to_copy.default]
    assert len(copies) == 2  # to bfloat16 and back


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(x)
        return y.add_(1.0)


class Deciding(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(x)
        return y if float(y.sum()) > 0 else -y


class Drawing(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(x)
        return y + torch.rand_like(y)


class Borrowing(InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.holder = [torch.ones(2)]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(x)
        return y + self.holder[0]


class Asking(InPlace):
    """An operation that gives no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(x)
        return y if torch.is_same_size(x, y) else -y


class Asserting(InPlace):
    """An operation that gives nothing."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async((x > 0).all())
        y: Tensor = self.second(x)
        return y


@pytest.mark.parametrize("kind", [InPlace, Deciding, Drawing, Borrowing, Asking, Asserting])
def test_what_cannot_be_run_in_parts_is_refused(kind: type[InPlace]) -> None:
    assert written_down(kind(), torch.ones(1, 2)) is None


class Opened:
    """A model's first block, loaded, one chunk for every two sequences."""

    def __init__(self, folder: Path, tmp_path: Path, *, bfloat16: bool = False) -> None:
        tmp_path.mkdir(exist_ok=True)
        self.skeleton = Skeleton.build(Checkpoint.open(folder))
        self.skeleton.load_outside()
        self.runner = BlockRunner(self.skeleton, TOKENS, chunk_tokens=48, bfloat16=bfloat16)
        self.hidden = Activations(self.runner.num_chunks, tmp_path / "hidden.bin")
        self.originals = Originals(self.skeleton, self.runner, tmp_path)
        self.skeleton.load_block(0)
        self.capture = BlockCapture(self.skeleton, self.runner, self.hidden, 0, tmp_path)
        linears = [item for item in block_linears(self.skeleton, 0) if isinstance(item, Linear)]
        self.linears = {linear.site: linear for linear in linears}

    def weight(self, linear: Linear) -> Tensor:
        return linear.matrix(dict(self.skeleton.block_parameters(0))[linear.parameter])

    def outputs(self) -> list[Tensor]:
        self.capture.advance()
        found = [self.hidden.get(chunk) for chunk in range(self.runner.num_chunks)]
        return [values.clone() for values in found if values is not None]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_recorded_block_gives_the_same(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, bfloat16: bool
) -> None:
    """To the bit, and in bfloat16 but for what is rounded once more between its products."""
    folder = tiny_checkpoint("llama")
    plain = Opened(folder, tmp_path / "plain", bfloat16=bfloat16)
    expected = plain.outputs()
    recorded = Opened(folder, tmp_path / "recorded", bfloat16=bfloat16)
    recorded.capture.trace(recorded.linears)
    assert recorded.capture.recorded is not None
    found = recorded.outputs()
    assert len(found) == 5
    off = max(
        float((one - other).norm() / other.norm())
        for one, other in zip(found, expected, strict=True)
    )
    assert off <= (2**-8 if bfloat16 else 0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_steps_see_what_passes_see(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Every linear changed when its statistics are taken, as a solver does; and one of the first
    changed again after all."""

    def statistics(*, in_steps: bool) -> tuple[list[tuple[Moments, Drift]], list[Tensor]]:
        opened = Opened(tiny_checkpoint(family), tmp_path / str(in_steps))
        capture, linears = opened.capture, opened.linears
        groups = capture.trace(linears)
        if not in_steps:
            capture._steps = None
        assert (capture.recorded is not None) == in_steps
        alone = {site: opened.weight(linear) for site, linear in linears.items()}
        places = capture.compared(groups, alone)
        points = [place.point for place in places.values()]
        opened.originals.record(0, points, capture.recorded)
        seen = []
        pending = set(linears)
        for stage in stages(groups, sequential=True):
            (group,) = stage.groups
            width = linears[group.first].in_features
            place = places[group.first]
            seen.append(capture.collect_compared(group, place, opened.originals, width, pending))
            pending -= set(group.sites)
            for site in group.sites:
                opened.weight(linears[site]).data.mul_(0.9)
        opened.weight(linears[groups[0].first]).data.mul_(1.2)
        return seen, opened.outputs()

    stepped, after_steps = statistics(in_steps=True)
    passed, after_passes = statistics(in_steps=False)
    for (moments, drift), (others, other) in zip(stepped, passed, strict=True):
        torch.testing.assert_close(moments.gram, others.gram)
        assert moments.count == others.count == TOKENS.numel()
        torch.testing.assert_close(drift.cross, other.cross, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drift.held_cross, other.held_cross, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drift.held.gram, other.held.gram)
    for one, another in zip(after_steps, after_passes, strict=True):
        torch.testing.assert_close(one, another)
