"""Files that other programs are given, written once a session.

The tests here run other people's programs on what this project writes. They are optional: each
module says which package it needs, and is skipped with that reason where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.convert.formats import open_weights
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.plan import plan_export
from qtool.source import Source

# Every default type that the writer has, mixes among them.
FILE_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_S"),
    *("Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4_MOE", "TQ1_0", "TQ2_0"),
)

AsGguf = Callable[[Path, str], Path]


@pytest.fixture(scope="session")
def as_gguf(tmp_path_factory: pytest.TempPathFactory) -> AsGguf:
    """`as_gguf(folder_or_file, "Q4_K_M")` -> a GGUF file of that model, in a folder of its own."""
    made: dict[tuple[Path, str], Path] = {}

    def make(model: Path, type: str) -> Path:
        if (model, type) not in made:
            out = tmp_path_factory.mktemp("gguf") / f"{type}.gguf"
            reader = open_weights(Source("model", model))
            write_gguf(plan_export(reader, type), out, progress=lambda size: None)
            made[model, type] = out
        return made[model, type]

    return make


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    """int64 [1, 64], ids that every model here has."""
    return torch.randint(3, 4096, (1, 64), generator=torch.Generator().manual_seed(0))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `file_type` runs for each of FILE_TYPES."""
    if "file_type" in metafunc.fixturenames:
        metafunc.parametrize("file_type", FILE_TYPES)
