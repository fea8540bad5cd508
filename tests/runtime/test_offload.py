"""Blocks on several devices: the same text as on one, by arithmetic that says which are where.

A CPU stands for the second device here, where a part runs by other code than the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.convert.run import convert_model
from qtool.errors import UnsupportedModel, UsageError
from qtool.kernels import dispatch
from qtool.kernels.dispatch import Choice
from qtool.kernels.reference import Span
from qtool.runtime import layers, offload
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine import runner
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import Copy
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.split_runner import SplitRunner
from qtool.runtime.layers import DEFAULT_RULES
from qtool.runtime.llm import LLM
from qtool.runtime.loading import LoadedModel, find_model, load_for
from qtool.runtime.memory import CUDA_SHARE, NotEnoughMemory, least_weight_bytes
from qtool.runtime.models import triton_decoder
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.load import NativePlan
from qtool.runtime.models.native import why_not
from qtool.runtime.models.split import SplitDecoder, Stretch
from qtool.runtime.offload import (
    cache_bytes_by_layer,
    divide,
    load_parts,
    most_gpu_layers,
    weight_bytes_by_layer,
)
from qtool.weights import QuantizedWeight, Weight

MODEL = "builtin:books-7m"
CPU = torch.device("cpu")
# Another device to look at, the same to compute on.
OTHER = torch.device("cpu", 0)
PROMPTS = ["It was a cold evening", "It was a cold evening, and the sea", "Call", "The old man"]


@pytest.fixture
def second_part_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's one call runs blocks on the first device only."""
    monkeypatch.setattr(
        runner,
        "why_not",
        lambda decoder: "elsewhere" if decoder.device.index is not None else why_not(decoder),
    )


def split(model: str, first: int, *, dtype: Any = "float32") -> LoadedModel:
    """The first blocks on the CPU, all else on the other device."""
    found = find_model(model, dtype=dtype, device="cpu", revision=None, budget=None)
    assert isinstance(found.plan, NativePlan)
    num_blocks = found.plan.config.num_layers
    parts = Stretch(range(first), CPU), Stretch(range(first, num_blocks), OTHER)
    return load_parts(found, parts, DEFAULT_RULES)


def engine(loaded: LoadedModel, **options: Any) -> LLM:
    settings: dict[str, Any] = {
        "max_model_len": 256,
        "block_size": 8,
        "max_num_batched_tokens": 16,
        **options,
    }
    return LLM.from_loaded(loaded, EngineConfig(str(loaded.source.path), **settings))


def texts(llm: LLM, **sampling: Any) -> list[list[tuple[int, ...]]]:
    wanted = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, **sampling}
    found = llm.generate(PROMPTS, SamplingParams(**wanted), use_tqdm=False)
    return [[tuple(output.token_ids) for output in answer.outputs] for answer in found]


def whole(dtype: Any = "float32") -> LoadedModel:
    return load_for(EngineConfig(MODEL, dtype=dtype, device="cpu"))


@pytest.mark.usefixtures("second_part_one_by_one")
def test_two_parts_write_what_one_does() -> None:
    """Prompts in chunks, shared beginnings (blocks are copied and found again)."""
    one, two = engine(whole()), engine(split(MODEL, 3))
    decoder = two.loaded.decoder
    assert isinstance(decoder, SplitDecoder)
    assert [len(part.blocks) for part in decoder.parts] == [3, 5]
    assert texts(two, n=2) == texts(one, n=2)
    assert texts(two, n=2) == texts(one, n=2)  # from the cache now
    done, other = two.engine.stats(), one.engine.stats()
    assert done.prefix_cache_hits_total > 0
    assert done.operations_total == pytest.approx(other.operations_total, rel=0.05)
    # A tied table is on both devices.
    table = decoder.parts[0].embedding.nbytes
    assert two.info.weight_bytes == one.info.weight_bytes + table
    assert two.info.kv_cache_bytes == one.info.kv_cache_bytes
    tokens = torch.randint(0, 4096, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two.loaded.logits(tokens), one.loaded.logits(tokens))
    assert two.engine.embed((5, 6, 7), "mean") == pytest.approx(
        one.engine.embed((5, 6, 7), "mean"), abs=1e-5
    )


@pytest.mark.usefixtures("second_part_one_by_one")
@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        # 128 tokens for 8 answers of 30: some are preempted.
        {"kv_cache_memory_bytes": 1_100_000, "max_model_len": 64},
    ],
    ids=["int8 cache", "ngram", "preempted"],
)
def test_parts_write_what_one_does_in_every_way_of_running(options: dict[str, Any]) -> None:
    one, two = engine(whole(), **options), engine(split(MODEL, 1), **options)
    assert texts(two, n=2) == texts(one, n=2)
    if "kv_cache_memory_bytes" in options:
        assert two.engine.stats().num_preemptions > 0
        assert two.info.num_kv_blocks == one.info.num_kv_blocks


def test_parts_by_the_same_code_have_the_same_bits() -> None:
    """In bfloat16, where the library rounds inputs to 8 bits."""
    one, two = engine(whole("bfloat16")), engine(split(MODEL, 2, dtype="bfloat16"))
    assert texts(two) == texts(one)


@pytest.mark.parametrize("first", [0, 2])
def test_a_part_may_be_the_head_alone_or_all_blocks(
    first: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The tiny checkpoint has two blocks."""
    folder = str(tiny_checkpoint("qwen2", tie_word_embeddings=True))
    loaded = split(folder, first)
    expected = load_for(EngineConfig(folder, dtype="float32", device="cpu"))
    tokens = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.logits(tokens), expected.logits(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_second_part_by_the_kernels_of_a_gpu(
    first: int,
    tiny_checkpoint: Callable[..., Path],
    packed_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Interpreted: the last of two blocks and the head, or the head alone."""
    pytest.importorskip("triton")
    marlin = next(row for row in dispatch.KERNELS if row.name == "marlin")

    def choose(weight: Weight, dtype: torch.dtype, device: torch.device, rules: Any) -> Choice:
        if device.index is not None and isinstance(weight, QuantizedWeight):
            return Choice(marlin, "")
        return dispatch.choose(weight, dtype, device, rules)

    monkeypatch.setattr(layers, "choose", choose)
    monkeypatch.setattr(
        triton_decoder, "obstacle", lambda device: "no" if device.index is None else None
    )
    folder = packed_checkpoint(tiny_checkpoint("llama"), tmp_path / "model", "int4-g128-sym")
    loaded = split(str(folder), first)
    decoder = loaded.decoder
    assert isinstance(decoder, SplitDecoder)
    two = SplitRunner(decoder.for_context(128), num_blocks=4, block_size=16)
    assert [part.gpu is not None for part in two.runners] == [False, True]
    tokens = torch.randint(0, 4096, (20,), generator=torch.Generator().manual_seed(0))
    expected = load_for(EngineConfig(str(folder), dtype="float32", device="cpu")).logits(
        tokens[None]
    )[0]
    for start, stop in ((0, 9), (9, 20)):
        found = two.run(
            Batch(
                token_ids=tokens[start:stop],
                positions=torch.arange(start, stop),
                spans=(Span(stop - start, stop, [3, 1]),),
                sampled_rows=torch.tensor([stop - start - 1]),
                row_ranges=(),
            )
        )
        assert relative_error(found[0], expected[stop - 1]) < 1e-4


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.usefixtures("second_part_one_by_one")
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "deepseek_v3", "starcoder2"])
def test_families_in_parts(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Windows, experts in some layers, latent attention, layer norms."""
    folder = str(tiny_checkpoint(family))
    one = engine(load_for(EngineConfig(folder, dtype="float32", device="cpu")))
    assert texts(engine(split(folder, 1))) == texts(one)


@pytest.mark.usefixtures("second_part_one_by_one")
def test_a_gguf_file_and_a_packed_folder_in_parts(
    tiny_checkpoint: Callable[..., Path],
    packed_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint("llama")
    packed = packed_checkpoint(folder, tmp_path / "packed", "int4-g32-asym")
    tokens = torch.randint(0, 4096, (1, 12), generator=torch.Generator().manual_seed(0))
    gguf = convert_model(str(folder), to="gguf", type="Q8_0", out=tmp_path / "model.gguf")
    for model in (str(gguf), str(packed)):
        expected = load_for(EngineConfig(model, dtype="float32", device="cpu"))
        torch.testing.assert_close(split(model, 1).logits(tokens), expected.logits(tokens))


def test_the_table_says_which_layers_run_where(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    loaded = split(MODEL, 3, dtype="bfloat16")
    Console(width=200).print(loaded.kernel_table())
    table = capsys.readouterr().out
    assert "q k v o gate up down (0 to 2 on cpu)" in table
    assert "q k v o gate up down (3 to 7 and head on cpu)" in table
    assert "blocks (0 to 2 on cpu)" in table
    assert "MB 0 to 2 on cpu" in loaded.expected_speed()


def blocks(num_blocks: int, num_gpu_layers: int) -> list[tuple[str, range]]:
    found = divide(num_blocks, num_gpu_layers, torch.device("cuda"))
    return [(part.device.type, part.blocks) for part in found]


def test_the_last_layers_are_on_the_gpu_and_the_head_is_one() -> None:
    """llama.cpp's count: of 24 blocks and a head, 25 layers."""
    assert blocks(24, 0) == [("cpu", range(24))]
    assert blocks(24, 1) == [("cpu", range(24)), ("cuda", range(24, 24))]
    assert blocks(24, 5) == [("cpu", range(20)), ("cuda", range(20, 24))]
    assert blocks(24, 24) == [("cpu", range(1)), ("cuda", range(1, 24))]
    assert blocks(24, 25) == [("cuda", range(24))]
    assert blocks(24, 99) == [("cuda", range(24))]


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [([10, 10, 10, 25], 46, 3), ([10, 10], 9, 0), ([10, 10], 20, 2), ([10, 10], -5, 0)],
)
def test_as_many_layers_as_fit(sizes: Sequence[int], free: int, expected: int) -> None:
    assert most_gpu_layers(sizes, free) == expected


def test_weights_of_a_layer_are_counted_by_the_headers() -> None:
    """Every tensor of the bundled model once, a tied table with the head."""
    found = find_model(MODEL, dtype="bfloat16", device="cpu", revision=None, budget=None)
    assert isinstance(found.plan, NativePlan)
    config = found.plan.config
    sizes = weight_bytes_by_layer(found.plan, torch.bfloat16)
    assert len(sizes) == config.num_layers + 1
    assert len(set(sizes[:-1])) == 1
    assert config.tie_word_embeddings
    assert sum(sizes) == least_weight_bytes(found.reader, torch.bfloat16)


def test_where_there_is_no_gpu_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="this PyTorch finds no CUDA device"):
        load_for(EngineConfig(MODEL, n_gpu_layers=2, device="cuda"))
    loaded = load_for(EngineConfig(MODEL, n_gpu_layers=2))
    assert loaded.device.type == "cpu"
    assert isinstance(loaded.decoder, Decoder)
    assert "--n-gpu-layers 2: there is no GPU" in capsys.readouterr().err


def test_as_many_layers_as_fit_are_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for three blocks, the head and their cache, then for everything."""
    found = find_model(MODEL, dtype="float32", device="cpu", revision=None, budget=None)
    assert isinstance(found.plan, NativePlan)
    config = EngineConfig(MODEL, dtype="float32", max_model_len=64, n_gpu_layers="auto")
    weights = weight_bytes_by_layer(found.plan, torch.float32)
    cache = cache_bytes_by_layer(found.plan, config, torch.float32)
    last = sum(weights[-4:]) + sum(cache[-4:])
    asked: list[range] = []

    def load(found: Any, parts: Sequence[Stretch], rules: Any) -> LoadedModel:
        asked.extend(part.blocks for part in parts)
        return load_parts(found, [replace(part, device=CPU) for part in parts], rules)

    monkeypatch.setattr(offload, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(offload, "load_parts", load)
    for free in (int(last / CUDA_SHARE) + 2, int((last + weights[0]) / CUDA_SHARE) - 2):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        load_for(config)
    assert asked == [range(5), range(5, 8)] * 2


def test_memory_is_asked_for_on_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 1 MB has no room for two layers of the bundled model, and one of 4 GB has."""
    asked: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(offload, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 20))
    with pytest.raises(NotEnoughMemory, match="of the GPU"):
        load_for(EngineConfig(MODEL, n_gpu_layers=2))

    def load(found: Any, parts: Sequence[Stretch], rules: Any) -> LoadedModel:
        asked.extend((len(part.blocks), part.device) for part in parts)
        return load_parts(found, [replace(part, device=CPU) for part in parts], rules)

    monkeypatch.setattr(offload, "load_parts", load)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 4 << 30))
    load_for(EngineConfig(MODEL, n_gpu_layers=2))
    assert asked == [(7, CPU), (1, torch.device("cuda"))]


def test_transformers_code_is_not_divided(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two blocks and the head, one cannot be on the GPU, and three or more are all."""
    folder = str(tiny_checkpoint("gpt2"))
    monkeypatch.setattr(offload, "choose_device", lambda device: torch.device("cuda"))
    for asked_for in (1, "auto"):
        with pytest.raises(UnsupportedModel, match="cannot be divided"):
            load_for(EngineConfig(folder, n_gpu_layers=asked_for))
    asked: list[torch.device] = []
    monkeypatch.setattr(offload, "_load_whole", lambda config, device: asked.append(device))
    load_for(EngineConfig(folder, n_gpu_layers=99))
    assert asked == [torch.device("cuda")]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n_gpu_layers": -2}, "n_gpu_layers is -2"),
        ({"n_gpu_layers": "some"}, "n_gpu_layers is 'some'"),
        ({"n_gpu_layers": 4, "device": "cpu"}, "device is cpu"),
        ({"n_gpu_layers": 0, "device": "cuda"}, "device is cuda"),
        ({"n_gpu_layers": 4, "tensor_parallel_size": 2}, "shared out in 2 ranks"),
        (
            {"n_gpu_layers": 4, "speculative_config": {"method": "draft", "model": MODEL}},
            "draft model",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        EngineConfig(MODEL, **options)


def test_none_and_all_are_one_device() -> None:
    assert EngineConfig(MODEL, n_gpu_layers=0).device == "cpu"
    assert not EngineConfig(MODEL, n_gpu_layers="all").divides_layers
    assert not EngineConfig(MODEL, n_gpu_layers=-1).divides_layers
    assert EngineConfig(MODEL, n_gpu_layers="auto").divides_layers


def test_a_copy_and_a_cleared_block_reach_every_part() -> None:
    decoder = split(MODEL, 2).decoder
    assert isinstance(decoder, SplitDecoder)
    steps = SplitRunner(decoder.for_context(64), num_blocks=4, block_size=8)
    pools = [part.pool for part in steps.runners]
    for pool in pools:
        for layer in pool.layers:
            layer.keys[:, 8:16] = 3.0
    steps.copy([Copy(1, 2, 5)])
    steps.clear([1])
    for pool in pools:
        for layer in pool.layers:
            assert bool((layer.keys[:, 16:21] == 3.0).all())
            assert not layer.keys[:, 8:16].any()
