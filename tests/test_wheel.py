"""An installed wheel is the whole product: all data is inside, and it runs from any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import qtool

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = (".git", ".venv", "build", "dist", "tests", "__pycache__", ".*_cache", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools ships whatever an earlier build left in build/."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and reaches this one's dependencies by a line in a .pth.

    Of a folder that is reached so the .pth files are not read: an editable qtool stays out.
    """
    environment = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=environment)
    return environment


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    # os.walk and rglob do not follow links, so each linked folder is walked where it lies.
    expected = {}
    for entry in (ROOT / "qtool").iterdir():
        files = entry.resolve().rglob("*") if entry.is_dir() else [entry]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                inside = file.relative_to(entry.resolve()).as_posix() if entry.is_dir() else ""
                expected[f"qtool/{entry.name}/{inside}".rstrip("/")] = file
    for name in (
        "qtool/py.typed",
        "qtool/recipes/int4.yaml",
        "qtool/data/models/books-7m/model.safetensors",
        "qtool/data/text/calibration.txt",
    ):
        assert name in expected

    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        assert sorted(set(expected) - held) == []
        for name, file in expected.items():
            assert archive.read(name) == file.read_bytes(), name
    assert {name.split("/")[0] for name in held} == {
        "qtool",
        f"qtool-{qtool.__version__}.dist-info",
    }


def test_the_installed_command_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "qtool"
    where = run(
        installed / "bin" / "python", "-c", "import qtool; print(qtool.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed)

    assert "Usage: qtool" in run(command, "--help", cwd=tmp_path)
    run(
        command,
        "quantize",
        "builtin:books-7m",
        "--recipe",
        "rtn-int4",
        "--out",
        "out",
        cwd=tmp_path,
    )
    assert (tmp_path / "out" / "qtool.json").is_file()
    assert "match their checksums" in run(command, "verify", "out", cwd=tmp_path)
