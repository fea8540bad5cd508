"""Ray Serve on this machine, started by `qtool deploy --to ray` with two engines: text, streams,
hang-ups, caches, metrics, and an engine that is killed in the middle of its streams.

Needs the extra `ray`. One application serves the whole file; killing an engine comes last.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed")

from qtool import LLM, SamplingParams

pytestmark = pytest.mark.slow

MODEL = "builtin:books-7m"
START_SECONDS = 300
TRIES = 3
# Slow enough on any machine that signals arrive before the end.
LONG = {"max_tokens": 480, "ignore_eos": True, "temperature": 0, "stream": True}


@dataclass(frozen=True)
class Application:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def complete(self, prompt: str, **fields: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "temperature": 0, **fields}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metric(self, name: str, labels: str = "") -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        values = [float(line.rpartition(" ")[2]) for line in lines if labels in line]
        assert values, name
        return sum(values)

    def engines(self) -> list[int]:
        """Process ids of its engines."""
        found = subprocess.run(
            ["pgrep", "-f", "^ray::ServeReplica:books-7m:Engine"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return [int(line) for line in found.stdout.split()]


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextmanager
def deployed(log: Path) -> Iterator[Application]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "qtool", "deploy", "--to", "ray", MODEL, "--replicas", "2",
        "--cpus", "1", "--memory", "1G", "--port", str(port), "--dtype", "float32",
        "--kv-cache-memory-bytes", "50000000", "--shutdown-timeout", "20",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, text=True, env=environment
        )
    try:

        def is_ready_or_gone() -> bool:
            return process.poll() is not None or "\nServing " in log.read_text()

        wait_until(is_ready_or_gone, "the application did not start", START_SECONDS)
        yield Application(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("ray")
    for attempt in range(TRIES):
        with deployed(folder / f"{attempt}.log") as found:
            if found.process.poll() is None:
                yield found
                return
            # A busy machine: Ray's own half a minute for its processes was not enough.
            assert "Ray could not start" in found.log.read_text(), found.log.read_text()
    pytest.skip(f"Ray's processes were not up in time, {TRIES} times")


def test_greedy_text_is_that_of_one_process(application: Application) -> None:
    llm = LLM(MODEL, dtype="float32", kv_cache_memory_bytes=30_000_000)
    for prompt in ("It was a dark and", "Call me"):
        ours = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
        assert application.complete(prompt, max_tokens=12)["choices"][0]["text"] == ours.text


def test_both_engines_are_there_and_healthy(application: Application) -> None:
    assert httpx.get(f"{application.url}/health", timeout=30).json() == {"status": "ok"}
    assert len(application.engines()) == 2


def test_mistakes_are_answered_as_on_one_process(application: Application) -> None:
    body = {"prompt": "x", "max_tokens": 10**6}
    response = httpx.post(f"{application.url}/v1/completions", json=body, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_prompt_comes_back_to_the_cache_that_holds_it(application: Application) -> None:
    prompt = "The old man and the sea, and the boy who came with him every morning. " * 8
    first = application.complete(prompt, max_tokens=2)["usage"]
    for _ in range(6):
        usage = application.complete(prompt, max_tokens=2)["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached > first["prompt_tokens"] // 2


def test_metrics_count_what_all_engines_did(application: Application) -> None:
    name = "vllm:generation_tokens_total"
    time.sleep(2.5)  # what came before has been said
    before = application.metric(name)
    prompts = [f"{word} was the first to see it" for word in ("Ada", "Ben", "Cid", "Dot")]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: application.complete(p, max_tokens=20), prompts))
    made = sum(answer["usage"]["completion_tokens"] for answer in answers)
    wait_until(lambda: application.metric(name) == before + made, "the tokens are not counted")


def test_a_client_that_hangs_up_frees_its_place(application: Application) -> None:
    aborted = 'finished_reason="abort"'
    before = application.metric("vllm:request_success_total", aborted)
    url = f"{application.url}/v1/completions"
    with httpx.stream("POST", url, json={"prompt": "Once", **LONG}, timeout=60) as response:
        next(response.iter_lines())
    wait_until(
        lambda: application.metric("vllm:request_success_total", aborted) > before,
        "the request was not aborted",
    )
    wait_until(
        lambda: application.metric("vllm:num_requests_running") == 0, "an engine goes on alone"
    )


def stream(application: Application, prompt: str, begun: threading.Barrier) -> list[str]:
    """The data lines of a long answer; waits for the others after its first."""
    url = f"{application.url}/v1/completions"
    lines: list[str] = []
    with httpx.stream("POST", url, json={"prompt": prompt, **LONG}, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line:
                continue
            lines.append(line)
            if len(lines) == 1:
                begun.wait(60)
    return lines


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_an_engine_killed_in_its_streams_fails_those_and_no_more(application: Application) -> None:
    """All engines are stopped while streams run, so that none ends before one engine is killed."""
    engines = application.engines()
    before = {pid: cpu_ticks(pid) for pid in engines}
    prompts = [f"{name} opened the door and" for name in ("Anna", "Bert", "Carl", "Dora", "Emil")]
    begun = threading.Barrier(len(prompts) + 1)
    with ThreadPoolExecutor(len(prompts)) as pool:
        running = [pool.submit(stream, application, prompt, begun) for prompt in prompts]
        begun.wait(60)
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        try:
            # The one that has worked most since has a stream for certain.
            victim = max(engines, key=lambda pid: cpu_ticks(pid) - before[pid])
            os.kill(victim, signal.SIGKILL)
        finally:
            for pid in set(engines) - {victim}:
                os.kill(pid, signal.SIGCONT)
        answered = application.complete("After that,", max_tokens=5)
        results = [stream.result(120) for stream in running]

    assert answered["usage"]["completion_tokens"] == 5
    failed = [lines for lines in results if not any('"finish_reason":"length"' in x for x in lines)]
    assert failed, "no stream was on the engine that was killed"
    for lines in failed:
        error = next(line for line in lines if '"error"' in line)
        assert "engine" in error
        assert len(lines) > 1, "the text before the error is kept"
    for lines in results:
        if lines not in failed:
            assert lines[-1] == "data: [DONE]"
            assert not any('"error"' in line for line in lines)
    # Ray starts another in its place.
    wait_until(lambda: len(application.engines()) == 2, "the engine was not replaced", 120)


def test_sigterm_lets_answers_finish_and_ends_ray(application: Application) -> None:
    begun = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, application, "At last he", begun)
        begun.wait(60)
        application.process.send_signal(signal.SIGTERM)
        lines = running.result(120)
    assert lines[-1] == "data: [DONE]"
    assert application.process.wait(90) == 0, application.log.read_text()
    assert application.engines() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{application.url}/health", timeout=5)
