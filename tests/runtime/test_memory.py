"""What a model and its cache may take: the arithmetic, and the tensors that come of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.convert.formats import open_weights
from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.draft_model import DraftProposer
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.speculative_config import SpeculativeConfig
from qtool.runtime.loading import LoadedModel, load_model
from qtool.runtime.memory import (
    CPU_SHARE,
    MemoryBudget,
    NotEnoughMemory,
    free_ram,
    least_weight_bytes,
    plan_pool,
    step_logits_bytes,
)
from qtool.source import resolve
from qtool.units import size_text

GB = 10**9
# 2 layers, keys and values, 2 heads of 64 in float32.
BYTES_PER_TOKEN = 2048


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_checkpoint("llama")))


def pool_bytes_of(engine: Engine) -> int:
    """Of the real tensors."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in engine._runner.pool.layers
        for tensor in layer.tensors
    }
    return sum(storages.values())


@pytest.mark.parametrize("given", [BYTES_PER_TOKEN * 32, 1_000_003, 7_777_777])
@pytest.mark.parametrize("block_size", [16, 32])
def test_the_pool_has_the_bytes_it_was_given_and_no_more(
    tiny: LoadedModel, given: int, block_size: int
) -> None:
    config = EngineConfig("tiny", kv_cache_memory_bytes=given, block_size=block_size)
    made = Engine(tiny, config)
    taken = pool_bytes_of(made)
    assert taken == made.info.kv_cache_bytes
    assert taken <= given < taken + block_size * BYTES_PER_TOKEN


def test_a_share_of_the_memory_holds_weights_pool_and_logits(tiny: LoadedModel) -> None:
    config = EngineConfig("tiny", gpu_memory_utilization=0.8, max_num_seqs=200)
    budget = MemoryBudget(
        total_bytes=60_000_000, used_bytes=20_000_000, device="cpu", utilization=0.8
    )
    plan = plan_pool(config, tiny.decoder, 512, budget)
    # Three copies of a row for each sequence, two of those that judge a prompt.
    logits = (3 * 200 + 2 * 64) * tiny.decoder.vocab_size * 4
    pool = plan.num_blocks * 32 * BYTES_PER_TOKEN
    left = 48_000_000 - 20_000_000 - logits
    assert pool <= left < pool + 32 * BYTES_PER_TOKEN
    assert "0.8 x 60 MB free at the start = 48 MB may be used, less 20 MB in use" in (
        budget.arithmetic(logits)
    )


def test_guesses_have_logits_of_their_own(tiny: LoadedModel) -> None:
    vocab = tiny.decoder.vocab_size
    config = EngineConfig(
        "tiny",
        max_num_seqs=8,
        max_num_batched_tokens=256,
        speculative_config=SpeculativeConfig("ngram", num_speculative_tokens=5),
    )
    assert step_logits_bytes(config, tiny.decoder) == 4 * vocab * (3 * 8 * (1 + 5) + 2 * 64)
    few = replace(config, max_num_batched_tokens=20)
    assert step_logits_bytes(few, tiny.decoder) == 4 * vocab * (3 * 20 + 2 * 64)
    drafting = step_logits_bytes(config, tiny.decoder, tiny.decoder)
    assert drafting - step_logits_bytes(config, tiny.decoder) == 4 * vocab * 3 * 8


@pytest.mark.parametrize("given", [1_000_003, 7_777_777])
def test_a_draft_model_s_cache_is_within_the_bytes_given(
    tiny: LoadedModel, given: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    small = tiny_checkpoint("llama", num_hidden_layers=1)
    config = EngineConfig(
        "tiny",
        dtype="float32",
        kv_cache_memory_bytes=given,
        speculative_config=SpeculativeConfig("draft", str(small)),
    )
    made = Engine(tiny, config)
    assert made._speculation is not None
    proposer = made._speculation._proposer
    assert isinstance(proposer, DraftProposer)
    taken = pool_bytes_of(made) + proposer._runner.pool.nbytes
    each = 32 * (BYTES_PER_TOKEN + BYTES_PER_TOKEN // 2)
    assert taken == made.info.num_kv_blocks * each
    assert taken <= given < taken + each


def test_a_draft_model_s_weights_and_logits_count_in_the_share(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.runtime.memory.free_ram", lambda: 100_000_000)
    guesses = SpeculativeConfig("draft", str(tiny.source.path), num_speculative_tokens=1)
    config = EngineConfig(
        "tiny", gpu_memory_utilization=0.5, max_num_seqs=4, speculative_config=guesses
    )
    budget = MemoryBudget.measure(config, tiny.device, weight_bytes=2 * tiny.nbytes)
    plan = plan_pool(config, tiny.decoder, 2**20, budget, tiny.decoder)
    usable = (100_000_000 + 2 * tiny.nbytes) // 2
    # Drawn from: a row and a guess for each of 4; judging a prompt; the draft's own rows.
    logits = 4 * tiny.decoder.vocab_size * (3 * 8 + 2 * 64 + 3 * 4)
    assert plan.num_blocks == (usable - 2 * tiny.nbytes - logits) // (2 * 32 * BYTES_PER_TOKEN)


def test_a_draft_model_that_does_not_fit_beside_is_refused(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that is left when the model is loaded holds half of another such."""
    monkeypatch.setattr("qtool.runtime.memory.free_ram", lambda: tiny.nbytes // 2)
    config = EngineConfig(
        "tiny",
        dtype="float32",
        gpu_memory_utilization=1.0,
        speculative_config=SpeculativeConfig("draft", str(tiny.source.path)),
    )
    with pytest.raises(NotEnoughMemory, match=f"{size_text(tiny.nbytes)} are in use"):
        Engine(tiny, config)


def test_nobody_saying_anything_a_share_of_what_is_free_is_taken(tiny: LoadedModel) -> None:
    budget = MemoryBudget(total_bytes=50_000_000, used_bytes=10_000_000, device="cpu")
    plan = plan_pool(EngineConfig("tiny"), tiny.decoder, 512, budget)
    assert plan.num_blocks == int(40_000_000 * CPU_SHARE) // (32 * BYTES_PER_TOKEN)
    assert plan.max_model_len == 512


def test_without_room_for_a_block_the_arithmetic_is_told(tiny: LoadedModel) -> None:
    config = EngineConfig("tiny", gpu_memory_utilization=0.5)
    budget = MemoryBudget(2 * GB, GB, "cpu", utilization=0.5)
    with pytest.raises(UsageError, match=r"may take 0 bytes \(0.5 x 2 GB free at the start"):
        plan_pool(config, tiny.decoder, 512, budget)


def test_a_gpu_counts_what_others_use() -> None:
    budget = MemoryBudget(80 * GB, 30 * GB, "cuda", utilization=0.9)
    assert budget.pool_bytes(logits_bytes=GB) == 41 * GB
    assert "0.9 x 80 GB of the GPU = 72 GB may be used" in budget.arithmetic(GB)


def test_a_model_that_cannot_fit_is_refused_before_a_weight_is_read(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_checkpoint("llama"))
    reader = open_weights(resolve(folder))
    needed = least_weight_bytes(reader, torch.float32)
    assert needed == load_model(folder).nbytes

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    for name in ("tensor", "weight"):
        monkeypatch.setattr(type(reader), name, never)
    small = MemoryBudget(10 * needed, 0, "cpu", utilization=0.05)
    with pytest.raises(NotEnoughMemory, match="its weights take at least") as raised:
        load_model(folder, budget=small)
    assert f"0.05 x {size_text(10 * needed)} free at the start" in raised.value.message
    assert "qtool quantize" in str(raised.value.hint)
    cache = replace(small, utilization=1.0, kv_cache_bytes=9 * needed + 1)
    with pytest.raises(NotEnoughMemory, match=r"the KV cache \S+ MB as asked"):
        load_model(folder, budget=cache)


def test_packed_weights_count_as_they_are_stored(books_7m: Path, tmp_path: Path) -> None:
    from qtool.convert.run import convert_model

    gguf = tmp_path / "model.gguf"
    convert_model(str(books_7m), to="gguf", type="Q4_0", out=gguf)
    needed = least_weight_bytes(open_weights(resolve(str(gguf))), torch.bfloat16)
    assert 0.8 * gguf.stat().st_size < needed < gguf.stat().st_size
    assert needed <= load_model(str(gguf), dtype="bfloat16").nbytes


@pytest.mark.parametrize("value", [0.0, 1.01, -1.0])
def test_a_share_out_of_range_is_named(value: float) -> None:
    with pytest.raises(UsageError, match="gpu_memory_utilization is"):
        EngineConfig("model", gpu_memory_utilization=value)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:  8000 kB\nMemAvailable:    4000 kB\n"


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 4_096_000),
        ({"memory.max": "max\n"}, 4_096_000),
        (
            {
                "memory.max": "3000000",
                "memory.current": "2000000",
                "memory.stat": "anon 1\nactive_file 100\ninactive_file 200\n",
            },
            1_000_300,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "3000000",
                "memory/memory.usage_in_bytes": "1000000",
                "memory/memory.stat": "total_inactive_file 5\n",
            },
            2_000_005,
        ),
        (
            {
                "memory/memory.limit_in_bytes": str(2**63),
                "memory/memory.usage_in_bytes": "1",
                "memory/memory.stat": "",
            },
            4_096_000,
        ),
    ],
)
def test_free_memory_is_within_the_limit_of_a_container(
    tmp_path: Path, group: dict[str, Any], free: int
) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO})
    write(tmp_path / "sys/fs/cgroup", group)
    assert free_ram(tmp_path) == free
