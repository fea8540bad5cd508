"""The step whose memory is measured is the largest that can come."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.engine.step_memory import largest_step, measure_step_bytes
from qtool.runtime.loading import load_model
from qtool.runtime.random_model import QWEN_05B, random_model

CPU = torch.device("cpu")


def test_the_largest_step_is_a_whole_budget_of_one_prompt() -> None:
    batch = largest_step(50, 8, 16, CPU)
    assert batch.spans[0].num_queries == batch.spans[0].length == 50
    assert len(batch.spans[0].block_ids) == 4
    assert batch.positions.tolist() == list(range(50))
    assert batch.sampled_rows.tolist() == list(range(42, 50))
    assert largest_step(3, 8, 16, CPU).sampled_rows.tolist() == [0, 1, 2]


def test_a_model_runs_it(books_7m: Path) -> None:
    model = load_model(str(books_7m)).decoder
    runner = ModelRunner(model, num_blocks=4, block_size=16)
    logits = runner.run(largest_step(50, 8, 16, CPU))
    assert logits.shape == (8, model.vocab_size)
    assert bool(logits.isfinite().all())


def test_a_cache_in_8_bit_floats_is_for_gpus(books_7m: Path) -> None:
    model = load_model(str(books_7m)).decoder
    with pytest.raises(UsageError, match="fp8 is not offered for this model on cpu"):
        ModelRunner(model, num_blocks=4, block_size=16, kv_cache_dtype="fp8")
    with pytest.raises(UsageError, match="fp8 is not offered in 2 ranks"):
        EngineConfig("model", kv_cache_dtype="fp8", tensor_parallel_size=2)


@pytest.mark.gpu
def test_more_tokens_take_more_memory() -> None:
    small = {**QWEN_05B, "num_hidden_layers": 2}
    model = random_model(small, device=torch.device("cuda")).decoder
    config = EngineConfig("random", max_num_batched_tokens=256, max_num_seqs=4)
    few = measure_step_bytes(model, config, 4096)
    many = measure_step_bytes(model, replace(config, max_num_batched_tokens=4096), 4096)
    assert 0 < few < many
