"""`qtool deploy --to systemd`: systemd's own check, the words of its command line, sd_notify."""

from __future__ import annotations

import asyncio
import configparser
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import QtoolError
from qtool.runtime.deploy.systemd import quoted
from qtool.runtime.server.process import running_server
from qtool.runtime.server.supervisor import Supervisor
from qtool.settings import settings

MODEL = "builtin:books-7m"


@pytest.fixture
def service(
    written: Callable[[str, Path], dict[str, str]],
) -> Callable[[str, Path], dict[str, str]]:
    """[Service] of the written unit; of settings given twice the last."""

    def run(line: str, folder: Path) -> dict[str, str]:
        (name,) = (name for name in written(line, folder) if name.endswith(".service"))
        parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
        parser.optionxform = str  # type: ignore[method-assign,assignment]
        parser.read(folder / name)
        return dict(parser["Service"])

    return run


# A program of the distribution, which no package index has.
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong(
    tmp_path: Path, written: Callable[[str, Path], dict[str, str]]
) -> None:
    written(f"--to systemd {MODEL} --api-key k --served-model-name 'a b$c%d'", tmp_path)
    unit = tmp_path / "books-7m.service"
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    # Other units of the machine may be wrong; ours is named.
    assert "books-7m" not in done.stderr, done.stderr
    unit.write_text(unit.read_text().replace("WatchdogSec=60", "WatchdogSec=soon"))
    seen = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert "books-7m" in seen.stderr


def test_the_unit_limits_restarts_and_watches(
    tmp_path: Path, service: Callable[[str, Path], dict[str, str]]
) -> None:
    line = f"--to systemd {MODEL} --cpus 3 --memory 6Gi --shutdown-timeout 90"
    unit = service(line, tmp_path)
    assert unit["Type"] == "notify"
    assert unit["CPUQuota"] == "300%"
    assert int(unit["MemoryMax"]) == 6 * 2**30
    assert float(unit["TimeoutStopSec"]) > 90
    assert unit["Restart"] == "on-failure"
    assert float(unit["WatchdogSec"]) > 0


def test_keys_are_a_credential(
    tmp_path: Path, service: Callable[[str, Path], dict[str, str]]
) -> None:
    unit = service(f"--to systemd {MODEL} --api-key s3cret", tmp_path)
    assert "--api-key-file %d/api-keys" in unit["ExecStart"]
    assert unit["LoadCredential"] == "api-keys:/etc/qtool/books-7m.keys"
    keys = tmp_path / "books-7m.keys"
    assert keys.read_text() == "s3cret\n"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert "s3cret" not in (tmp_path / "books-7m.service").read_text()


def test_paths_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Callable[[str, Path], dict[str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    unit = service("--to systemd ./m --name m", tmp_path / "out")
    assert f" serve {tmp_path}/m " in unit["ExecStart"]


def unquoted(word: str) -> str:
    """What systemd makes of one word of ExecStart; systemd.syntax(7), the part used here."""
    if word.startswith('"'):
        word, position = word[1:-1], 0
        out = ""
        while position < len(word):
            if word[position] == "\\":
                escape = word[position + 1]
                out += {"n": "\n", "t": "\t"}.get(escape, escape)
                position += 2
            else:
                out += word[position]
                position += 1
        word = out
    return word.replace("$$", "$").replace("%%", "%")


def test_words_are_quoted_by_hand_worked_cases() -> None:
    assert quoted("plain") == "plain"
    assert quoted("two words") == '"two words"'
    assert quoted('{"a": 1}') == '"{\\"a\\": 1}"'
    assert quoted("50%") == "50%%"
    assert quoted("$HOME") == "$$HOME"
    assert quoted("") == '""'


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20))
def test_quoting_can_be_undone(word: str) -> None:
    text = quoted(word)
    assert unquoted(text) == word
    assert text.startswith('"') or not any(character.isspace() for character in text)


def test_several_replicas_are_for_another_target(refusal: Callable[[str], QtoolError]) -> None:
    assert "2" in refusal(f"--to systemd {MODEL} --autoscale 2:4").message


@pytest.fixture
def listening(tmp_path: Path) -> socket.socket:
    """systemd's end of NOTIFY_SOCKET."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end.bind(str(tmp_path / "notify"))
    end.settimeout(5)
    return end


def test_systemd_is_told(listening: socket.socket) -> None:
    with listening:
        Supervisor(listening.getsockname()).tell("READY=1")
        assert listening.recv(100) == b"READY=1"


def test_nobody_is_told_where_nobody_asked() -> None:
    Supervisor().tell("READY=1")
    Supervisor("/nowhere/at/all").tell("READY=1")
    assert settings({}).notify_socket is None
    found = settings({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "60000000"})
    assert (found.notify_socket, found.watchdog_seconds) == ("@x", 60.0)


def test_signs_of_life_end_with_the_engine(listening: socket.socket) -> None:
    """Two looks find it healthy, the third not, and the fourth ends the test: two signs."""
    looks = [False, True, True]
    with listening:
        with pytest.raises(IndexError):
            asyncio.run(Supervisor(listening.getsockname(), 0.001).watch(looks.pop))
        assert [listening.recv(100), listening.recv(100)] == [b"WATCHDOG=1"] * 2
        listening.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listening.recv(100)


@pytest.mark.slow
def test_a_server_says_when_it_is_ready_and_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        with running_server(MODEL):
            heard = [systemd.recv(100) for _ in range(4)]
    assert heard.count(b"READY=1") == 1
    assert heard.count(b"WATCHDOG=1") == 3
