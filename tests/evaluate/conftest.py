"""Real small models that differ in one thing each from the one they were made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def original(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A two-block Llama with a context of 512 whose tokenizer adds no BOS."""
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def noisy(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original with a little noise on every linear of its first block."""
    folder = tmp_path_factory.mktemp("models") / "noisy"
    shutil.copytree(original, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers.0." in name and tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensors[name] = tensor + 0.05 * tensor.std() * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def with_bos(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original with a tokenizer that puts BOS (0) before every text."""
    folder = tmp_path_factory.mktemp("models") / "with-bos"
    shutil.copytree(original, folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    bos = "<|endoftext|>"
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    data["post_processor"]["single"] = [special, *data["post_processor"]["single"]]
    data["post_processor"]["special_tokens"] = {bos: {"id": bos, "ids": [0], "tokens": [bos]}}
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder
