"""Blocks run by themselves equal the model run whole, in every family; and linears are seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.calibration.activations import Activations
from qtool.calibration.capture import BlockCapture
from qtool.calibration.groups import InputGroup, stages
from qtool.calibration.linears import Linear, Site, block_linears
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.checkpoint import Checkpoint
from qtool.errors import FormatError, UnsupportedModel, UsageError

QUICK = ["llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe"]
SLOW = [
    "mistral", "qwen2", "bloom", "cohere", "deepseek_v3", "falcon", "gemma2", "gpt_neox", "gpt_oss",
    "granite", "granitemoe", "mixtral", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2_moe",
    "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
FAMILIES = [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]

TOKENS = torch.randint(4096, (6, 48), generator=torch.Generator().manual_seed(0))


def linears_of(skeleton: Skeleton, block: int) -> list[Linear]:
    return [item for item in block_linears(skeleton, block) if isinstance(item, Linear)]


class Streamed:
    """A model run block by block, two sequences at a time."""

    def __init__(self, folder: Path, tmp_path: Path) -> None:
        self.skeleton = Skeleton.build(Checkpoint.open(folder))
        self.skeleton.load_outside()
        self.runner = BlockRunner(self.skeleton, TOKENS, chunk_tokens=96)
        self.activations = Activations(self.runner.num_chunks, tmp_path / "activations.bin")
        self.tmp_path = tmp_path

    def open(self, index: int) -> BlockCapture:
        self.skeleton.load_block(index)
        return BlockCapture(self.skeleton, self.runner, self.activations, index, self.tmp_path)

    def sites(self, index: int) -> list[Site]:
        return list(dict.fromkeys(linear.site for linear in linears_of(self.skeleton, index)))

    def logits(self) -> Tensor:
        parts = []
        for chunk in range(self.runner.num_chunks):
            hidden = self.activations.get(chunk)
            assert hidden is not None
            parts.append(self.runner.finish(chunk, hidden))
        return torch.cat(parts)


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_whole(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Logits, and the second moment of every linear's inputs as forward hooks see them."""
    folder = tiny_checkpoint(family)
    streamed = Streamed(folder, tmp_path)
    seen: dict[Site, Tensor] = {}
    for index in range(len(streamed.skeleton.blocks)):
        capture = streamed.open(index)
        widths = {item.site: item.in_features for item in linears_of(streamed.skeleton, index)}
        groups = capture.trace(widths)
        for stage in stages(groups, sequential=True):
            found = capture.collect(stage, widths.__getitem__, set())
            for group in stage.groups:
                seen |= {site: found[group.first].gram for site in group.sites}
        assert {site for group in groups for site in group.sites} == set(widths)
        capture.advance()
        capture.close()
        streamed.skeleton.free_block(index)
    model = whole_model(folder)
    expected, logits = watched(model, {site.parameter for site in seen if site.expert is None})
    assert torch.allclose(streamed.logits(), logits, atol=1e-5 * float(logits.abs().max()))
    assert expected
    for site, gram in seen.items():
        if site.expert is None:
            scale = float(expected[site.parameter].abs().max())
            assert torch.allclose(gram, expected[site.parameter], atol=1e-4 * scale), site


def test_a_linear_that_the_first_sequence_passes_by_is_found(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts that are modules of their own are fed what is routed to them, as fused ones are."""
    streamed = Streamed(tiny_checkpoint("llama"), tmp_path)
    capture = streamed.open(0)
    mlp = streamed.skeleton.blocks[0].get_submodule("mlp")
    plain = mlp.forward
    # Only the second sequence of a chunk gets there.
    mlp.forward = lambda x: torch.cat([torch.zeros_like(x[:1]), plain(x[1:])])  # type: ignore[method-assign]
    sites = streamed.sites(0)
    groups = capture.trace(sites)
    assert {site for group in groups for site in group.sites} == set(sites)


def watched(model: Any, parameters: set[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Sums of x xᵀ over linears' inputs, and logits, by plain forward hooks."""
    grams: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: Any, args: tuple[Tensor, ...]) -> None:
            vectors = args[0].reshape(-1, args[0].shape[-1])
            grams[name] = grams.get(name, torch.zeros(())) + vectors.t() @ vectors

        return add

    for name in parameters:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    return grams, logits


def leaves(groups: list[InputGroup]) -> list[tuple[tuple[str, ...], str | None]]:
    return [
        (tuple(site.parameter.split(".")[-2] for site in group.sites), group.source)
        for group in groups
    ]


def test_linears_with_one_input_share_it_in_the_order_they_are_fed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    streamed = Streamed(tiny_checkpoint("llama"), tmp_path)
    groups = streamed.open(0).trace(streamed.sites(0))
    assert leaves(groups) == [
        (("q_proj", "k_proj", "v_proj"), "input_layernorm"),
        (("o_proj",), None),
        (("gate_proj", "up_proj"), "post_attention_layernorm"),
        (("down_proj",), None),
    ]
    assert all(stage.stops_early for stage in stages(groups, sequential=True))
    assert len(stages(groups, sequential=False)) == 1


def test_experts_are_seen_each_by_itself_and_staged_together(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    streamed = Streamed(tiny_checkpoint("qwen3_moe"), tmp_path)
    capture = streamed.open(0)
    sites = streamed.sites(0)
    groups = capture.trace(sites)
    experts = [site for site in sites if site.expert is not None]
    assert len(experts) == 8
    assert {group.first for group in groups if group.first.expert is not None} == set(experts)
    names = [
        stage.groups[0].first.parameter.split(".", 3)[3]
        for stage in stages(groups, sequential=True)
    ]
    assert names[-2:] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    widths = {item.site: item.in_features for item in linears_of(streamed.skeleton, 0)}
    stage = stages(groups, sequential=True)[-2]
    found = capture.collect(stage, widths.__getitem__, set())
    # Two experts for each of 6 x 48 tokens.
    assert sum(moments.count for moments in found.values()) == 2 * TOKENS.numel()


def test_attention_is_kept_only_once_what_feeds_it_is_final(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Change q after the first stage, as a solver does; a run that keeps nothing agrees."""

    def run(keep: bool) -> tuple[Tensor, Tensor]:
        streamed = Streamed(tiny_checkpoint("llama"), tmp_path)
        capture = streamed.open(0)
        widths = {item.site: item.in_features for item in linears_of(streamed.skeleton, 0)}
        first, second, *_ = stages(capture.trace(widths), sequential=True)
        pending = set(widths)
        capture.collect(first, widths.__getitem__, pending)
        with torch.no_grad():
            streamed.skeleton.blocks[0].self_attn.q_proj.weight.mul_(3.0)
        pending -= set(first.groups[0].sites)
        if not keep:
            pending = set(widths)
        found = capture.collect(second, widths.__getitem__, pending)
        capture.advance()
        hidden = streamed.activations.get(2)
        assert hidden is not None
        return found[second.groups[0].first].gram, hidden

    for kept, fresh in zip(run(keep=True), run(keep=False), strict=True):
        assert torch.equal(kept, fresh)


def test_memory_holds_one_block(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    streamed = Streamed(tiny_checkpoint("llama"), tmp_path)
    for index in range(2):
        capture = streamed.open(index)
        capture.advance()
        streamed.skeleton.free_block(index)
        for block in streamed.skeleton.blocks:
            assert all(parameter.is_meta for parameter in block.parameters())


def test_buffers_that_no_checkpoint_holds_are_real(tiny_checkpoint: Callable[..., Path]) -> None:
    skeleton = Skeleton.build(Checkpoint.open(tiny_checkpoint("gemma3_text")))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())


def test_tied_weights_stay_tied(books_7m: Path) -> None:
    skeleton = Skeleton.build(Checkpoint.open(books_7m))
    skeleton.load_outside()
    model = skeleton.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_linears_are_named_as_they_lie_on_disk(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton.build(checkpoint)
    linears = [linear for block in range(2) for linear in linears_of(skeleton, block)]
    assert all(linear.tensor in checkpoint for linear in linears)
    for block in range(2):
        skeleton.load_block(block)
    parameters = dict(item for block in range(2) for item in skeleton.block_parameters(block))
    for linear in linears:
        loaded = linear.matrix(parameters[linear.parameter])
        assert torch.equal(loaded, checkpoint.tensor(linear.tensor).float()), linear.name
    experts = [linear for linear in linears if linear.expert is not None]
    assert len(experts) == 2 * 4 * 3


def test_conv1d_is_a_linear_stored_the_other_way(tiny_checkpoint: Callable[..., Path]) -> None:
    skeleton = Skeleton.build(Checkpoint.open(tiny_checkpoint("gpt2")))
    linear = next(item for item in linears_of(skeleton, 0) if item.name.endswith("c_attn"))
    assert (linear.out_features, linear.in_features) == (768, 256)
    skeleton.load_block(0)
    parameter = dict(skeleton.block_parameters(0))[linear.parameter]
    assert linear.matrix(parameter).shape == (768, 256)


def changed_copy(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "no_such_family"}, UnsupportedModel, "cannot build"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModel, "already quantized"),
        ({"num_hidden_layers": 3}, FormatError, "lacks model.layers.2"),
        ({"model_type": "t5"}, UnsupportedModel, "cannot build"),
        (
            {"auto_map": {"AutoConfig": "custom.Config"}, "model_type": "custom"},
            UsageError,
            "its own Python code",
        ),
    ],
    ids=["unknown", "quantized", "incomplete", "not causal", "custom code"],
)
def test_what_cannot_be_taken_is_refused_with_the_reason(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = changed_copy(
        tiny_checkpoint("llama"), tmp_path / "model", lambda config: config.update(change)
    )
    with pytest.raises(error, match=message) as caught:
        Skeleton.build(Checkpoint.open(folder))
    assert getattr(caught.value, "hint", None)


def test_a_tensor_of_another_shape_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = changed_copy(
        tiny_checkpoint("llama"),
        tmp_path / "model",
        lambda config: config.update({"intermediate_size": 256}),
    )
    with pytest.raises(FormatError, match=r"gate_proj.weight has shape \[512, 256\]"):
        Skeleton.build(Checkpoint.open(folder))
