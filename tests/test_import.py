"""`import qtool` and `qtool --help` stay light: what is heavy loads on use.

torch alone takes seconds to import, click some hundredths of one; a command line that is asked for
its help has no business loading torch or the libraries that pull it in.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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

REPORT = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"

SNIPPETS = {
    "import qtool": "import qtool",
    "import qtool.cli": "import qtool.cli",
    "qtool --version": "import qtool.cli as c; run(['--version'])",
    "qtool --help": "import qtool.cli as c; run(['--help'])",
    "qtool quantize --help": "import qtool.cli as c; run(['quantize', '--help'])",
    "qtool convert --help": "import qtool.cli as c; run(['convert', '--help'])",
    "qtool serve --help": "import qtool.cli as c; run(['serve', '--help'])",
    "qtool chat --help": "import qtool.cli as c; run(['chat', '--help'])",
    "qtool eval --help": "import qtool.cli as c; run(['eval', '--help'])",
    "qtool demo --help": "import qtool.cli as c; run(['demo', '--help'])",
}

RUN = """
def run(arguments):
    import contextlib, io, sys
    sys.argv = ["qtool", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = c.main()
        except SystemExit as exit:
            status = exit.code
    assert status in (0, None), status
    assert "qtool" in out.getvalue()
"""


@pytest.mark.parametrize("name", SNIPPETS)
def test_what_is_heavy_loads_on_use(name: str) -> None:
    code = f"{RUN}\n{SNIPPETS[name]}\n{REPORT}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "qtool" in loaded
    assert not loaded & HEAVY
