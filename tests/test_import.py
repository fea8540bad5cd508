"""`import qtool` and `qtool --help` stay light: what is heavy loads on use.

torch alone takes seconds to import, click some hundredths of one; a command line that is asked for
its help has no business loading torch or the libraries that pull it in.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qtool.cli import COMMANDS

HEAVY = {
    "accelerate",
    "compressed_tensors",
    "datasets",
    "fastapi",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "pandas",
    "pydantic",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
}

REPORT = "import json, sys; print(json.dumps(sorted(sys.modules)))"

HELP = """
import contextlib, io, qtool.cli
with contextlib.redirect_stdout(io.StringIO()) as shown:
    try:
        qtool.cli.main({arguments})
    except SystemExit as ended:
        assert not ended.code, ended.code
assert "Usage: qtool" in shown.getvalue()
"""


def packages_loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("module", ["qtool", "qtool.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    loaded = packages_loaded_by(f"import {module}")
    assert "qtool" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_nothing_heavy(command: str | None) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    loaded = packages_loaded_by(HELP.format(arguments=arguments))
    assert "click" in loaded
    assert not loaded & HEAVY
