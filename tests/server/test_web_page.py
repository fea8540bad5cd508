"""The page at `/`: what it is allowed to do, and what a person does with it in a browser.

The browser is a headless Chromium, driven over its debugging pipe: no driver, no library. Messages
are JSON, ended by a zero byte, on the file descriptors 3 (to the browser) and 4 (from it).
Source: chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qtool.runtime.server.web_page import PAGE, content_security_policy

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DEADLINE_SECONDS = 60


class Page:
    def __init__(self, write: int, read: int) -> None:
        self._write = write
        self._read = read
        self._number = 0
        self._held = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._held += part
        raw, _, self._held = self._held.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            self.complaints += [entry["text"]] if entry["level"] == "error" else []
        return message

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never: {condition}"
            time.sleep(0.05)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Escape": 27}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def chromium_page(program: str, profile: Path) -> Iterator[Page]:
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
    # The shell puts the pipes where the browser looks for them.
    command = f'exec "$0" {flags} --user-data-dir="$1" 3<&{to_read} 4>&{from_write}'
    process = subprocess.Popen(
        ["bash", "-c", command, program, str(profile)],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Page(to_write, from_read)
    finally:
        process.kill()
        process.wait()
        for descriptor in (to_read, to_write, from_read, from_write):
            os.close(descriptor)


HTML = {"Accept": "text/html,application/xhtml+xml"}


def test_a_browser_gets_the_page_and_a_program_json(server: Any) -> None:
    page = server.get("/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>qtool</title>" in page.text
    assert "/v1/chat/completions" in server.get("/").json()["api"]


def test_the_page_may_run_its_own_script_and_nothing_else(server: Any) -> None:
    policy = server.get("/", headers=HTML).headers["content-security-policy"]
    assert policy == content_security_policy(PAGE.read_text())
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[^']+';", policy)


def test_the_page_needs_no_other_host() -> None:
    text = PAGE.read_text()
    hosts = set(re.findall(r"(?:src|href|url\()=?[\"']?(https?://[^\"')\s]+)", text))
    assert not hosts
    assert not re.search(r"\son\w+=\"", text), "handlers in attributes would be blocked"
    assert "innerHTML" not in text, "text of a model must not become markup"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with chromium_page(CHROMIUM, tmp_path / "profile") as opened:
        yield opened


ANSWERS = "document.querySelectorAll('.assistant .body')"
LAST = f"{ANSWERS}[{ANSWERS}.length - 1].textContent"
IDLE = "!document.getElementById('send').hidden"


@pytest.mark.slow
def test_a_conversation_in_a_browser(page: Page, serve: Callable[..., Any]) -> None:
    with serve() as server:
        page.open(server.url)
        page.wait_for("document.getElementById('model').textContent === 'builtin:books-7m'")
        page.run("settings.max_tokens = 12; settings.temperature = 0")
        page.type("Tell me a story.")
        page.press("Enter")
        page.wait_for(f"{ANSWERS}.length === 1 && {IDLE}")
        body = {
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "max_tokens": 12,
            "temperature": 0,
        }
        told = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert page.run(LAST).split() == told.split()
        assert "12 tokens" in page.run("document.querySelector('.tools').textContent")

        # A long answer shows while it is written, and Escape stops it on the server, too.
        page.run("settings.max_tokens = 400; settings.temperature = 1")
        page.type("Go on.")
        page.press("Enter")
        page.wait_for(f"{ANSWERS}.length === 2 && {LAST}.length > 20")
        assert not page.run(IDLE)
        page.press("Escape")
        page.wait_for(IDLE)
        server.wait_for_metric("vllm:num_requests_running", lambda value: value == 0)
        stopped = page.run(LAST)

        page.open(server.url)  # reload: the conversation is kept
        page.wait_for(f"{ANSWERS}.length === 2")
        assert page.run(LAST) == stopped
        page.run("settings.max_tokens = 5")
        page.run("document.querySelector('.again').click()")
        page.wait_for(f"{ANSWERS}.length === 2 && {IDLE} && {LAST}.length < 80")

        page.run("document.getElementById('show-dashboard').click()")
        page.wait_for("document.querySelectorAll('.tile').length === 12")
        page.resize(360, 700)
        page.run("document.getElementById('menu').click()")
        assert page.run("document.getElementById('side').checkVisibility()")
        page.press("Escape")
        assert not page.run("document.getElementById('side').checkVisibility()")
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert page.complaints == []


@pytest.mark.slow
def test_markup_of_a_model_stays_text(page: Page, serve: Callable[..., Any]) -> None:
    with serve() as server:
        page.open(server.url)
        page.run(
            "globalThis.into = document.createElement('div');"
            "markdown('# A\\n\\n<img src=x onerror=alert(1)> **b** `c`\\n\\n```py\\n<d>\\n```\\n"
            "- one\\n- two\\n\\n| a | <b> |\\n|---|:-:|\\n| `1` | 2 |\\n\\n"
            "[x](javascript:alert(1)) [y](https://y.example)', into)"
        )
        assert page.run("into.querySelector('img')") is None
        assert page.run("into.querySelector('pre code').textContent") == "<d>"
        assert page.run("into.querySelectorAll('li').length") == 2
        assert page.run("into.querySelectorAll('a').length") == 1
        assert page.run("into.querySelector('strong').textContent") == "b"
        cells = "[...into.querySelectorAll('th, td')].map((cell) => cell.textContent)"
        assert page.run(cells) == ["a", "<b>", "1", "2"]


@pytest.mark.slow
def test_a_key_is_asked_for_in_the_settings(page: Page, serve: Callable[..., Any]) -> None:
    with serve(api_keys=("secret",)) as server:
        page.open(server.url)
        page.wait_for("document.getElementById('model').textContent.includes('API key')")
        page.run(
            "document.getElementById('show-settings').click(); form.elements.key.value='secret'"
        )
        page.run("document.getElementById('settings').close()")
        page.wait_for("document.getElementById('model').textContent === 'builtin:books-7m'")
