"""A model shared out among ranks is served like any other, until a rank is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import httpx
import orjson
import pytest

from qtool.runtime.server.process import running_server

MODEL = "builtin:books-7m"


def follower_pids(parent: int) -> list[int]:
    """Processes that a server has started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.slow
def test_a_killed_rank_ends_streams_with_an_error_and_the_server_with_its_name() -> None:
    flags = ("--tensor-parallel-size", "2", "--max-model-len", "512", "--dtype", "float32")
    with running_server(MODEL, *flags) as server:
        asked = {"prompt": "Call me", "max_tokens": 8, "temperature": 0}
        with running_server(MODEL, *flags[2:]) as alone:
            texts = [
                httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"]
                for url in (server.url, alone.url)
            ]
        assert texts[0][0]["text"] == texts[1][0]["text"]
        metrics = httpx.get(f"{server.url}/metrics").text
        assert re.search(r'qtool:model_info\{.*tensor_parallel_size="2"', metrics)
        assert "2 processes, weights" in server.log()

        (pid,) = follower_pids(server.process.pid)
        endless = {**asked, "max_tokens": 480, "ignore_eos": True, "stream": True}
        events = []
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=endless, timeout=60
        ) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    events.append(orjson.loads(line.removeprefix("data: ")))
                if len(events) == 3:
                    os.kill(pid, signal.SIGKILL)
        assert f"rank 1 of 2 (process {pid}) was killed" in events[-1]["error"]["message"]
        assert server.process.wait(60) == 1
        assert f"Error: rank 1 of 2 (process {pid}) was killed by SIGKILL" in server.log()
