"""The original stream beside the quantized one, and where the two are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.calibration.activations import Activations
from qtool.calibration.capture import BlockCapture
from qtool.calibration.groups import Compared
from qtool.calibration.linears import Linear, Site, block_linears
from qtool.calibration.originals import OUTPUT, Originals, Point
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.checkpoint import Checkpoint

TOKENS = torch.randint(4096, (8, 24), generator=torch.Generator().manual_seed(0))


class Opened:
    """A model's first block, loaded, one chunk for every two sequences."""

    def __init__(self, folder: Path, tmp_path: Path) -> None:
        self.skeleton = Skeleton.build(Checkpoint.open(folder))
        self.skeleton.load_outside()
        self.runner = BlockRunner(self.skeleton, TOKENS, chunk_tokens=48)
        self.hidden = Activations(self.runner.num_chunks, tmp_path / "hidden.bin")
        self.originals = Originals(self.skeleton, self.runner, tmp_path)
        self.tmp_path = tmp_path

    def open(self, index: int) -> BlockCapture:
        self.skeleton.load_block(index)
        return BlockCapture(self.skeleton, self.runner, self.hidden, index, self.tmp_path)

    def linears(self, index: int) -> dict[str, Linear]:
        found = [item for item in block_linears(self.skeleton, index) if isinstance(item, Linear)]
        return {linear.name.rpartition(".")[2]: linear for linear in found}


def places(opened: Opened) -> dict[str, Compared]:
    capture = opened.open(0)
    linears = opened.linears(0)
    parameters = dict(opened.skeleton.block_parameters(0))
    weights = {
        linear.site: linear.matrix(parameters[linear.parameter])
        for linear in linears.values()
        if linear.expert is None
    }
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    groups = capture.trace({linear.site for linear in linears.values()})
    found = capture.compared(groups, weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in parameters.items())
    return {site.parameter.split(".")[-2]: place for site, place in found.items()}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            {
                "q_proj": Compared(Point("input_layernorm"), added=False),
                "o_proj": Compared(Point("post_attention_layernorm"), added=True),
                "gate_proj": Compared(Point("post_attention_layernorm"), added=False),
                "down_proj": Compared(OUTPUT, added=True),
            },
        ),
        (
            "phi",  # attention and mlp side by side on one norm
            {
                "q_proj": Compared(Point("input_layernorm"), added=False),
                "dense": Compared(OUTPUT, added=True),
                "fc2": Compared(OUTPUT, added=True),
            },
        ),
        (
            "gemma2",  # norms behind attention and mlp
            {
                "q_proj": Compared(Point("input_layernorm"), added=False),
                "o_proj": Compared(Point("post_attention_layernorm"), added=True),
                "gate_proj": Compared(Point("pre_feedforward_layernorm"), added=False),
                "down_proj": Compared(Point("post_feedforward_layernorm"), added=True),
            },
        ),
    ],
)
def test_places_are_found_by_what_follows_a_weight(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    expected: dict[str, Compared],
) -> None:
    assert places(Opened(tiny_checkpoint(family), tmp_path)) == expected


def test_the_original_stream_is_the_original_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever becomes of the block's weights after it was recorded."""
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("qwen2")
    opened = Opened(folder, tmp_path)
    for index in range(2):
        capture = opened.open(index)
        opened.originals.record(index, [Point("post_attention_layernorm")])
        with torch.no_grad():
            opened.skeleton.blocks[index].mlp.up_proj.weight.mul_(0.5)
        middle = opened.originals.at(Point("post_attention_layernorm"), 1)
        assert middle.shape == (2, 24, 256)
        capture.advance()
        opened.originals.forget()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept: list[Tensor] = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(TOKENS)
    ours = torch.cat([opened.originals.at(OUTPUT, chunk) for chunk in range(4)])
    assert torch.allclose(ours, kept[0], atol=1e-4 * float(kept[0].abs().max()))


def test_the_drift_of_an_unchanged_model_is_none_and_of_a_changed_one_is_what_changed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    opened = Opened(tiny_checkpoint("llama"), tmp_path)
    capture = opened.open(0)
    linears = opened.linears(0)
    groups = capture.trace({linear.site for linear in linears.values()})
    down = linears["down_proj"]
    group = next(group for group in groups if group.first == down.site)
    place = Compared(OUTPUT, added=True)
    opened.originals.record(0, [OUTPUT])
    args = (group, place, opened.originals, down.in_features, set[Site]())
    moments, drift = capture.collect_compared(*args)
    size = float(moments.gram.abs().max())
    assert float(drift.cross.abs().max()) < 1e-5 * size
    assert moments.count == TOKENS.numel()
    assert drift.held.count == TOKENS.numel() // 4
    with torch.no_grad():
        weight = opened.skeleton.blocks[0].mlp.down_proj.weight
        change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        weight.sub_(change)
    moments, drift = capture.collect_compared(*args)
    learned = moments.less(drift.held)
    for cross, gram in ((drift.cross, learned.gram), (drift.held_cross, drift.held.gram)):
        expected = change @ gram
        assert torch.allclose(cross, expected, atol=1e-4 * float(expected.abs().max()))
