"""Blocks on devices that are not the CPU: which device, how much of it, and the same bytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.calibration.placement import CPU, Placement, has_fast_bfloat16
from qtool.calibration.skeleton import Skeleton
from qtool.checkpoint import Checkpoint
from qtool.errors import UsageError
from qtool.quantize.device_memory import block_bytes, outside_bytes
from qtool.quantize.devices import (
    Accelerator,
    DeviceRequest,
    Placed,
    Room,
    choose,
    parse_max_memory,
    place,
)
from qtool.quantize.job import Job, prepare
from qtool.quantize.layouts import layout_for
from qtool.quantize.pipeline import Silent, run
from qtool.quantize.plan import make_plan
from qtool.quantize.report import plan_to_dict, print_plan
from qtool.recipe import Recipe, load_recipe
from qtool.units import size_text

FIRST, SECOND = torch.device("ipu:0"), torch.device("ipu:1")
GIB = 2**30


def small(recipe: str, **options: Any) -> Recipe:
    return load_recipe(recipe).with_options(num_samples=4, sequence_length=32, **options)


def on(job: Job, outside: torch.device, *blocks: torch.device, kept_bytes: int = 0) -> Job:
    """A job for other devices, with the arithmetic of this CPU."""
    job.skeleton.placement = Placement(outside, blocks, kept_bytes, has_fast_bfloat16())
    return job


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def same_on_a_device(source: Path, recipe: Recipe, tmp_path: Path, request: Any) -> None:
    run(on(prepare(str(source), recipe), CPU), tmp_path / "cpu")
    job = on(prepare(str(source), recipe), FIRST)
    devices = request.getfixturevalue("pretended")
    run(job, tmp_path / "device")
    assert weights(tmp_path / "device") == weights(tmp_path / "cpu")
    assert devices.peak_bytes > 0


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "gpt2", "qwen2")),
    ],
)
def test_another_device_writes_the_bytes_of_the_cpu(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, request: Any
) -> None:
    """Experts; sliding windows; tied embeddings and another kind of linear; biases."""
    same_on_a_device(tiny_checkpoint(family), small("int4"), tmp_path, request)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("awq-gptq", {}),
        ("smoothquant", {}),
        ("rtn-int4", {}),
        ("nvfp4", {}),
        ("mxfp4", {}),
        ("nf4", {}),
        ("int4", {"effort": "best"}),
    ],
)
def test_every_method_works_where_the_block_is(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    recipe: str,
    options: Mapping[str, Any],
    request: Any,
) -> None:
    same_on_a_device(tiny_checkpoint("llama"), small(recipe, **options), tmp_path, request)


@pytest.mark.parametrize("kept_bytes", [0, pytest.param(GIB, marks=pytest.mark.slow)])
def test_blocks_spread_over_devices_write_the_bytes_of_the_cpu(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kept_bytes: int, request: Any
) -> None:
    """Embeddings on the CPU, a block on each of two devices; hidden states here or there."""
    source = str(tiny_checkpoint("llama"))
    run(on(prepare(source, small("int4")), CPU), tmp_path / "cpu")
    job = on(prepare(source, small("int4")), CPU, FIRST, SECOND, kept_bytes=kept_bytes)
    request.getfixturevalue("pretended")
    run(job, tmp_path / "devices")
    assert weights(tmp_path / "devices") == weights(tmp_path / "cpu")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_on_its_device(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, request: Any
) -> None:
    """AWQ leaves norms with new values, which a resumed run takes from its first block's file."""
    source, recipe = str(tiny_checkpoint("llama")), small("awq")
    run(on(prepare(source, recipe), CPU), tmp_path / "cpu")

    class Stop(BaseException):
        pass

    class Stopping(Silent):
        def block_done(self, index: int, reports: Any, seconds: float) -> None:
            raise Stop

    jobs = [on(prepare(source, recipe), CPU, FIRST, FIRST) for _ in range(2)]
    request.getfixturevalue("pretended")
    with pytest.raises(Stop):
        run(jobs[0], tmp_path / "device", listener=Stopping())
    run(jobs[1], tmp_path / "device")
    assert weights(tmp_path / "device") == weights(tmp_path / "cpu")


def test_a_dry_run_says_what_is_taken_of_a_device(
    tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    job = prepare(str(tiny_checkpoint("llama")), small("int4"), devices=DeviceRequest("cpu"))
    print_plan(job)
    assert "device" not in capsys.readouterr().err
    request, rooms = DeviceRequest("cuda"), [Room(FIRST, 10**9)]
    placed = place(job.skeleton, job.plan, job.recipe, request, rooms)
    job = replace(job, placed=placed)
    print_plan(job)
    text = " ".join(capsys.readouterr().err.split())
    assert placed.block is not None
    assert "device: ipu:0 (2 blocks)" in text
    assert f"the largest block takes {size_text(placed.block.total)}" in text
    told = plan_to_dict(job)["devices"]
    assert told["blocks"] == ["ipu:0", "ipu:0"]
    assert told["block_bytes"]["total"] == placed.block.total


@pytest.mark.slow
def test_what_a_device_needs_is_known_before(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, request: Any
) -> None:
    """The estimate bounds what tensors really take, and is not wild. The forward pass is counted
    for chunks of 2048 tokens, of which these few samples have 128: it is left out of both ends."""
    source = tiny_checkpoint("llama", intermediate_size=1024)
    job = on(prepare(str(source), small("int4")), CPU, FIRST, FIRST)
    need = block_bytes(job.skeleton, job.plan, job.recipe, 0)
    devices = request.getfixturevalue("pretended")
    run(job, tmp_path / "out")
    assert devices.peak_bytes <= need.total
    assert devices.peak_bytes >= 0.5 * (need.weights + need.statistics)


def test_a_block_of_8b_is_quantized_in_6_gb(tmp_path: Path) -> None:
    """Llama 3's shapes from headers alone, down to the file's holes."""
    folder = llama_8b_of_one_block(tmp_path)
    model = Model(folder)
    placed = model.place(DeviceRequest("cuda", max_memory={"0": 6 * 10**9}), 6 * 10**9)
    assert placed.block is not None
    assert 4 * 10**9 < placed.block.total < 6 * 10**9
    # Embeddings in bfloat16, a norm, rotary tables; no head.
    assert 0 <= placed.outside_bytes - 2 * 128256 * 4096 < 100_000
    assert placed.placement.outside == CPU
    wide = model.place(DeviceRequest("cuda"), 24 * 10**9)
    assert wide.placement.outside == FIRST
    assert wide.placement.kept_bytes > 128 * 512 * 4096 * 4


def llama_8b_of_one_block(folder: Path) -> Path:
    from transformers import LlamaConfig

    hidden, between, kv, vocabulary = 4096, 14336, 1024, 128256
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens": (vocabulary, hidden),
        f"{layer}self_attn.q_proj": (hidden, hidden),
        f"{layer}self_attn.k_proj": (kv, hidden),
        f"{layer}self_attn.v_proj": (kv, hidden),
        f"{layer}self_attn.o_proj": (hidden, hidden),
        f"{layer}mlp.gate_proj": (between, hidden),
        f"{layer}mlp.up_proj": (between, hidden),
        f"{layer}mlp.down_proj": (hidden, between),
        f"{layer}input_layernorm": (hidden,),
        f"{layer}post_attention_layernorm": (hidden,),
        "model.norm": (hidden,),
        "lm_head": (vocabulary, hidden),
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        info = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        header[f"{name}.weight"] = info
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=between,
        vocab_size=vocabulary,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


H200 = [Accelerator(torch.device("cuda", index), "H200", lambda: 100 * GIB) for index in range(2)]


@pytest.mark.parametrize(
    ("asked", "found", "devices"),
    [
        ({}, [], []),
        ({}, H200, ["cuda:0"]),
        ({"name": "cpu"}, H200, []),
        ({"name": "cuda"}, H200, ["cuda:0"]),
        ({"name": "cuda:1"}, H200, ["cuda:1"]),
        ({"spread": True}, H200, ["cuda:0", "cuda:1"]),
        ({"spread": True, "max_memory": {"1": GIB}}, H200, ["cuda:1"]),
        ({"max_memory": {"1": GIB}}, H200, ["cuda:1"]),
        ({"local_rank": 1}, H200, ["cuda:1"]),
    ],
)
def test_the_devices_that_were_asked_for_are_taken(
    asked: Mapping[str, Any], found: list[Accelerator], devices: list[str]
) -> None:
    rooms = choose(DeviceRequest(**asked), found)
    assert [str(room.device) for room in rooms] == devices


def test_what_may_be_used_of_a_device_is_the_less_of_what_is_free_and_what_was_said() -> None:
    rooms = choose(DeviceRequest(spread=True, max_memory={"0": GIB, "1": 200 * GIB}), H200)
    assert [room.limit_bytes for room in rooms] == [GIB, 90 * GIB]


@pytest.mark.parametrize(
    ("asked", "found", "message", "hint"),
    [
        ({"name": "cuda"}, [], "this machine has none", "--device cpu"),
        ({"spread": True}, [], "--device-map auto needs a CUDA device", "--device cpu"),
        ({"name": "cuda:2"}, H200, "no CUDA device 2; this machine has 2", "cuda:0 to cuda:1"),
        ({"max_memory": {"5": GIB}}, H200, "no CUDA device 5", "cuda:0 to cuda:1"),
        ({"name": "cpu", "max_memory": {"0": GIB}}, H200, "uses none", "leave one"),
        ({"local_rank": 2}, H200, "rank 2 of this machine finds 2", "--nproc-per-node 2"),
        ({"spread": True, "local_rank": 0}, H200, "for one process", "leave it out"),
    ],
)
def test_devices_that_are_not_there_are_refused_with_the_way_out(
    asked: Mapping[str, Any], found: list[Accelerator], message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        choose(DeviceRequest(**asked), found)
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "asked", [{"name": "tpu"}, {"name": "cuda:x"}, {"name": "cpu", "spread": True}]
)
def test_requests_that_mean_nothing_are_refused(asked: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError):
        DeviceRequest(**asked)


def test_sizes_are_read_as_they_are_written() -> None:
    assert parse_max_memory("0=10GiB, cpu=1.5GB") == {"0": 10 * GIB, "cpu": 1_500_000_000}
    for text in ("10GiB", "0=10", "gpu=1GB", "0=1GB,,"):
        with pytest.raises(UsageError, match="is not a device and a size"):
            parse_max_memory(text)


class Model:
    """A tiny model's plan, to be placed on devices of any size."""

    def __init__(self, folder: Path) -> None:
        self.skeleton = Skeleton.build(Checkpoint.open(folder))
        self.recipe = small("int4")
        layout = layout_for(self.recipe, "compressed-tensors")
        self.plan = make_plan(self.skeleton, self.recipe, layout)
        self.block = block_bytes(self.skeleton, self.plan, self.recipe, 0).total
        self.outside = outside_bytes(self.skeleton)

    def place(self, request: DeviceRequest, *limits: int) -> Placed:
        rooms = [Room(torch.device("ipu", index), size) for index, size in enumerate(limits)]
        return place(self.skeleton, self.plan, self.recipe, request, rooms)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Model:
    return Model(tiny_checkpoint("llama", num_hidden_layers=6))


def test_embeddings_share_the_device_where_there_is_room(model: Model) -> None:
    roomy = model.place(DeviceRequest(), model.block + model.outside)
    assert roomy.placement.outside == FIRST
    assert roomy.placement.kept_bytes == 0
    narrow = model.place(DeviceRequest(), model.block + model.outside - 1)
    assert narrow.placement.outside == CPU
    assert narrow.placement.devices == (FIRST,)
    wide = model.place(DeviceRequest(), model.block + model.outside + 8000)
    assert wide.placement.kept_bytes == 1000


def test_a_block_that_does_not_fit_is_refused_and_auto_goes_to_the_cpu(model: Model) -> None:
    with pytest.raises(UsageError, match=r"a block takes .* ipu:0 may use"):
        model.place(DeviceRequest("cuda"), model.block - 1)
    with pytest.raises(UsageError, match="a block takes"):
        model.place(DeviceRequest(spread=True), model.block - 1, model.block - 1)
    placed = model.place(DeviceRequest(), model.block - 1)
    assert placed.placement.devices == (CPU,)
    assert "quantized on the CPU" in placed.warnings[0]


def test_a_device_map_fills_devices_in_order_as_accelerate_does(model: Model) -> None:
    weights = sum(item.numel() * 4 for _, item in model.skeleton.block_parameters(0))
    # Room for embeddings and three blocks and a half on each, beside the work on one of them.
    each = model.block + model.outside + int(2.5 * weights)
    request = DeviceRequest(spread=True, max_memory={"0": each, "1": each, "cpu": GIB})
    found = model.place(request, each, each).placement
    assert found.devices == (FIRST, SECOND)
    order = [device.index for device in found.blocks]
    assert order == sorted(order)


def test_what_a_map_leaves_on_no_device_is_worked_on_by_the_first(model: Model) -> None:
    request = DeviceRequest(spread=True, max_memory={"0": model.block, "1": model.block})
    found = model.place(request, model.block, model.block).placement
    assert len(found.blocks) == 6
    assert set(found.blocks) <= {FIRST, SECOND}


def test_a_block_too_large_for_its_device_goes_to_the_one_that_holds_it(model: Model) -> None:
    request = DeviceRequest(spread=True, max_memory={"0": model.block - 1, "1": 10 * model.block})
    found = model.place(request, model.block - 1, 10 * model.block).placement
    assert set(found.blocks) == {SECOND}


def test_the_head_is_left_out_where_it_is_no_embedding(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    untied = Skeleton.build(Checkpoint.open(tiny_checkpoint("llama", tie_word_embeddings=False)))
    assert untied.head_alone() == {"lm_head.weight"}
    untied.load_outside(with_head=False)
    assert untied.model.lm_head.weight.is_meta
    assert untied.model.get_input_embeddings().weight.device == CPU
    tied = Skeleton.build(Checkpoint.open(tiny_checkpoint("llama", tie_word_embeddings=True)))
    assert tied.head_alone() == set()
    tied.load_outside(with_head=False)
    assert not tied.model.lm_head.weight.is_meta
