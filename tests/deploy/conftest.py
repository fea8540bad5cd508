"""`qtool deploy` as a user runs it: its command line, in this process."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qtool.cli import qtool
from qtool.errors import QtoolError

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
"""Of a model whose six heads and four layers do not divide by everything."""


@pytest.fixture
def deploy() -> Callable[[str], str]:
    """What `qtool deploy LINE` prints on stdout; raises the QtoolError that it ends with."""

    def run(line: str) -> str:
        done = CliRunner().invoke(qtool, ["deploy", *shlex.split(line)])
        if isinstance(done.exception, QtoolError):
            raise done.exception
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
        return done.stdout

    return run


@pytest.fixture
def refusal(deploy: Callable[[str], str]) -> Callable[[str], QtoolError]:
    """The error with which `qtool deploy LINE` ends."""

    def run(line: str) -> QtoolError:
        with pytest.raises(QtoolError) as caught:
            deploy(line)
        return caught.value

    return run


@pytest.fixture
def written(deploy: Callable[[str], str]) -> Callable[[str, Path], dict[str, str]]:
    """The files that `qtool deploy LINE` writes into a folder."""

    def run(line: str, folder: Path) -> dict[str, str]:
        deploy(f"{line} --out {folder}")
        return {
            str(path.relative_to(folder)): path.read_text()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return run


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """A model folder that is a config alone: what is refused by it is refused without weights."""

    def make(
        name: str = "model", quantization: Mapping[str, Any] | None = None, **sizes: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {**CONFIG, **sizes}
        if quantization is not None:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
