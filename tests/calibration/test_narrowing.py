"""Values that are rounded to bfloat16 anyway are computed in it, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.builtin import builtin_model
from qtool.calibration.narrowing import narrowed
from qtool.calibration.recording import Recording, record
from qtool.calibration.runner import Bfloat16Products, RoundedProducts
from qtool.calibration.skeleton import Skeleton
from qtool.checkpoint import Checkpoint

aten = torch.ops.aten
Mark = Callable[[str, Tensor], None]


class Gated(nn.Module):
    """x + down(silu(gate(x)) * up(x)), `loud` with the gate's sum beside it."""

    def __init__(self, *, loud: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"gate": (6, 4), "up": (6, 4), "down": (4, 6)}.items():
            linear = nn.Linear(shape[1], shape[0], bias=False)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(shape, generator=generator))
            setattr(self, name, linear)
        self.loud = loud

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate(x))
        added = self.down(gate * self.up(x))
        return x + added + gate.sum(-1, keepdim=True) if self.loud else x + added


def written_down(block: nn.Module, x: Tensor, marked: str | None = None) -> Recording:
    def watched(mark: Mark) -> Tensor:
        hooks = []
        if marked is not None:
            module = block.get_submodule(marked)
            hooks.append(module.register_forward_pre_hook(lambda _, args: mark(marked, args[0])))
        try:
            with Bfloat16Products():
                output: Tensor = block(x)
        finally:
            for hook in hooks:
                hook.remove()
        return output

    found = record(block, (x,), {}, watched)
    assert found is not None
    return found


def values_of(found: Recording, block: nn.Module, x: Tensor, *wanted: int) -> list[Tensor]:
    start = {found.arguments[0]: x}
    tensors = dict((*block.named_parameters(), *block.named_buffers()))
    with torch.no_grad(), RoundedProducts():
        values = found.run(found.constants(tensors, start, wanted), start, wanted)
    return [values[number] for number in wanted]


def widened(found: Recording) -> int:
    """Copies to float32."""
    return sum(
        operation.function is aten._to_copy.default
        and operation.kwargs.get("dtype") is torch.float32
        for operation in found.operations
    )


def test_a_gate_is_the_one_of_a_model_in_bfloat16() -> None:
    block, x = Gated(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    plain = written_down(block, x, "down")
    found = narrowed(plain, plain.arguments[0], ())
    fed, output = values_of(found, block, x, found.marks["down"], found.output)
    short = x.bfloat16()
    gate, up, down = (getattr(block, name).weight.bfloat16() for name in ("gate", "up", "down"))
    expected = F.silu(short @ gate.t()) * (short @ up.t())
    assert torch.equal(fed, expected)
    assert found.rounded(found.marks["down"]) == found.marks["down"]
    # The residual stream stays what it was.
    assert torch.equal(output, x + (expected @ down.t()).float())
    assert (widened(plain), widened(found)) == (3, 1)


def test_what_is_used_in_float32_stays_so() -> None:
    """The sum over the gate wants it in float32, the gate then its input; up is narrowed by
    itself: what multiplies the gate in float32 has to be, too."""
    block, x = Gated(loud=True), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    plain = written_down(block, x)
    found = narrowed(plain, plain.arguments[0], ())
    (before,) = values_of(plain, block, x, plain.output)
    (after,) = values_of(found, block, x, found.output)
    assert torch.equal(before, after)
    assert widened(found) == widened(plain)


def test_what_is_asked_for_in_float32_stays_so() -> None:
    block, x = Gated(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    plain = written_down(block, x, "down")
    kept = plain.marks["down"]
    found = narrowed(plain, plain.arguments[0], {kept})
    (before,) = values_of(plain, block, x, kept)
    (after,) = values_of(found, block, x, kept)
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


def test_without_bfloat16_nothing_changes() -> None:
    block, x = Gated(), torch.randn(3, 4)
    found = record(block, (x,), {}, lambda mark: block(x))
    assert found is not None
    assert narrowed(found, found.arguments[0], ()) is found


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_real_block_gives_nearly_the_same_in_fewer_passes(tokens: int) -> None:
    """A whole block of books-7m: attention with its angles, both norms and the gate."""
    skeleton = Skeleton.build(Checkpoint.open(builtin_model("books-7m")))
    block = skeleton.load_block(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 256, generator=generator)
    angles = torch.rand(1, tokens, 64, generator=generator)
    places = {"position_embeddings": (angles.cos(), angles.sin())}

    def watched(mark: Mark) -> Tensor:
        with Bfloat16Products():
            output = block(x, **places)
        return output[0] if isinstance(output, tuple) else output

    plain = record(block, (x,), places, watched)
    assert plain is not None
    found = narrowed(plain, plain.arguments[0], ())
    assert widened(found) == 2  # what is added to the residual stream
    assert len(found.operations) < len(plain.operations)
    start = dict(zip(plain.arguments, (x, *places["position_embeddings"]), strict=True))
    tensors = dict((*block.named_parameters(), *block.named_buffers()))
    outputs = []
    with torch.no_grad(), RoundedProducts():
        for recording in (plain, found):
            constants = recording.constants(tensors, start, [recording.output])
            outputs.append(recording.run(constants, start, [recording.output])[recording.output])
    exact, near = (output - x for output in outputs)
    assert float((exact - near).norm() / exact.norm()) < 2**-7
