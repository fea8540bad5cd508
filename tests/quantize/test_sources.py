"""Where models come from: the Hub's cache without a network, and code of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.artifact import Manifest
from qtool.errors import UsageError
from qtool.quantize.pipeline import quantize_model
from qtool.settings import child_environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(folder: Path, model: Path, repository: str) -> Path:
    """The Hub's cache as its library lays it out: blobs, and a snapshot of links to them."""
    root = folder / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return root


def test_a_model_in_the_hub_cache_is_quantized_offline(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In a process of its own: the Hub's library reads these variables when it is imported."""
    hub_cache(tmp_path / "cache", tiny_checkpoint("qwen3"), "someone/tiny-qwen3")
    arguments = ["quantize", "someone/tiny-qwen3", "--num-samples", "4", "--sequence-length", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "qtool", *arguments],
        cwd=tmp_path,
        env=child_environment(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(tmp_path / "tiny-qwen3-int4")
    assert manifest.source == "someone/tiny-qwen3"
    assert manifest.source_revision == COMMIT
    assert not any(path.is_symlink() for path in (tmp_path / "tiny-qwen3-int4").iterdir())


CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_family"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_code_that_a_model_brings_runs_only_when_trusted(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers copies such code into a cache; keep it out of the user's.
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("llama"), source)
    (source / "configuration_own.py").write_text(CONFIGURATION)
    (source / "modeling_own.py").write_text(MODELING)
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "own_family",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="its own Python code") as error:
        quantize_model(str(source), "rtn-int4", out=tmp_path / "out")
    assert "--trust-remote-code" in (error.value.hint or "")
    quantize_model(str(source), "rtn-int4", out=tmp_path / "out", trust_remote_code=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"configuration_own.py", "modeling_own.py"} <= names
