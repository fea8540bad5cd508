"""`--search best` beyond plain linears: stacks of experts, fused projections, Conv1D."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import kl_div, log_softmax

from qtool.calibration.dataset import load_calibration, load_tokenizer
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import open_weights
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.plan import plan_export
from qtool.convert.search import BestSearch
from qtool.recipe import Calibration
from qtool.source import Source

TinyCheckpoint = Callable[..., Path]

# Rows of whole K-quant blocks everywhere, so that all is searched on the grids of Q3_K.
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 256},
    "qwen3_moe": {"moe_intermediate_size": 256, "norm_topk_prob": True},
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "phi3": {},
    "gpt2": {},
}
# Matrices that are searched: of attention, and of what comes after it, in a block.
MATRICES = {
    "mixtral": 4 + 3 * 4,
    "qwen3_moe": 4 + 3 * 4,
    "qwen2_moe": 4 + 3 * 4 + 3,
    "phi3": 2 + 2,
    "gpt2": 2 + 2,
}


def log_probabilities(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return log_softmax(model(tokens).logits.flatten(0, 1).double(), dim=-1)


def with_weights_of(gguf: Path, folder: Path, out: Path) -> Path:
    """The model with the values that a GGUF file gives its weights."""
    written = GgufWeights(Source("gguf", gguf))
    shutil.copytree(folder, out)
    names = Checkpoint.open(folder).tensors
    tensors = {name: written.tensor(name).float().contiguous() for name in names}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        pytest.param("phi3", marks=pytest.mark.slow),
    ],
)
def test_it_is_closer_to_the_model_than_plain_rounding(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family, **SETTINGS[family])
    plan = plan_export(open_weights(Source("tiny", folder)), "Q3_K_S")
    search = BestSearch(plan, Calibration(None, num_samples=12, sequence_length=64))
    best, plain = tmp_path / "best.gguf", tmp_path / "plain.gguf"
    write_gguf(dataclasses.replace(plan, prepared=search), best, progress=lambda n: None)
    write_gguf(plan, plain, progress=lambda n: None)
    one, other = GgufFile.open(best), GgufFile.open(plain)
    assert one.entries == other.entries
    assert list(one.tensors.values()) == list(other.tensors.values())
    assert len(search.found) == 2 * MATRICES[family]
    assert all(found.error <= found.plain_error for found in search.found)
    assert sum(f.error for f in search.found) < 0.6 * sum(f.plain_error for f in search.found)

    text = Calibration(None, num_samples=8, sequence_length=64, seed=1)  # other passages
    tokens = load_calibration(text, load_tokenizer(folder)).tokens
    exact = log_probabilities(folder, tokens)
    divergence = {
        path.stem: kl_div(
            log_probabilities(with_weights_of(path, folder, tmp_path / path.stem), tokens),
            exact,
            log_target=True,
            reduction="batchmean",
        )
        for path in (best, plain)
    }
    assert divergence["best"] < divergence["plain"], divergence


def test_an_expert_that_nothing_reaches_is_rounded_as_ever(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """With two tokens and four experts, two of them a token, some see nothing: they borrow from
    the others, and every matrix of the stack is there.
    """
    folder = tiny_checkpoint("mixtral", **SETTINGS["mixtral"])
    plan = plan_export(open_weights(Source("tiny", folder)), "Q3_K_S")
    search = BestSearch(plan, Calibration(None, num_samples=1, sequence_length=2))
    out = tmp_path / "best.gguf"
    notes = write_gguf(
        dataclasses.replace(plan, prepared=search), out, progress=lambda n: None
    ).notes
    assert "32 linears searched with 2 tokens" in notes[0]
    written, reader = GgufWeights(Source("best", out)), plan.reader
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"
        meant, found = reader.tensor(name).float(), written.tensor(name).float()
        assert float((found - meant).norm() / meant.norm()) < 0.4, name
