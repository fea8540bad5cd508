"""Where and when something was measured: what must stand beside a figure for it to mean anything.

Other work on the machine only ever slows a measurement, so the load average stands with it, before
and after; ratios of things that took turns in one run stand it best.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtool.artifact import tool_versions
from qtool.native_build import Unavailable, cpu_flags
from qtool.output import flush_to_disk

VERSION = 1
# Those that say which instructions a kernel could use.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def environment() -> dict[str, str]:
    """Versions and machine."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **tool_versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu_name(),
        "instructions": ", ".join(_flags()),
        "torch threads": str(torch.get_num_threads()),
        **gpu,
    }


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def write_result(
    path: Path,
    facts: Mapping[str, Any],
    *,
    load_before: float,
    versions: Mapping[str, str] | None = None,
) -> None:
    """A benchmark's JSON: its facts behind the conditions. It appears when it is complete.

    facts         plain data
    load_before   `os.getloadavg()[0]` as the run began
    versions      of peers
    """
    whole = {
        "qtool_benchmark": VERSION,
        "command": shlex.join(["python", *_relative(sys.argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": {**environment(), **(versions or {})},
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        **facts,
    }
    write_whole(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush_to_disk(partial)
    partial.replace(path)


def _relative(arguments: list[str]) -> list[str]:
    """Without the folders of the machine it ran on."""
    return [Path(word).name if Path(word).is_absolute() else word for word in arguments]


def _flags() -> list[str]:
    try:
        return sorted(cpu_flags().intersection(FLAGS))
    except Unavailable:
        return []
